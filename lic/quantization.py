"""Weights in 8 bits, activations in 8 or 16: uniform, zero stays zero, simulated in floating point.

    q = clamp(round(v / s), low, high)        v_hat = s q

Weights: int8 in [-127, 127], one scale an output channel (axis 0 of Conv2d, 1 of
ConvTranspose2d), that of the largest weight. Activations: one scale a tensor, [-128, 127], or
[-32, 223] after a leaky ReLU, whose negative side is an eighth of the other; in h_s 16 bits, two such digits.
The scales of activations are chosen for the least squared error over a grid of clipping points; in g_a nothing is
clipped, since a clipped activation there can spoil a picture and y is rounded anyway. Then they are trained with the
rest (Esser et al., "Learned step size quantization", arXiv:1902.08153); those of 16 bits are not, they hold twice the
largest value. Round half to even.
Weights are floats until the training is over; rounding.py then puts them on their grids. On disk they are int8 tensors,
in memory floats on the int8 grid, so that training and inference are the same code. Only h_s, which decides how a file
is read, is also computed in integers: integer.py.

What stays float, and why:
    GDN      its sums of squares span too many octaves for 8 bits; a few % of the parameters
    y, y_hat the inputs of h_a.conv1 and g_s.conv1: one 8-bit scale a tensor would be coarser than the codec's own
             quantization step, and drown the channels of y that hardly move
    gains    they are the quantization steps of y
    pixels   the input of g_s.conv4, which makes them, unless `quantize.py --float-inputs` says otherwise
    prior_z  only its tables matter after training
    biases   one number a channel
"""

import torch
from torch import nn
from torch.nn import functional as F

from lic.entropy import round_ste
from lic.files import LicError
from lic.gdn import IGDN, PEDESTAL
from lic.pruning import GROUPS, channel_axes, watch

SIGNED, LEAKY, WEIGHT = (-128, 127), (-32, 223), (-127, 127)
WIDE = (257 * LEAKY[0], 257 * LEAKY[1])  # 16 bits: 256 * high + low, both in LEAKY, so that 8-bit kernels can compute with them
INPUTS = {  # layer: integer range of its input; None where no quantizer is needed
    "g_a.conv1": None,  # pixels less a constant: 8 bits already
    "g_a.conv2": SIGNED, "g_a.conv3": SIGNED, "g_a.conv4": SIGNED,
    "h_a.conv1": None,  # y, see above
    "h_a.conv2": LEAKY, "h_a.conv3": LEAKY,
    "h_s.conv1": None,  # z_hat: integers already
    "h_s.conv2": WIDE, "h_s.conv3": WIDE,  # they say how y is coded: what is lost here each symbol pays
    "g_s.conv1": None,  # y_hat, see above
    "g_s.conv2": SIGNED, "g_s.conv3": SIGNED, "g_s.conv4": SIGNED,
}  # fmt: skip

EIGHT_BIT = [name for name, input_range in INPUTS.items() if input_range in (SIGNED, LEAKY)]  # these may stay float instead
CLIPPED = [name for name in EIGHT_BIT if not name.startswith("g_a")]  # rare values may be


def fake_quantize(v, scale, low, high):
    """Nearest representable value s * q; straight-through inside the range, no gradient outside."""
    return round_ste(v / scale).clamp(low, high) * scale


def largest_scale(v, low, high):
    """Scale of each row at which nothing is clipped: v (R, N) -> (R,)."""
    return torch.where(v > 0, v / high, v / low).amax(1).clamp(min=1e-8)


def least_error_scale(v, low, high):
    """Scale of each row with the least squared error over 40 clipping points: v (R, N) -> (R,)."""
    largest = largest_scale(v, low, high)
    best, least = largest, torch.full_like(largest, torch.inf)
    for fraction in torch.linspace(0.22, 1, 40):
        scale = fraction * largest
        error = (fake_quantize(v, scale[:, None], low, high) - v).square().sum(1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


class ScaleGradient(torch.autograd.Function):
    """v unchanged; its gradient times `factor`."""

    @staticmethod
    def forward(ctx, v, factor):
        ctx.factor = factor
        return v.view_as(v)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class _Quantized:
    """Adds to a convolution the scales of its weight and its input, and quantizes both in forward."""

    def attach(self, layer, input_range):
        self.weight, self.bias, self.input_range = layer.weight, layer.bias, input_range
        channels = layer.weight.shape[self.out_axis]
        shape = [channels if axis == self.out_axis else 1 for axis in range(4)]
        self.register_buffer("weight_scale", torch.zeros(shape))  # 0: the weights are not rounded yet
        if input_range in (SIGNED, LEAKY):
            self.input_scale = nn.Parameter(torch.ones(()))
        else:  # not used, or so fine that there is nothing to gain by training it
            self.register_buffer("input_scale", torch.ones(()))
        return self

    def attach_integers(self):
        """Room for what integer.freeze_h_s derives; only h_s has it."""
        self.register_buffer("integer_bias", torch.zeros(self.out_channels, dtype=torch.int64))
        self.register_buffer("multiplier", torch.zeros(self.out_channels, dtype=torch.float64))

    def integer_weight(self):
        """The int8 values of the weight, as float64. Raises LicError before they are rounded."""
        check_rounded(self.weight_scale)
        return torch.round(self.weight.detach() / self.weight_scale).clamp(*WEIGHT).double()

    def quantized_input(self, x):
        if not self.input_range:
            return x
        # its gradient sums over x; without this factor, LSQ's, it would drown the others when their norm is clipped
        scale = ScaleGradient.apply(self.input_scale, (x.numel() * self.input_range[1]) ** -0.5)
        # in float32 at least: bf16 has no room for both the integer and its fraction
        return fake_quantize(x.to(torch.promote_types(x.dtype, torch.float32)), scale, *self.input_range)


class QuantizedConv2d(_Quantized, nn.Conv2d):
    out_axis = 0

    def forward(self, x):
        return F.conv2d(self.quantized_input(x), self.weight, self.bias, self.stride, self.padding)


class QuantizedConvTranspose2d(_Quantized, nn.ConvTranspose2d):
    out_axis = 1

    def forward(self, x):
        x = self.quantized_input(x)
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding, self.output_padding)


