"""Structured pruning: which tensors a channel lives in, which channels matter, and the cut.

A fixed codec needs no tracer. These twelve rows are the whole mean-scale hyperprior: the layer
that makes a group's channels, what normalises them, and the layers that read them. Two rows
have more: y also owns the gains and both halves of h_s.conv3's output (mean k, log scale k + M),
z also owns its prior. RGB, at either end, is never cut.
"""

from typing import NamedTuple

import torch
from torch import nn

from lic.gdn import PEDESTAL
from lic.models import Codec
from lic.training import mean_loss, rate_distortion

RIDGE = 1e-4  # of the mean variance, added to each in a regression: it keeps the weights small
GROUPS = {
    # group    made by       normalised by  used by
    "g_a.1": ("g_a.conv1", "g_a.gdn1", ["g_a.conv2"]),
    "g_a.2": ("g_a.conv2", "g_a.gdn2", ["g_a.conv3"]),
    "g_a.3": ("g_a.conv3", "g_a.gdn3", ["g_a.conv4"]),
    "y": ("g_a.conv4", None, ["g_s.conv1", "h_a.conv1"]),
    "g_s.1": ("g_s.conv1", "g_s.gdn1", ["g_s.conv2"]),
    "g_s.2": ("g_s.conv2", "g_s.gdn2", ["g_s.conv3"]),
    "g_s.3": ("g_s.conv3", "g_s.gdn3", ["g_s.conv4"]),
    "h_a.1": ("h_a.conv1", None, ["h_a.conv2"]),
    "h_a.2": ("h_a.conv2", None, ["h_a.conv3"]),
    "z": ("h_a.conv3", "prior_z", ["h_s.conv1"]),
    "h_s.1": ("h_s.conv1", None, ["h_s.conv2"]),
    "h_s.2": ("h_s.conv2", None, ["h_s.conv3"]),
}


def channel_axes(layer):
    """(out axis, in axis) of a layer's weight: Conv2d is (out, in, ...), ConvTranspose2d (in, out, ...)."""
    return (1, 0) if isinstance(layer, nn.ConvTranspose2d) else (0, 1)


def rows(layer):
    """The weight of a convolution, detached, as (out, in * k * k)."""
    return layer.weight.detach().transpose(0, channel_axes(layer)[0]).flatten(1)


def cuts(model, group, keep):
    """Every (tensor name, axis, indices to keep) that narrowing `group` to the channels `keep` touches."""
    made_by, normalised_by, used_by = GROUPS[group]
    yield f"{made_by}.weight", channel_axes(model.get_submodule(made_by))[0], keep
    yield f"{made_by}.bias", 0, keep
    for layer in used_by:
        yield f"{layer}.weight", channel_axes(model.get_submodule(layer))[1], keep
    if group == "z":  # every tensor of the prior is channel first
        for name, _ in model.prior_z.named_parameters():
            yield f"prior_z.{name}", 0, keep
    elif normalised_by:
        yield f"{normalised_by}.beta", 0, keep
        yield f"{normalised_by}.gamma", 0, keep
        yield f"{normalised_by}.gamma", 1, keep
    if group == "y":
        both_halves = torch.cat([keep, keep + model.config["widths"]["y"]])
        yield "h_s.conv3.weight", 0, both_halves
        yield "h_s.conv3.bias", 0, both_halves
        yield "log_gain", 1, keep
        yield "log_inverse_gain", 1, keep


@torch.no_grad()
def narrow(model, keep, statistics=None):
    """A new Codec that has only the channels keep = {group: rising indices}; absent groups stay whole.

    statistics, from `observe`: the channels that stay take over what they can predict of the removed ones;
    without it the removed ones count as zeros from now on.
    """
    state = model.state_dict()
    if statistics:
        for group, indices in keep.items():  # all before the first cut: a fold reads whole weights
            fold(model, state, group, indices, statistics)
    for group, indices in keep.items():
        for name, axis, kept in cuts(model, group, indices):
            state[name] = state[name].index_select(axis, kept)  # copies: a view would save its whole storage
    widths = {**model.config["widths"], **{group: len(indices) for group, indices in keep.items()}}
    narrowed = Codec({**model.config, "widths": widths}).to(model.log_gain.dtype)
    narrowed.load_state_dict(state)
    return narrowed.to(memory_format=torch.channels_last)


