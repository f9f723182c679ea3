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
    """The weight as (out, in * k * k)."""
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


def narrow(model, keep, statistics=None):
    """A new Codec that has only the channels keep = {group: rising indices}; absent groups stay whole.

    statistics, from `observe`: what the removed channels added on average moves into biases and GDN's beta;
    without it they count as zeros from now on.
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
    """Replace the channels of `group` that are not in `keep` by their means, in state.

    A removed channel k gave bias_i + W[i, k] mean_k to each reader, summed over the taps (a quarter of them for a
    transposed convolution with stride 2: that is how many meet an output pixel on average), and
    beta_i + gamma[i, k] E[x_k^2] to the GDN of its group.
    """
    gone = torch.ones(model.config["widths"][group], dtype=torch.bool)
    gone[keep] = False
    _, normalised_by, used_by = GROUPS[group]
    for layer in used_by:
        transposed = isinstance(model.get_submodule(layer), nn.ConvTranspose2d)
        taps = state[f"{layer}.weight"].sum((2, 3))  # (out, in), or (in, out)
        taps = taps.T / 4 if transposed else taps
        state[f"{layer}.bias"] = state[f"{layer}.bias"] + taps[:, gone] @ statistics.mean[layer][gone].to(taps)
    if group in statistics.energy:
        beta, gamma = model.get_submodule(normalised_by).coefficients()
        state[f"{normalised_by}.beta"] = torch.sqrt(beta + gamma[:, gone] @ statistics.energy[group][gone].to(gamma) + PEDESTAL)


class Statistics(NamedTuple):  # in float64
    variance: dict  # of what a group hands to its first reader, after GDN, leaky ReLU or rounding: {group: (width,)}
    mean: dict  # of the input of each layer that reads or normalises a group: {layer: (in,)}
    energy: dict  # mean square of what enters a group's GDN: {group: (width,)}


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
    """Statistics over the images x (B, 3, H, W) and the levels; sums in float64, or a nearly constant channel's
    variance would be noise."""

    def sums(v):  # (C,) of v and of v^2, and how many positions they are over
        return torch.stack([v.double().sum((0, 2, 3)), v.double().square().sum((0, 2, 3))]), v[:, 0].numel()

    gdns = {group: gdn for group, (_, gdn, _) in GROUPS.items() if gdn and "gdn" in gdn}
    readers = {group: used_by for group, (_, _, used_by) in GROUPS.items()}
    mean, square = {}, {}
    for layer, parts in watch(model, x, [*gdns.values(), *sum(readers.values(), [])], sums).items():
        mean[layer], square[layer] = sum(part for part, _ in parts) / sum(count for _, count in parts)
    variance = {group: square[used_by[0]] - mean[used_by[0]] ** 2 for group, used_by in readers.items()}
    energy = {group: square[gdn] for group, gdn in gdns.items()}
    return Statistics(variance, mean, energy)


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


def importance(model, x, statistics, measure="variance"):
    """How much a channel matters, {group: (width,)}, by one of three measures over the images x (B, 3, H, W):

    variance  of what it hands to the layer that reads it, from `statistics`: a channel that hardly varies says little
              (Polyak and Wolf, "Channel-level acceleration of deep face representations", IEEE Access 2015)
    taylor    first-order change of J when it goes, see `taylor`
    l1        L1 norm of the weights that make it (Li et al., "Pruning filters for efficient ConvNets",
              arXiv:1608.08710); blind to what GDN does after
    """
    if measure == "variance":
        return statistics.variance
    if measure == "taylor":
        return taylor(model, x)
    return {group: rows(model.get_submodule(made_by)).abs().sum(1) for group, (made_by, _, _) in GROUPS.items()}


def most_important(scores, width):
    """Indices of the `width` highest scores, rising: (width,)."""
    return scores.topk(width).indices.sort().values
