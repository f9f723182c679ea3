"""h_s of a quantized codec in exact integers: the same bits on every machine, by construction.

    a = W q + b                                   W: int8 weights, b: integers; q: z_hat, later 16-bit activations
    q = clamp(round(lrelu(a) m), -8224, 57311)    m: one float64 a channel; lrelu(a) = a / 8 below 0, exactly

and after the last layer round(a m) is, in its first half, the mean in units of 2^-12 and, in its second, the
index of the scale's table, clamped to [0, 63]. The sums are float64 convolutions: every partial sum is an
integer below 2^53, so nothing is ever rounded and the order of summation means nothing; a / 8 is exact in binary. The
product with m is one IEEE multiplication of known operands, rounded half to even: the same everywhere, too.
Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
arXiv:1712.05877, with a float64 multiplier in the place of their fixed-point one; for entropy models:
Ballé, Johnston, Minnen, "Integer networks for data compression with latent-variable models", ICLR 2019.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS
from lic.files import LicError
from lic.models import SLOPE
from lic.quantization import WIDE

MEAN_UNIT = 2.0**-12
MAX_SYMBOL = 2**30  # |z| and |y - mean| stay below


@torch.no_grad()
def freeze_h_s(model):
    """Derive the integer biases and the multipliers of h_s from its weights and scales, in place.

    The visible call after the last training step. Like the tables, its results travel in the checkpoint,
    because another machine's logarithm might give other ones. Raises LicError if a sum could reach 2^53.
    """
    h_s, M = model.h_s, model.config["widths"]["y"]
    scale2, scale3 = h_s.conv2.input_scale.double(), h_s.conv3.input_scale.double()
    output_unit = torch.tensor([MEAN_UNIT, LOG_SCALE_STEP], dtype=torch.float64).repeat_interleave(M)
    output_zero = torch.tensor([0, LOG_SCALE_MIN], dtype=torch.float64).repeat_interleave(M)
    for layer, input_unit, largest_input, unit, zero in (
        (h_s.conv1, 1, MAX_SYMBOL, scale2, 0),
        (h_s.conv2, scale2, WIDE[1], scale3, 0),
        (h_s.conv3, scale3, WIDE[1], output_unit, output_zero),
    ):
        sum_unit = input_unit * layer.weight_scale.double().flatten()  # (out,): what 1 in a sum stands for
        bias = torch.round((layer.bias.double() - zero) / sum_unit)
        weights = layer.integer_weight().abs().transpose(0, layer.out_axis).flatten(1).sum(1)
        if not (largest_input * weights + bias.abs() < 2**53).all():
            raise LicError("the weights of h_s are too large for exact sums; quantize again with a smaller --lr")
        layer.integer_bias.copy_(bias)
        layer.multiplier.copy_(sum_unit / unit)


class IntegerHyperSynthesis(nn.Module):
    """h_s: the quantized network after `freeze_h_s`, or as a checkpoint gives it. Raises LicError before that."""

    def __init__(self, h_s):
        super().__init__()
        for k, layer in enumerate((h_s.conv1, h_s.conv2, h_s.conv3), start=1):
            if not (layer.multiplier > 0).all():
                raise LicError("the integers of h_s were not derived: call integer.freeze_h_s after quantizing")
            self.register_buffer(f"weight{k}", layer.integer_weight())
            self.register_buffer(f"bias{k}", layer.integer_bias.double())
            self.register_buffer(f"multiplier{k}", layer.multiplier[:, None, None].clone())

    def sums(self, k, q):
        """The integers a of layer k, 1 to 3, from the q before it, all float64: (B, C, h, w) -> (B, C', 2h, 2w), for k = 3
        (B, 2M, h, w)."""
        weight, bias = self.get_buffer(f"weight{k}"), self.get_buffer(f"bias{k}")
        if k == 3:
            return F.conv2d(q, weight, bias, padding=1)
        return F.conv_transpose2d(q, weight, bias, stride=2, padding=2, output_padding=1)

    def forward(self, z_hat):
        """z_hat (B, Z, h, w), integers in float64 -> mean and table index, both (B, M, 4h, 4w) float64."""
        q = torch.round(F.leaky_relu(self.sums(1, z_hat), SLOPE) * self.multiplier1).clamp(*WIDE)
        q = torch.round(F.leaky_relu(self.sums(2, q), SLOPE) * self.multiplier2).clamp(*WIDE)
        mean, index = torch.round(self.sums(3, q) * self.multiplier3).chunk(2, 1)
        return mean * MEAN_UNIT, index.clamp(0, SCALE_LEVELS - 1)