def fold(model, state, group, keep, statistics):
    """Replace the channels of `group` that are not in `keep` by their best linear prediction from those, in state.

    With x_gone ~ B x_keep + c, which has the least squared error over all positions, each reader's
    W x = W_keep x_keep + W_gone x_gone becomes (W_keep + W_gone B) x_keep + W_gone c: other weights and
    another bias, the same layer. (Of a transposed convolution with stride 2 a quarter of the taps meet an output pixel,
    on average.) Likewise the GDN of the group with x^2 in the place of x, where B must not be negative. He, Zhang, Sun, "Channel
    pruning for accelerating very deep neural networks", arXiv:1707.06168, reconstruct the reader's output by least squares;
    here its input is, which needs no more than one covariance a layer.
    """
    stays = torch.zeros(model.config["widths"][group], dtype=torch.bool)
    stays[keep] = True
    gone = (~stays).nonzero()[:, 0]
    _, normalised_by, used_by = GROUPS[group]
    for layer in used_by:
        B, c = (t.to(state[f"{layer}.bias"]) for t in _predict(statistics.moments[layer], keep, gone))
        reader = model.get_submodule(layer)
        weight = state[f"{layer}.weight"].transpose(0, channel_axes(reader)[0]).clone()  # (out, in, k, k)
        met = 0.25 if isinstance(reader, nn.ConvTranspose2d) else 1
        state[f"{layer}.bias"] = state[f"{layer}.bias"] + met * weight[:, gone].sum((2, 3)) @ c
        weight[:, keep] += torch.einsum("ogij,gk->okij", weight[:, gone], B)
        state[f"{layer}.weight"] = weight.transpose(0, channel_axes(reader)[0])
    if group in statistics.energies:
        energy, energies = statistics.energies[group]
        B, _ = _predict((energy, energies), keep, gone)
        B = B.clamp(min=0)
        B = B / (B @ energy[keep] / energy[gone].clamp(min=1e-12)).clamp(min=1)[:, None]  # no more than there was
        c = energy[gone] - B @ energy[keep]
        beta, gamma = model.get_submodule(normalised_by).coefficients()
        B, c = B.to(gamma), c.clamp(min=0).to(gamma)
        state[f"{normalised_by}.beta"] = torch.sqrt(beta + gamma[:, gone] @ c + PEDESTAL)
        gamma[:, keep] += gamma[:, gone] @ B
        state[f"{normalised_by}.gamma"] = torch.sqrt(gamma + PEDESTAL)


def _predict(moments, keep, gone):
    """B (gone, keep) and c (gone,) of x_gone ~ B x_keep + c; moments: (mean (C,), mean of x x^T (C, C))."""
    mean, products = moments
    covariance = products - mean[:, None] * mean
    known = covariance[keep][:, keep]
    known = known + (RIDGE * known.diagonal().mean() + 1e-12) * torch.eye(len(keep), dtype=known.dtype)
    B = torch.linalg.solve(known, covariance[keep][:, gone]).T
    return B, mean[gone] - B @ mean[keep]


class Statistics(NamedTuple):  # in float64
    moments: dict  # of the input of each layer that reads a group: {layer: (mean (in,), mean of x x^T (in, in))}
    energies: dict  # of the squares of what enters a group's GDN: {group: (mean (C,), mean of x^2 (x^2)^T (C, C))}


@torch.no_grad()
def watch(model, x, layers, summary):
    """summary(input) of each layer for each batch of four of the images x (B, 3, H, W), at each level: {layer: [...]}."""
    seen = {layer: [] for layer in layers}
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(summary(inputs[0])))
             for name in layers]  # fmt: skip
    for level in range(len(model.lambdas)):
        for batch in x.split(4):
            model(batch, torch.full((len(batch),), float(level)))
    for hook in hooks:
        hook.remove()
    return seen


def observe(model, x):
    """Statistics over the images x (B, 3, H, W) and the levels; sums in float64, or what a nearly constant channel
    varies by would be noise."""

    def sums(v):
        v = v.double().permute(1, 0, 2, 3).flatten(1)  # (C, positions)
        return v.shape[1], v.sum(1), v @ v.T

    def moments(parts):
        count, total, products = (sum(column) for column in zip(*parts))
        return total / count, products / count

    readers = [layer for _, _, used_by in GROUPS.values() for layer in used_by]
    gdns = {group: gdn for group, (_, gdn, _) in GROUPS.items() if gdn and "gdn" in gdn}
    inputs = watch(model, x, readers, sums)
    squares = watch(model, x, gdns.values(), lambda v: sums(v.square()))
    return Statistics({layer: moments(inputs[layer]) for layer in readers}, {g: moments(squares[gdn]) for g, gdn in gdns.items()})


