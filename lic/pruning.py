"""Structured pruning: which tensors a channel lives in, which channels matter, and the cut.

A fixed codec needs no tracer. These twelve rows are the whole mean-scale hyperprior: the layer
that makes a group's channels, what normalises them, and the layers that read them. Two rows
have more: y also owns the gains and both halves of h_s.conv3's output (mean k, log scale k + M),
z also owns its prior. RGB, at either end, is never cut.
"""

import torch
from torch import nn

from lic.models import Codec

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


def channel_axes(model, layer):
    """(out axis, in axis) of a layer's weight: Conv2d is (out, in, ...), ConvTranspose2d (in, out, ...)."""
    return (1, 0) if isinstance(model.get_submodule(layer), nn.ConvTranspose2d) else (0, 1)


def cuts(model, group, keep):
    """Every (tensor name, axis, indices to keep) that narrowing `group` to the channels `keep` touches."""
    made_by, normalised_by, used_by = GROUPS[group]
    yield f"{made_by}.weight", channel_axes(model, made_by)[0], keep
    yield f"{made_by}.bias", 0, keep
    for layer in used_by:
        yield f"{layer}.weight", channel_axes(model, layer)[1], keep
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


def narrow(model, keep):
    """A new Codec that has only the channels keep = {group: rising indices}; absent groups stay whole."""
    state = model.state_dict()
    for group, indices in keep.items():
        for name, axis, kept in cuts(model, group, indices):
            state[name] = state[name].index_select(axis, kept)  # copies: a view would save its whole storage
    widths = {**model.config["widths"], **{group: len(indices) for group, indices in keep.items()}}
    narrowed = Codec({**model.config, "widths": widths}).to(model.log_gain.dtype)
    narrowed.load_state_dict(state)
    return narrowed.to(memory_format=torch.channels_last)


@torch.no_grad()
def importance(model, x):
    """What each channel tells the layer that reads it: its variance there, {group: (width,)}.

    Over the images x (B, 3, H, W), after GDN, ReLU or rounding, in batches of four, summed over batches and
    levels. A channel that hardly varies says little, and what its mean contributed a bias can learn in
    fine-tuning; the cut itself does not move it there. Eliminating channels of low activity: Polyak and Wolf,
    "Channel-level acceleration of deep face representations", IEEE Access 2015.
    """
    scores = {group: 0 for group in GROUPS}

    def observe(group, reader):
        def hook(layer, inputs):
            scores[group] = scores[group] + inputs[0].var((0, 2, 3), correction=0)

        return model.get_submodule(reader).register_forward_pre_hook(hook)

    hooks = [observe(group, used_by[0]) for group, (_, _, used_by) in GROUPS.items()]
    for level in range(len(model.lambdas)):
        for batch in x.split(4):
            model(batch, torch.full((len(batch),), float(level)))
    for hook in hooks:
        hook.remove()
    return scores


def most_important(scores, width):
    """Indices of the `width` highest scores, rising: (width,)."""
    return scores.topk(width).indices.sort().values
