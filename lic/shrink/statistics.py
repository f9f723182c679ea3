"""What flows through the layers of a codec, on calibration images and at every rate level."""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from lic.codec import structure

RIDGE = 1e-4  # of the mean variance, added to each in a regression: it keeps the weights small
POSITIONS = 1500  # taken from each batch, to fit the GDNs to


@contextmanager
def listening(model, names, receive):
    """Within it receive(name, layer, input) is called whenever one of the layers `names` runs."""

    def hook_of(name):
        return lambda layer, inputs: receive(name, layer, inputs[0])

    hooks = []
    for name in names:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook_of(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layer_inputs(model, x, names, summary):
    """summary(input) of each layer for each batch of four images at each level: {name: [...]}.

    x: (B, 3, H, W).
    """
    seen = {name: [] for name in names}
    with listening(model, names, lambda name, layer, v: seen[name].append(summary(v))):
        for level in range(len(model.lambdas)):
            for batch in x.split(4):
                model(batch, torch.full((len(batch),), float(level)))
    return seen


class Moments(NamedTuple):
    """Of channels over all positions, in float64."""

    mean: torch.Tensor  # of x, (C,)
    products: torch.Tensor  # mean of x x^T, (C, C)

    def covariance(self):
        return self.products - self.mean[:, None] * self.mean


class Statistics(NamedTuple):
    inputs: dict  # {layer that reads a group: Moments of its input}
    gdn_products: dict  # {group with a GDN: `gdn_products` of its input}


@torch.no_grad()
def observe(model, x):
    """Statistics over the images x (B, 3, H, W) and the levels."""
    groups = structure.groups()
    readers = [reader for group in groups.values() for reader in group.used_by]
    gdns = {name: group.gdn for name, group in groups.items() if group.gdn}
    inputs = layer_inputs(model, x, readers, sums)
    samples = layer_inputs(model, x, gdns.values(), some_positions)
    return Statistics(
        {reader: moments(parts) for reader, parts in inputs.items()},
        {
            group: gdn_products(model.get_submodule(gdn), torch.cat(samples[gdn], 1))
            for group, gdn in gdns.items()
        },
    )


def sums(v):
    """Number of positions, sum of x, sum of x x^T of v (B, C, H, W).

    In float64, or what a nearly constant channel varies by would be noise.
    """
    v = v.double().permute(1, 0, 2, 3).flatten(1)  # (C, positions)
    return v.shape[1], v.sum(1), v @ v.T


def moments(parts):
    """Moments of a list of `sums`."""
    count, total, products = (sum(column) for column in zip(*parts))
    return Moments(total / count, products / count)


def some_positions(v):
    """v (B, C, H, W) at some POSITIONS evenly spaced positions, or at all: (C, positions)."""
    v = v.permute(1, 0, 2, 3).flatten(1)
    stride = (v.shape[1] // POSITIONS) | 1  # odd: an even one would see some columns only
    return v[:, ::stride].clone()  # a view would keep all of v alive


def gdn_products(gdn, v):
    """What `pruning.fold_into_gdn` needs of a GDN's input v (C, positions): (C, C + 1, C + 1).

    For each channel i the sum over the positions of w_i q q^T, where q = (v_1^2, ... v_C^2, 1),
    w_i = v_i^2 / e_i^2 and e_i = beta_i + sum_j gamma[i, j] v_j^2.
    """
    beta, gamma = (coefficient.double() for coefficient in gdn.coefficients())
    squares = v.double().square()
    energy = beta[:, None] + gamma @ squares
    weights = squares / energy.square()  # (C, positions)
    q = torch.cat([squares, torch.ones_like(squares[:1])])
    return torch.stack([(q * w) @ q.T for w in weights])


def best_prediction(moments, keep, gone):
    """B (gone, keep) and c (gone,) such that B x_keep + c predicts x_gone with least error."""
    covariance = moments.covariance()
    known = covariance[keep][:, keep]
    ridge = RIDGE * known.diagonal().mean() + 1e-12
    known = known + ridge * torch.eye(len(keep), dtype=known.dtype)
    B = torch.linalg.solve(known, covariance[keep][:, gone]).T
    return B, moments.mean[gone] - B @ moments.mean[keep]