def residual(model, statistics):
    """Backward elimination: the rank in which the channels of a group can go, {group: (width,)}.

    In each round the channel goes whose best prediction from those that are left costs its first reader least:
    |W_c|^2 / P_cc, where P is the inverse covariance of what is left and 1 / P_cc the variance that the others cannot predict.
    The "optimal brain surgeon" of a linear layer (Hassibi and Stork, NIPS 1992), a channel at a time.
    """
    ranks = {}
    for group, (_, _, used_by) in GROUPS.items():
        reader, (mean, products) = model.get_submodule(used_by[0]), statistics.moments[used_by[0]]
        covariance = products - mean[:, None] * mean
        ridge = 1e-6 * covariance.diagonal().mean() + 1e-12
        P = torch.linalg.inv(covariance + ridge * torch.eye(len(mean), dtype=mean.dtype))
        strength = reader.weight.detach().double().square().transpose(0, channel_axes(reader)[1]).sum((1, 2, 3))
        ranks[group], left = torch.zeros(len(mean)), torch.ones(len(mean), dtype=torch.bool)
        for rank in range(len(mean)):
            c = torch.where(left, strength / P.diagonal(), torch.inf).argmin()
            ranks[group][c], left[c] = rank, False
            P = P - P[:, c, None] * P[c] / P[c, c]  # the inverse covariance without c; its row and column become 0
            P[c, c] = 1
    return ranks


def taylor(model, x):
    """First-order change of J, squared, when one channel gives its mean everywhere: {group: (width,)}.

        J(a -> mean) - J(a) ~ sum over positions of dJ/da (mean - a)        a: output of the layer that makes it

    summed in squares over images and levels, J relative to the level's mean; mean: over a batch of four images.
    Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance estimation for neural network pruning", arXiv:1906.10771,
    with the mean in the place of zero.
    """
    outputs = {}
    hooks = [
        model.get_submodule(made_by).register_forward_hook(lambda *hooked, group=group: outputs.update({group: hooked[2]}))
        for group, (made_by, _, _) in GROUPS.items()
    ]
    scores = {group: 0 for group in GROUPS}
    for level, mean_J in enumerate(mean_loss(model, x).tolist()):
        for batch in x.split(4):
            out = model(batch, torch.full((len(batch),), float(level)))
            J = rate_distortion(out, batch, model.lambdas[level])[0].sum() / mean_J
            for (group, a), grad in zip(outputs.items(), torch.autograd.grad(J, list(outputs.values()))):
                a = a.detach()
                scores[group] = scores[group] + (grad * (a - a.mean((0, 2, 3), keepdim=True))).sum((2, 3)).square().sum(0)
    for hook in hooks:
        hook.remove()
    return scores


def importance(model, x, statistics, measure="residual"):
    """How much a channel matters, {group: (width,)}, by one of four measures over the images x (B, 3, H, W):

    residual  its rank in a backward elimination, see `residual`: what the other channels cannot replace goes last
    variance  of what it hands to the layer that reads it, from `statistics`: a channel that hardly varies says little
              (Polyak and Wolf, "Channel-level acceleration of deep face representations", IEEE Access 2015)
    taylor    first-order change of J when it goes, see `taylor`
    l1        L1 norm of the weights that make it (Li et al., "Pruning filters for efficient ConvNets",
              arXiv:1608.08710); blind to what GDN does after

    Raises ValueError for another measure.
    """
    if measure == "residual":
        return residual(model, statistics)
    if measure == "variance":
        readers = {group: used_by[0] for group, (_, _, used_by) in GROUPS.items()}
        moments = {group: statistics.moments[layer] for group, layer in readers.items()}
        return {group: products.diagonal() - mean**2 for group, (mean, products) in moments.items()}
    if measure == "taylor":
        return taylor(model, x)
    if measure == "l1":
        return {group: rows(model.get_submodule(made_by)).abs().sum(1) for group, (made_by, _, _) in GROUPS.items()}
    raise ValueError(measure)


def most_important(scores, width):
    """Indices of the `width` highest scores, rising: (width,)."""
    return scores.topk(width).indices.sort().values
