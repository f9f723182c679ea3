"""The mean-scale hyperprior codec (Minnen, Ballé, Toderici, arXiv:1809.02736, without
the context model), with every width its own number and one gain vector a rate level.

    x - 0.5 -> g_a -> y * gain[level] -+-> h_a -> z -> round -> z_hat -> h_s -> mean, log scale
                                       +-> round around mean -> y_hat
    y_hat * inverse_gain[level] -> g_s -> + 0.5 -> x_hat

The layers of the four networks are listed in structure.py.

The gain is the reciprocal quantization step of a channel at a level, as in JPEG's tables;
one set of weights serves every lambda (Cui et al., "Asymmetric gained deep image
compression with continuous rate adaptation", CVPR 2021). Gains are stored as logarithms:
positive without a constraint, and a level between two is a straight line between them.

Left out: the autoregressive context of Minnen 2018 (it decodes pixel by pixel).
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn

from lic.codec import structure
from lic.codec.entropy import (
    MAX_BITS,
    EntropyBottleneck,
    GaussianConditional,
    add_noise,
    soft_limit,
)
from lic.codec.gdn import GDN, IGDN
from lic.codec.gradients import round_ste

SLOPE = 1 / 8  # of the leaky ReLU below zero; with a ReLU most units die (docs/training.md)
LAMBDAS = [0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483]  # CompressAI's, for the loss in train/
PRESETS = {  # name: (N, M, number of lambdas); widths as in Minnen 2018 and mbt2018-mean
    "tiny": (32, 48, 4),
    "small": (64, 96, 4),
    "base": (128, 192, 5),
    "large": (192, 320, 6),
}


def preset_config(name, lambdas=None):
    """Config of a preset: {"widths": {group: channels}, "lambdas": [...]}; plain numbers only.

    The groups are those of structure.py. lambdas: one a rate level, rising; by default the
    preset's number of LAMBDAS.
    """
    N, M, levels = PRESETS[name]
    widths = dict.fromkeys(structure.groups(), N)
    widths |= {"y": M, "h_s.1": M, "h_s.2": M * 3 // 2}
    return {"widths": widths, "lambdas": list(lambdas or LAMBDAS[:levels])}


def convolution(layer, c_in, c_out):
    """The module of a structure.Layer; its output is stride times smaller, or larger."""
    padding = layer.kernel // 2
    if layer.kind == "conv":
        return nn.Conv2d(c_in, c_out, layer.kernel, layer.stride, padding)
    # the weight is (in, out, kh, kw), unlike a convolution's
    return nn.ConvTranspose2d(
        c_in, c_out, layer.kernel, layer.stride, padding, output_padding=layer.stride - 1
    )


def network(name, widths):
    """g_a, g_s, h_a or h_s with the channels of `widths`, {group: channels}, as nn.Sequential.

    Its modules are named as in LAYERS: conv1, gdn1, conv2, ...
    """
    channels = structure.channels(widths)
    modules = OrderedDict()
    for layer in structure.layers_of(name):
        c_in, c_out = channels[layer.reads], channels[layer.makes]
        modules[layer.module] = convolution(layer, c_in, c_out)
        if layer.then:
            modules[layer.then_name.split(".")[1]] = following(layer.then, c_out)
    return nn.Sequential(modules)


def following(kind, channels):
    """The module that follows a convolution: what `then` of its Layer names."""
    if kind == "gdn":
        return GDN(channels)
    if kind == "igdn":
        return IGDN(channels)
    assert kind == "lrelu"
    return nn.LeakyReLU(SLOPE)


class Output(NamedTuple):
    x_hat: torch.Tensor  # (B, 3, H, W), not clamped
    y_bits: torch.Tensor  # (B, M), each channel's, summed over positions
    z_bits: torch.Tensor  # (B, Z)


class Codec(nn.Module):
    """config: as `preset_config` gives it. x is RGB in [0, 1], H and W multiples of 64."""

    def __init__(self, config):
        super().__init__()
        structure.check_layers()
        self.config = config
        self.lambdas = config["lambdas"]
        self.quantization = None  # or the bits, set by eight_bits.quantize_layers
        widths = config["widths"]
        self.g_a, self.g_s = network("g_a", widths), network("g_s", widths)
        self.h_a, self.h_s = network("h_a", widths), network("h_s", widths)
        self.prior_z = EntropyBottleneck(widths["z"])
        self.prior_y = GaussianConditional()
        # At a high rate D ~ step^2, and a step twice as long saves a bit: R = const - 1/2 log2 D.
        # R + lmbda D is least where dR/dD = -lmbda: D ~ 1 / lmbda, and the step ~ 1 / sqrt(lmbda).
        start = 0.5 * torch.log(torch.tensor(self.lambdas) / self.lambdas[-1])  # (levels,)
        self.log_gain = nn.Parameter(start[:, None].repeat(1, widths["y"]))  # (levels, M)
        self.log_inverse_gain = nn.Parameter(-start[:, None].repeat(1, widths["y"]))

    def gains(self, level):
        """Gain and inverse gain of each image: level (B,) -> two of (B, M, 1, 1).

        level is the position in `lambdas`, 0 to len(lambdas) - 1; a fraction takes the
        weighted geometric mean of its neighbours' gains.
        """
        last = len(self.lambdas) - 1
        low = level.floor().long().clamp(max=max(last - 1, 0))
        high = (low + 1).clamp(max=last)
        weight = (level - low)[:, None]
        gain = torch.exp(torch.lerp(self.log_gain[low], self.log_gain[high], weight))
        inverse = self.log_inverse_gain
        inverse_gain = torch.exp(torch.lerp(inverse[low], inverse[high], weight))
        return gain[:, :, None, None], inverse_gain[:, :, None, None]

    def forward(self, x, level, part=(0, 1)):
        """x (B, 3, H, W), level (B,) -> Output.

        The rate counts noisy latents in training mode (differentiable) and rounded ones in eval
        mode: what a file costs, but for escapes and for the 64 scales that the coder knows.
        part (k, n): x is the k-th of n parts of a batch, all of which draw the noise of the whole.
        """
        gain, inverse_gain = self.gains(level)
        # under autocast the networks return bf16; the rest stays in x's precision
        y = self.g_a(x - 0.5).to(x.dtype) * gain  # (B, M, H/16, W/16)
        z = self.h_a(y).to(x.dtype)  # (B, Z, H/64, W/64)
        z_hat = round_ste(z)
        mean, log_scale = self.h_s(z_hat).to(x.dtype).chunk(2, 1)  # 2 of (B, M, H/16, W/16)
        y_hat = round_ste(y - mean) + mean
        x_hat = self.g_s(y_hat * inverse_gain).to(x.dtype) + 0.5

        y_coded, z_coded = y_hat, z_hat
        if self.training:
            y_coded, z_coded = add_noise(y, part), add_noise(z, part)
        y_bits = self.prior_y.bits(y_coded, mean, log_scale)
        z_bits = self.prior_z.bits(z_coded)
        # the bits of z are limited in prior_z.bits, by a bound that keeps their gradient
        y_bits = soft_limit(y_bits) if self.training else y_bits.clamp(max=MAX_BITS)
        return Output(x_hat, y_bits.sum((2, 3)), z_bits.sum((2, 3)))
