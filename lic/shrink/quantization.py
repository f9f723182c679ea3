"""From a float codec to 8 bits: balance the channels, choose the scales of the inputs.

The grids, and the layers that round to them, are in codec/eight_bits.py; the weights are rounded
last, by rounding.py. In between the weights and the scales of the 8-bit inputs are trained
(Esser et al., "Learned step size quantization", arXiv:1902.08153); those of the 16-bit ones are
not: they leave room for twice the largest value.
"""

import torch

from lic.codec import structure
from lic.codec.eight_bits import WIDE, eight_bit_inputs, fake_quantize, input_ranges
from lic.codec.gdn import IGDN
from lic.shrink.statistics import layer_inputs


def largest_scale(v, low, high):
    """Scale of each row at which nothing is clipped: v (R, N) -> (R,)."""
    return torch.where(v > 0, v / high, v / low).amax(1).clamp(min=1e-8)


def least_error_scale(v, low, high):
    """Scale of each row with the least squared error over 40 clipping points: (R, N) -> (R,)."""
    largest = largest_scale(v, low, high)
    best, least = largest, torch.full_like(largest, torch.inf)
    for fraction in torch.linspace(0.22, 1, 40):
        scale = fraction * largest
        error = (fake_quantize(v, scale[:, None], low, high) - v).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def clipped_inputs():
    """Layers of which rare values of the 8-bit input may be clipped: all but those of g_a.

    In g_a a clipped value can spoil a picture, and a finer scale is lost when y is rounded.
    """
    return [name for name in eight_bit_inputs() if not name.startswith("g_a")]


@torch.no_grad()
def input_scales(model, x, clipped=None):
    """Scales of the inputs of a float model's layers over images, at every level: {layer: ()}.

    x: (B, 3, H, W), some hundred images: the largest value is one image's. clipped: the layers
    whose scale has the least squared error (by default `clipped_inputs`); an 8-bit scale of the
    others just holds the largest value, a 16-bit one twice that.
    """
    clipped = clipped_inputs() if clipped is None else clipped
    ranges = {name: limits for name, limits in input_ranges().items() if limits}

    def summary(v):
        return sample(v), torch.stack(v.aminmax())

    scales = {}
    for name, parts in layer_inputs(model, x, ranges, summary).items():
        low, high = ranges[name]
        if name in clipped:
            samples = torch.cat([sampled for sampled, _ in parts])
            scale = least_error_scale(samples[None], low, high)[0]
        else:
            extremes = torch.cat([least_and_largest for _, least_and_largest in parts])
            scale = largest_scale(extremes[None], low, high)[0]
        scales[name] = 2 * scale if ranges[name] == WIDE else scale
    return scales


def sample(v):
    """Some 5,000 values of a tensor, (values,)."""
    stride = (v.numel() // 5_000) | 1  # odd: an even stride would meet every second column only
    return v.flatten()[::stride].clone()  # a view would keep all of v alive


@torch.no_grad()
def equalize(model, x):
    """Balance the channels of each layer's input between it and the weights that read it, in place.

    One scale serves a whole input and one a whole row of weights. So a quiet channel gets few of
    the input's 256 steps, and a loud one has small weights, which get few of theirs. Dividing
    channel c by s_c and multiplying the weights that read it by s_c changes nothing in exact
    arithmetic, as long as GDN's beta stays above its bound. The division costs nothing: the layer
    before takes it, through a leaky ReLU; or GDN, whose beta_c and gamma[c] take s_c^2; or, for y
    on its way into g_s, the inverse gain. (On its way into h_a y is not rounded, nor balanced.)

        s_c = sqrt(largest |input| / largest |weight|), over the geometric mean of the channels

    x: (B, 3, H, W), images. Xiao et al., "SmoothQuant", arXiv:2211.10438, with alpha = 1/2; through
    a rectifier: Nagel et al., "Data-free quantization through weight equalization and bias
    correction", arXiv:1906.04721.
    """
    groups = structure.groups()
    del groups["z"]  # it is rounded and coded as it is, with no gain that could take the factor
    readers = {name: group.used_by[0] for name, group in groups.items()}
    largest = layer_inputs(model, x, readers.values(), lambda v: v.abs().amax((0, 2, 3)))
    for name, group in groups.items():
        reader = model.get_submodule(readers[name])
        _, in_axis = structure.channel_axes(reader)
        peak = torch.stack(largest[readers[name]]).amax(0)  # (C,)
        weight_peak = reader.weight.abs().transpose(0, in_axis).amax((1, 2, 3))  # (C,)
        s = torch.sqrt(peak / weight_peak.clamp(min=1e-6))
        alive = peak > 1e-6
        mean = s[alive].log().mean().exp()
        s = torch.where(alive, (s / mean).clamp(1e-2, 1e2), 1)
        reader.weight.mul_(structure.broadcast(s, in_axis))
        if name == "y":
            model.log_inverse_gain.sub_(s.log())
        elif group.gdn:
            divide_gdn(model.get_submodule(group.gdn), s)
        else:
            layer = model.get_submodule(group.made_by)
            out_axis, _ = structure.channel_axes(layer)
            layer.weight.div_(structure.broadcast(s, out_axis))
            layer.bias.div_(s)


def divide_gdn(gdn, s):
    """Divide the output channels of a GDN or IGDN by s (C,), in place."""
    beta, gamma = gdn.coefficients()
    factor = s**-2 if isinstance(gdn, IGDN) else s**2  # IGDN multiplies by the root
    gdn.beta.copy_(gdn.stored(beta * factor))
    gdn.gamma.copy_(gdn.stored(gamma * factor[:, None]))
