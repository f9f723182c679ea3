"""Weights in 8 bits, activations in 8 or 16: uniform, zero stays zero, simulated in floating point.

    q = clamp(round(v / s), low, high)        v_hat = s q        (round half to even)

Weights: int8 in [-127, 127], one scale an output channel, that of its largest weight (axis 0 of a
convolution's weight, axis 1 of a transposed one's). Activations: one scale a tensor; which input
has how many bits is said in `input_ranges`: 8, in h_s 16. On disk weights are int8 tensors
(`pack`), in memory floats on the int8 grid, so that training and inference are the same code. Only
of h_s, which decides how a file is read, do the integers belong to the format: integer.py. How the
scales and the integers are found is not a decoder's business: shrink/quantization.py,
shrink/rounding.py.

What stays float, and why:
    GDN      its sums of squares span too many octaves for 8 bits; a few % of the parameters
    y, y_hat the inputs of h_a.conv1 and g_s.conv1: one 8-bit scale a tensor would be coarser than
             the codec's own quantization step, and drown the channels of y that hardly move
    gains    they are the quantization steps of y
    pixels   the input of g_s.conv4, which makes them, unless `quantize.py --float-inputs` says
             otherwise
    prior_z  only its tables matter after training
    biases   one number a channel
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.codec import structure
from lic.codec.gradients import round_ste, scale_gradient
from lic.files import LicError

WEIGHT = (-127, 127)
SIGNED = (-128, 127)
LEAKY = (-32, 223)  # after a leaky ReLU, whose negative side is an eighth of the other
# 16 bits are 256 * high + low, two digits: an 8-bit kernel can sum over each of them (fast.py)
DIGIT = (-32, 223)
WIDE = (257 * DIGIT[0], 257 * DIGIT[1])


def input_ranges():
    """{layer: integer range that its input may be rounded to, or None where it never is}."""
    then = {layer.makes: layer.then for layer in structure.LAYERS}
    ranges = {}
    for layer in structure.LAYERS:
        if layer.reads in (structure.IMAGE, "y", "z"):
            # the image has 8 bits already, less a constant; y stays float, see above; z is integers
            ranges[layer.name] = None
        elif layer.network == "h_s":
            # it says how y is coded: what is lost here each symbol pays
            ranges[layer.name] = WIDE
        elif then[layer.reads] == "lrelu":
            ranges[layer.name] = LEAKY
        else:
            ranges[layer.name] = SIGNED
    return ranges


def pixel_layers():
    """Names of the layers that make the picture: their input stays float, if not told otherwise."""
    return [layer.name for layer in structure.LAYERS if layer.makes == structure.IMAGE]


def eight_bit_inputs():
    """Names of the layers whose input is rounded to 8 bits, unless it is to stay float."""
    return [name for name, limits in input_ranges().items() if limits in (SIGNED, LEAKY)]


def fake_quantize(v, scale, low, high):
    """Nearest representable value, scale * q.

    Its gradient for v is 1 inside the range and 0 outside; for the scale it is q - v / scale
    inside and the limit outside (LSQ, see `quantized_input`).
    """
    return round_ste(v / scale).clamp(low, high) * scale


def convolve(layer, x, weight, bias):
    """What the convolution `layer`, transposed or not, would give with other weights."""
    if layer.transposed:
        return F.conv_transpose2d(
            x, weight, bias, layer.stride, layer.padding, layer.output_padding
        )
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


class QuantizedConvolution(nn.Module):
    """A convolution, transposed or not, with the scales of its weight and its input.

    layer: nn.Conv2d or nn.ConvTranspose2d, whose parameters it takes over. input_range: as in
    `input_ranges`. integer: with room for the integers of h_s that integer.py derives.
    """

    def __init__(self, layer, input_range, integer=False):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.transposed, self.stride = layer.transposed, layer.stride
        self.padding, self.output_padding = layer.padding, layer.output_padding
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.input_range = layer.kernel_size, input_range
        out_axis, _ = structure.channel_axes(layer)
        scales = torch.zeros(self.out_channels)  # 0: the weights are not rounded yet
        self.register_buffer("weight_scale", structure.broadcast(scales, out_axis))
        if input_range in (SIGNED, LEAKY):
            self.input_scale = nn.Parameter(torch.ones(()))
        else:  # not used, or so fine that there is nothing to gain by training it
            self.register_buffer("input_scale", torch.ones(()))
        if integer:
            integers = torch.zeros(self.out_channels, dtype=torch.int64)
            self.register_buffer("integer_bias", integers)
            self.register_buffer("multiplier", integers.double())

    def forward(self, x):
        return convolve(self, self.quantized_input(x), self.weight, self.bias)

    def quantized_input(self, x):
        """x rounded to the grid of the layer's input, or x itself where that stays float."""
        if not self.input_range:
            return x
        low, high = self.input_range
        # The gradient of the scale sums over x. Without this factor, LSQ's (Esser et al., "Learned
        # step size quantization", arXiv:1902.08153), it would drown the others when their norm
        # is clipped.
        scale = scale_gradient(self.input_scale, (x.numel() * high) ** -0.5)
        # in float32 at least: bf16 has no room for both the integer and its fraction
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return fake_quantize(x, scale, low, high)

    def integer_weight(self):
        """The int8 values of the weight, as float64. Raises LicError before they are rounded."""
        return integers_of(self.weight.detach(), self.weight_scale).double()


def integers_of(weight, weight_scale):
    """The integers of a rounded weight. Raises LicError if it is not rounded yet."""
    if not (weight_scale > 0).all():
        raise LicError(
            "the weights are not on their 8-bit grids yet: "
            "call rounding.round_weights when training is over"
        )
    return torch.round(weight / weight_scale).clamp(*WEIGHT)


@torch.no_grad()
def quantize_layers(model, scales=None, names=None, float_inputs=()):
    """Replace the convolutions called `names`, by default all, by quantized ones, in place.

    scales: of the inputs, from quantization.input_scales; without it all are 1, to be loaded from
    a state_dict. float_inputs: layers of which only the weights are quantized. Raises LicError if
    one of them has no 8-bit input.
    """
    others = [str(name) for name in float_inputs if name not in eight_bit_inputs()]
    if others:
        raise LicError(
            f"the inputs of {', '.join(others)} are not 8 bits anyway, "
            "or belong to h_s, which is integers"
        )
    for name, input_range in input_ranges().items():
        if names is not None and name not in names:
            continue
        if name in float_inputs:
            input_range = None
        network, layer_name = name.split(".")
        layer = model.get_submodule(name)
        quantized = QuantizedConvolution(layer, input_range, integer=network == "h_s")
        if scales and input_range:
            quantized.input_scale.copy_(scales[name])
        setattr(model.get_submodule(network), layer_name, quantized.train(layer.training))
    model.quantization = {"weight_bits": 8, "activation_bits": 8, "h_s": "16-bit integers"}
    if float_inputs:
        model.quantization["float_inputs"] = list(float_inputs)


def pack(state_dict):
    """State with int8 weights, for the disk. Raises LicError before they are rounded."""
    packed = dict(state_dict)
    for name in [n for n in state_dict if n.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        integers = integers_of(state_dict[weight], state_dict[name])
        packed[weight] = integers.to(torch.int8).contiguous()
    return packed


def unpack(packed):
    """State with float weights on the int8 grid: the inverse of `pack`."""
    state_dict = dict(packed)
    for name in [n for n in packed if n.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        state_dict[weight] = packed[weight].float() * packed[name]
    return state_dict