@torch.no_grad()
def equalize(model, x):
    """Balance the channels of each layer's input between the activation and the weights that read it, in place.

    One scale serves a whole input and one a whole row of weights: a channel a tenth as large as the others has a tenth
    of their 256 steps, and a channel a hundred times as large magnifies the error of its weights. Dividing
    channel c by s_c and multiplying what reads it by s_c changes nothing in exact arithmetic, as long as beta stays above its
    bound, and the division costs nothing: GDN's beta_c and gamma[c] take s_c^2, the inverse gain takes s_c, and a leaky ReLU
    passes it to the layer before.

        s_c = sqrt(largest |input| / largest |weight|), divided by the geometric mean over the channels

    over the images x (B, 3, H, W). Xiao et al., "SmoothQuant", arXiv:2211.10438, with alpha = 1/2; through a
    rectifier: Nagel et al., "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721.
    """
    readers = {group: used_by[0] for group, (_, _, used_by) in GROUPS.items() if group != "z"}  # z is what is coded
    largest = watch(model, x, readers.values(), lambda v: v.abs().amax((0, 2, 3)))
    for group, name in readers.items():
        reader, (made_by, normalised_by, _) = model.get_submodule(name), GROUPS[group]
        axis = channel_axes(reader)[1]
        peak = torch.stack(largest[name]).amax(0)
        alive = peak > 1e-6
        s = torch.sqrt(peak / reader.weight.abs().transpose(0, axis).amax((1, 2, 3)).clamp(min=1e-6))
        s = torch.where(alive, (s / s[alive].log().mean().exp()).clamp(1e-2, 1e2), 1)
        reader.weight.mul_(along(axis, s))
        if group == "y":
            model.log_inverse_gain.sub_(s.log())
        elif normalised_by:
            gdn = model.get_submodule(normalised_by)
            beta, gamma = gdn.coefficients()
            power = s**-2 if isinstance(gdn, IGDN) else s**2
            gdn.beta.copy_(torch.sqrt(beta * power + PEDESTAL))
            gdn.gamma.copy_(torch.sqrt(gamma * power[:, None] + PEDESTAL))
        else:
            layer = model.get_submodule(made_by)
            layer.weight.div_(along(channel_axes(layer)[0], s))
            layer.bias.div_(s)


def along(axis, v):
    """A vector as a 4-d tensor that broadcasts along `axis` of a kernel."""
    return v.view([-1 if k == axis else 1 for k in range(4)])


@torch.no_grad()
def input_scales(model, x, clipped=CLIPPED):
    """Scales of the inputs of a float model's layers over the images x (B, 3, H, W) at every level: {layer: ()}.

    clipped: the layers whose scale has the least squared error. In the others it holds the largest value, in those of 16
    bits twice that; the largest value is one of a few images', so x should be some hundred images.
    """

    def summary(v):
        sample = v.flatten()[:: v.numel() // 5_000 | 1].clone()  # odd, or it would see even columns only; a view would keep all of v
        return sample, torch.stack(v.aminmax())

    scales = {}
    for name, parts in watch(model, x, [name for name, input_range in INPUTS.items() if input_range], summary).items():
        samples, extremes = (torch.cat(column)[None] for column in zip(*parts))  # (1, values)
        rule, v = (least_error_scale, samples) if name in clipped else (largest_scale, extremes)
        scales[name] = rule(v, *INPUTS[name])[0] * (2 if INPUTS[name] == WIDE else 1)
    return scales


@torch.no_grad()
def quantize_layers(model, scales=None, names=INPUTS, float_inputs=()):
    """Replace the convolutions called `names`, by default all, by their quantized form, in place.

    scales: from `input_scales`; without it all scales are 1, to be loaded from a state_dict. float_inputs: layers of
    which only the weights are quantized. Raises LicError if one of them is not in EIGHT_BIT.
    """
    others = [name for name in float_inputs if name not in EIGHT_BIT]
    if others:
        raise LicError(f"the inputs of {', '.join(map(str, others))} are not 8 bits anyway, or belong to h_s, which is integers")
    for name in names:
        input_range = None if name in float_inputs else INPUTS[name]
        network, layer_name = name.split(".")
        layer = model.get_submodule(name)
        form = QuantizedConvTranspose2d if isinstance(layer, nn.ConvTranspose2d) else QuantizedConv2d
        quantized = form(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        quantized.output_padding = layer.output_padding
        quantized.attach(layer, input_range).train(layer.training)
        if scales and input_range:
            quantized.input_scale.copy_(scales[name])
        if network == "h_s":
            quantized.attach_integers()
        setattr(model.get_submodule(network), layer_name, quantized)
    model.quantization = {"weight_bits": 8, "activation_bits": 8, "h_s": "16-bit integers"}
    if float_inputs:
        model.quantization["float_inputs"] = list(float_inputs)


def check_rounded(weight_scale):
    if not (weight_scale > 0).all():
        raise LicError("the weights are not on their 8-bit grids yet: call rounding.round_weights when training is over")


def pack(state_dict):
    """State with int8 weights, for the disk. Raises LicError before they are rounded."""
    packed = dict(state_dict)
    for name in [n for n in state_dict if n.endswith(".weight_scale")]:
        check_rounded(state_dict[name])
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
