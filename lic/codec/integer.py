"""h_s of a quantized codec in exact integers: the same bits on every machine, by construction.

    a = W q + b                                   W: int8 weights, b: integers
    q = clamp(round(lrelu(a) m), -8224, 57311)    m: one float64 a channel

q is what a layer reads: z_hat, then 16-bit activations. lrelu(a) is a / 8 below 0, exactly. After
the last layer round(a m) is, in its first half, the mean in units of 2^-12 and, in its second, the
index of the scale's table, clamped to [0, 63]. The sums are float64 convolutions: every partial sum
is an integer below 2^53, so nothing is ever rounded and the order of summation means nothing; a / 8
is exact in binary. The product with m is one IEEE multiplication of known operands, rounded half to
even: the same everywhere, too.

Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", arXiv:1712.05877, with a float64 multiplier in the place of their fixed-point one; for
entropy models: Ballé, Johnston, Minnen, "Integer networks for data compression with
latent-variable models", ICLR 2019.
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.codec import structure
from lic.codec.eight_bits import WIDE, convolve
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS
from lic.codec.header import MAX_SYMBOL
from lic.codec.model import SLOPE
from lic.files import LicError

MEAN_UNIT = 2.0**-12


def h_s_layers(h_s):
    """The convolutions of h_s, in order."""
    return [h_s.get_submodule(layer.module) for layer in structure.layers_of("h_s")]


@torch.no_grad()
def freeze_h_s(model):
    """Derive the integer biases and the multipliers of h_s from its weights and scales, in place.

    An integer q of a layer's input stands for input_unit * q, so that an integer a of its sums
    stands for sum_unit * a, and the integers of its output for output_unit * q + output_zero:

        sum_unit     = input_unit * weight_scale
        integer_bias = round((bias - output_zero) / sum_unit)
        multiplier   = sum_unit / output_unit

    The units between the layers are the scales of their inputs. To be called after the last
    training step. Like the tables, its results travel in the checkpoint, because another machine's
    logarithm might give other ones. Raises LicError if a sum could reach 2^53.
    """
    layers = h_s_layers(model.h_s)
    M = model.config["widths"]["y"]
    # of the last layer: the means in units of 2^-12, the log scales in steps of the table
    last_unit = torch.tensor([MEAN_UNIT, LOG_SCALE_STEP], dtype=torch.float64).repeat_interleave(M)
    last_zero = torch.tensor([0, LOG_SCALE_MIN], dtype=torch.float64).repeat_interleave(M)
    input_unit, largest_input = 1, MAX_SYMBOL  # z_hat
    for layer, following in zip(layers, [*layers[1:], None]):
        if following is None:
            output_unit, output_zero = last_unit, last_zero
        else:
            output_unit, output_zero = following.input_scale.double(), 0
        sum_unit = input_unit * layer.weight_scale.double().flatten()  # (out,)
        bias = torch.round((layer.bias.double() - output_zero) / sum_unit)
        out_axis, _ = structure.channel_axes(layer)
        sum_of_weights = layer.integer_weight().abs().transpose(0, out_axis).flatten(1).sum(1)
        if not (largest_input * sum_of_weights + bias.abs() < 2**53).all():
            raise LicError(
                "the weights of h_s are too large for exact sums; "
                "quantize again with a smaller --lr"
            )
        layer.integer_bias.copy_(bias)
        layer.multiplier.copy_(sum_unit / output_unit)
        input_unit, largest_input = output_unit, WIDE[1]


class IntegerConvolution(nn.Module):
    """One layer of h_s: integers in float64 in, integers in float64 out.

    Raises LicError before `freeze_h_s`.
    """

    def __init__(self, layer):
        super().__init__()
        if not (layer.multiplier > 0).all():
            raise LicError(
                "the integers of h_s were not derived: call integer.freeze_h_s after quantizing"
            )
        self.transposed, self.stride = layer.transposed, layer.stride
        self.padding, self.output_padding = layer.padding, layer.output_padding
        self.register_buffer("weight", layer.integer_weight())
        self.register_buffer("bias", layer.integer_bias.double())
        self.register_buffer("multiplier", layer.multiplier[:, None, None].clone())

    def forward(self, q):
        """The sums a = W q + b: (B, in, h, w) -> (B, out, h', w')."""
        return convolve(self, q, self.weight, self.bias)


class IntegerHyperSynthesis(nn.Module):
    """h_s: the quantized network after `freeze_h_s`, or as a checkpoint gives it.

    Raises LicError before that.
    """

    def __init__(self, h_s):
        super().__init__()
        self.layers = nn.ModuleList(IntegerConvolution(layer) for layer in h_s_layers(h_s))

    def forward(self, z_hat):
        """z_hat (B, Z, h, w), integers -> mean, table index, both (B, M, 4h, 4w); all float64."""
        q = z_hat
        for layer in self.layers[:-1]:
            q = torch.round(F.leaky_relu(layer(q), SLOPE) * layer.multiplier).clamp(*WIDE)
        last = self.layers[-1]
        mean, index = torch.round(last(q) * last.multiplier).chunk(2, 1)
        return mean * MEAN_UNIT, index.clamp(0, SCALE_LEVELS - 1)
