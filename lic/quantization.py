"""8-bit weights and activations: uniform, symmetric, simulated in floating point.

    q = clamp(round(v / s), low, high)        v_hat = s q

Weights: int8 in [-127, 127], one scale an output channel (axis 0 of Conv2d, 1 of
ConvTranspose2d). Activations: one scale a tensor, [-128, 127], or [0, 255] after a ReLU.
Scales are chosen for the least squared error over a grid of clipping points. Round half to even.
On disk the weights are int8 tensors; in memory they are floats on the int8 grid, so that training
with straight-through gradients and inference are the same code. Only h_s, which decides how a file is
read, is also computed in integers: integer.py.

What stays float, and why:
    GDN      its sums of squares span too many octaves for 8 bits; a few % of the parameters
    y_hat    the input of g_s.conv1: one 8-bit scale a tensor would be coarser than the codec's own
             quantization step, which differs between channels and levels
    gains    they are the quantization steps of y
    prior_z  only its tables matter after training
    biases   one number a channel
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.entropy import round_ste

SIGNED, UNSIGNED, WEIGHT = (-128, 127), (0, 255), (-127, 127)
INPUTS = {  # layer: integer range of its input; None where no quantizer is needed
    "g_a.conv1": None,  # pixels less a constant: 8 bits already
    "g_a.conv2": SIGNED, "g_a.conv3": SIGNED, "g_a.conv4": SIGNED,
    "h_a.conv1": SIGNED, "h_a.conv2": UNSIGNED, "h_a.conv3": UNSIGNED,
    "h_s.conv1": None,  # z_hat: integers already
    "h_s.conv2": UNSIGNED, "h_s.conv3": UNSIGNED,
    "g_s.conv1": None,  # y_hat, see above
    "g_s.conv2": SIGNED, "g_s.conv3": SIGNED, "g_s.conv4": SIGNED,
}  # fmt: skip


def fake_quantize(v, scale, low, high):
    """Nearest representable value s * q; straight-through inside the range, no gradient outside."""
    return round_ste(v / scale).clamp(low, high) * scale


def least_error_scale(v, low, high):
    """Scale of each row with the least squared error over 40 clipping points: v (R, N) -> (R,)."""
    largest = torch.where(v > 0, v / high, v / low if low else 0).amax(1).clamp(min=1e-8)  # nothing is clipped
    best, least = largest, torch.full_like(largest, torch.inf)
    for fraction in torch.linspace(0.22, 1, 40):
        scale = fraction * largest
        error = (fake_quantize(v, scale[:, None], low, high) - v).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


class _Quantized:
    """Adds to a convolution the scales of its weight and its input, and quantizes both in forward."""

    def attach(self, layer, input_range):
        self.weight, self.bias, self.input_range = layer.weight, layer.bias, input_range
        channels = layer.weight.shape[self.out_axis]
        shape = [channels if axis == self.out_axis else 1 for axis in range(4)]
        self.register_buffer("weight_scale", torch.ones(shape))
        self.register_buffer("input_scale", torch.ones(()))
        return self

    def attach_integers(self):
        """Room for what integer.freeze_h_s derives; only h_s has it."""
        self.register_buffer("integer_bias", torch.zeros(self.out_channels, dtype=torch.int64))
        self.register_buffer("multiplier", torch.zeros(self.out_channels, dtype=torch.float64))

    def integer_weight(self):
        """The int8 values of the weight, as float64."""
        return torch.round(self.weight.detach() / self.weight_scale).clamp(*WEIGHT).double()

    def operands(self, x):
        if self.input_range:
            x = fake_quantize(x, self.input_scale, *self.input_range)
        return x, fake_quantize(self.weight, self.weight_scale, *WEIGHT)


class QuantizedConv2d(_Quantized, nn.Conv2d):
    out_axis = 0

    def forward(self, x):
        x, weight = self.operands(x)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class QuantizedConvTranspose2d(_Quantized, nn.ConvTranspose2d):
    out_axis = 1

    def forward(self, x):
        x, weight = self.operands(x)
        return F.conv_transpose2d(x, weight, self.bias, self.stride, self.padding, self.output_padding)


@torch.no_grad()
def input_scales(model, x):
    """Least-error scales of the inputs of a float model's layers: {layer: ()} over the images x
    (B, 3, H, W) at every level."""
    seen = {name: [] for name, input_range in INPUTS.items() if input_range}

    def observe(name):
        def hook(layer, inputs):
            values = inputs[0].flatten()
            stride = len(values) // 100_000 | 1  # odd, or it would see only even columns
            seen[name].append(values[::stride].clone())

        return model.get_submodule(name).register_forward_pre_hook(hook)

    hooks = [observe(name) for name in seen]
    for level in range(len(model.lambdas)):
        model(x, torch.full((len(x),), float(level)))
    for hook in hooks:
        hook.remove()
    return {name: least_error_scale(torch.cat(values)[None], *INPUTS[name])[0] for name, values in seen.items()}


@torch.no_grad()
def quantize_layers(model, scales=None):
    """Replace every convolution by its quantized form, in place.

    scales: from `input_scales`; without it all scales are 1, to be loaded from a state_dict.
    """
    for name, input_range in INPUTS.items():
        network, layer_name = name.split(".")
        layer = model.get_submodule(name)
        form = QuantizedConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else QuantizedConv2d
        quantized = form(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        quantized.output_padding = layer.output_padding
        quantized.attach(layer, input_range)
        if scales:
            rows = layer.weight.transpose(0, form.out_axis).flatten(1)  # (out, in * k * k)
            quantized.weight_scale.copy_(least_error_scale(rows, *WEIGHT).view_as(quantized.weight_scale))
            if input_range:
                quantized.input_scale.copy_(scales[name])
        if network == "h_s":
            quantized.attach_integers()
        setattr(model.get_submodule(network), layer_name, quantized)
    model.quantization = {"weight_bits": 8, "activation_bits": 8, "h_s": "integer"}


def pack(state_dict):
    """State with int8 weights, for the disk."""
    packed = dict(state_dict)
    for name in [n for n in state_dict if n.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        q = torch.round(state_dict[weight] / state_dict[name]).clamp(*WEIGHT)
        packed[weight] = q.to(torch.int8).contiguous()
    return packed


def unpack(packed):
    """State with float weights on the int8 grid: the inverse of `pack`."""
    state_dict = dict(packed)
    for name in [n for n in packed if n.endswith(".weight_scale")]:
        weight = name.removesuffix("_scale")
        state_dict[weight] = packed[weight].float() * packed[name]
    return state_dict
