"""The mean-scale hyperprior codec (Minnen, Ballé, Toderici, arXiv:1809.02736, without
the context model), with every width its own number and one gain vector a rate level.

    x - 0.5 -> g_a -> y * gain[q] -+-> h_a -> z -> round -> z_hat -> h_s -> mean, log scale
                                   +-> round around mean -> y_hat
    y_hat * inverse_gain[q] -> g_s -> + 0.5 -> x_hat

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

from lic.entropy import MAX_BITS, EntropyBottleneck, GaussianConditional, add_noise, round_ste, soft_limit
from lic.gdn import GDN, IGDN

SLOPE = 1 / 8  # of the leaky ReLU below zero; with a ReLU most units of h_a and h_s die (docs/training.md)
STRIDE = 64  # x is a multiple of 64 pixels on either side: y has 1/16, z 1/64 of the resolution
LAMBDAS = [0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483]  # CompressAI's, loss = bpp + lmbda * 255^2 * mse
PRESETS = {  # name: (N, M, number of lambdas); widths as in Minnen 2018 and CompressAI's mbt2018-mean
    "tiny": (32, 48, 4),
    "small": (64, 96, 4),
    "base": (128, 192, 5),
    "large": (192, 320, 6),
}


def preset_config(name, lambdas=None):
    """Config of a preset: {"widths": {group: channels}, "lambdas": [...]}; plain numbers only.

    The twelve widths are named like the channel groups of pruning.py.
    """
    N, M, levels = PRESETS[name]
    widths = {"g_a.1": N, "g_a.2": N, "g_a.3": N, "y": M, "g_s.1": N, "g_s.2": N, "g_s.3": N,
              "h_a.1": N, "h_a.2": N, "z": N, "h_s.1": M, "h_s.2": M * 3 // 2}  # fmt: skip
    return {"widths": widths, "lambdas": list(lambdas or LAMBDAS[:levels])}


def conv(c_in, c_out, kernel=5, stride=2):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)


def deconv(c_in, c_out):
    """Doubles height and width. The weight is (in, out, 5, 5), unlike a convolution's."""
    return nn.ConvTranspose2d(c_in, c_out, 5, stride=2, padding=2, output_padding=1)


class Output(NamedTuple):
    x_hat: torch.Tensor  # (B, 3, H, W), not clamped
    y_bits: torch.Tensor  # (B, M), each channel's, summed over positions
    z_bits: torch.Tensor  # (B, Z)


class Codec(nn.Module):
    """config: as `preset_config` gives it. x is RGB in [0, 1], H and W multiples of 64."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lambdas = config["lambdas"]
        self.quantization = None  # or the bits, set by quantization.quantize_layers
        w = config["widths"]
        self.g_a = nn.Sequential(OrderedDict(
            conv1=conv(3, w["g_a.1"]), gdn1=GDN(w["g_a.1"]),
            conv2=conv(w["g_a.1"], w["g_a.2"]), gdn2=GDN(w["g_a.2"]),
            conv3=conv(w["g_a.2"], w["g_a.3"]), gdn3=GDN(w["g_a.3"]),
            conv4=conv(w["g_a.3"], w["y"]),
        ))  # fmt: skip
        self.g_s = nn.Sequential(OrderedDict(
            conv1=deconv(w["y"], w["g_s.1"]), gdn1=IGDN(w["g_s.1"]),
            conv2=deconv(w["g_s.1"], w["g_s.2"]), gdn2=IGDN(w["g_s.2"]),
            conv3=deconv(w["g_s.2"], w["g_s.3"]), gdn3=IGDN(w["g_s.3"]),
            conv4=deconv(w["g_s.3"], 3),
        ))  # fmt: skip
        self.h_a = nn.Sequential(OrderedDict(
            conv1=conv(w["y"], w["h_a.1"], kernel=3, stride=1), lrelu1=nn.LeakyReLU(SLOPE),
            conv2=conv(w["h_a.1"], w["h_a.2"]), lrelu2=nn.LeakyReLU(SLOPE),
            conv3=conv(w["h_a.2"], w["z"]),
        ))  # fmt: skip
        self.h_s = nn.Sequential(OrderedDict(
            conv1=deconv(w["z"], w["h_s.1"]), lrelu1=nn.LeakyReLU(SLOPE),
            conv2=deconv(w["h_s.1"], w["h_s.2"]), lrelu2=nn.LeakyReLU(SLOPE),
            conv3=conv(w["h_s.2"], 2 * w["y"], kernel=3, stride=1),
        ))  # fmt: skip
        self.prior_z = EntropyBottleneck(w["z"])
        self.prior_y = GaussianConditional()
        # At high rate the best step size falls as 1 / sqrt(lmbda): D ~ step^2 and dR/dD ~ -1/D.
        start = 0.5 * torch.log(torch.tensor(self.lambdas) / self.lambdas[-1])  # (levels,)
        self.log_gain = nn.Parameter(start[:, None].repeat(1, w["y"]))  # (levels, M)
        self.log_inverse_gain = nn.Parameter(-start[:, None].repeat(1, w["y"]))

    def gains(self, level):
        """Gain and inverse gain of each image: level (B,) -> two of (B, M, 1, 1).

        level is the position in `lambdas`, 0 to len(lambdas) - 1; a fraction takes the
        geometric mean of its neighbours' gains.
        """
        low = level.floor().long().clamp(max=max(len(self.lambdas) - 2, 0))
        high = (low + 1).clamp(max=len(self.lambdas) - 1)
        weight = (level - low)[:, None]
        return tuple(
            torch.exp(torch.lerp(log[low], log[high], weight))[:, :, None, None]
            for log in (self.log_gain, self.log_inverse_gain)
        )

    def forward(self, x, level):
        """x (B, 3, H, W), level (B,) -> Output. The rate counts noisy latents in training mode
        (differentiable) and rounded ones in eval mode (what a file costs, but for escapes)."""
        gain, inverse_gain = self.gains(level)
        # under autocast the networks return bf16; the rest stays in x's precision
        y = self.g_a(x - 0.5).to(x.dtype) * gain  # (B, M, H/16, W/16)
        z = self.h_a(y).to(x.dtype)  # (B, Z, H/64, W/64)
        z_hat = round_ste(z)
        mean, log_scale = self.h_s(z_hat).to(x.dtype).chunk(2, 1)  # 2 of (B, M, H/16, W/16)
        y_hat = round_ste(y - mean) + mean
        x_hat = self.g_s(y_hat * inverse_gain).to(x.dtype) + 0.5

        y_coded, z_coded = (add_noise(y), add_noise(z)) if self.training else (y_hat, z_hat)
        y_bits, z_bits = self.prior_y.bits(y_coded, mean, log_scale), self.prior_z.bits(z_coded)
        y_bits = soft_limit(y_bits) if self.training else y_bits.clamp(max=MAX_BITS)
        return Output(x_hat, y_bits.sum((2, 3)), z_bits.sum((2, 3)))
