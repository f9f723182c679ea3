"""Faster forms of the same networks, for coding on a CPU. All works without this file, slower.

GDN runs in place, some positions at a time. 8-bit convolutions run on int8 kernels, which compute
the same integers as the simulation in eight_bits.py: a transposed one as four small ordinary ones,
one for each phase of the output. The last layer of g_s, too, becomes an ordinary one.

torch has the kernels on x86, outside its documented interface (they serve torch.compile). So they
are looked for and tried (`available`), and where they are missing, or wrong, the simulation
computes the codec. In g_a, h_a and g_s the result differs from the simulation in the last bits of a
float32; in h_s, which must be exact everywhere, in none.
"""

import functools
import sys
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from lic.codec.eight_bits import DIGIT, SIGNED, WIDE, QuantizedConvolution
from lic.codec.gdn import GDN, IGDN
from lic.codec.integer import h_s_layers
from lic.codec.structure import phase_kernels, subpixel

IN_CACHE = 2**18  # numbers of x: 1 MiB, which stays in a core's cache
OUTPUTS = 256  # channels that one kernel makes: with 384 each takes twice as long


class CachedGDN(nn.Module):
    """A GDN or IGDN in place: what is passed in is what is returned, changed.

    Some positions at a time, so that their energies never leave the cache.
    """

    def __init__(self, gdn):
        super().__init__()
        self.gdn = gdn
        beta, gamma = gdn.coefficients()
        self.beta, self.gamma = beta.detach(), gamma.detach().T.contiguous()  # gamma: (in, out)
        self.root = torch.sqrt if isinstance(gdn, IGDN) else torch.rsqrt

    def forward(self, x):
        """(B, C, H, W), channels last in memory."""
        if x.dtype != torch.float32:  # bf16 has kernels of its own
            return self.gdn(x)
        channels = x.shape[1]
        positions = x.permute(0, 2, 3, 1).view(-1, channels)  # of the same memory
        for block in positions.split(max(1, IN_CACHE // channels)):
            energy = torch.addmm(self.beta, block * block, self.gamma)
            block.mul_(self.root(energy, out=energy))
        return x


class Int8Kernel:
    """An ordinary convolution on torch's kernel.

        output = (sum of weight * (q - zero_point)) * weight_scale * input_scale + bias

    weight: integers (out, in, kh, kw); weight_scale, bias: (out,).
    """

    def __init__(self, weight, weight_scale, bias, input_scale, zero_point, stride, padding):
        self.weight_scale, self.bias = weight_scale, bias
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int32)
        self.input_scale, self.zero_point = input_scale, zero_point
        self.stride, self.padding = stride, padding
        # fmt: off
        self.packed = torch.ops.onednn.qconv_prepack(
            weight.to(torch.int8).contiguous(), weight_scale, input_scale, zero_point,
            stride, padding, (1, 1), 1, None)
        # fmt: on

    def __call__(self, q, dtype):
        """q (B, in, h, w) uint8, channels last -> (B, out, h', w') of dtype."""
        # fmt: off
        return torch.ops.onednn.qconv2d_pointwise(
            q, self.input_scale, self.zero_point, self.packed, self.weight_scale,
            self.weight_zero, self.bias, self.stride, self.padding,
            (1, 1), 1, 1.0, 0, dtype, "none", [], "")
        # fmt: on


class Int8Convolution(nn.Module):
    """A quantized layer on Int8Kernels; returns bf16 under autocast.

    It rounds its input to q = clamp(round(x / input_scale), *limits). weight_scale, bias: (out,).
    """

    def __init__(self, layer, limits, input_scale, weight_scale, bias):
        super().__init__()
        low, high = limits
        self.zero_point, self.largest = -low, high - low  # the kernel takes 0 to 255
        self.input_scale, self.channels = input_scale, layer.out_channels
        self.transposed = layer.transposed
        weight = layer.integer_weight()
        weight_scale, bias = weight_scale.detach(), bias.detach()
        self.largest_sum = 0  # that the kernels can meet
        self.kernels_of_channels = []  # each makes some channels,
        self.kernels_of_phases = []  # or (row, column, kernel): a phase of a transposed convolution

        def make_kernel(part, channels, stride, padding):
            sums = part.abs().flatten(1).sum(1)
            self.largest_sum = max(self.largest_sum, self.largest * sums.max().item())
            return Int8Kernel(
                part, weight_scale[channels], bias[channels], input_scale, self.zero_point,
                stride, padding,
            )  # fmt: skip

        if self.transposed:
            for row, column, part in phase_kernels(weight):
                kernel = make_kernel(part, slice(None), (1, 1), (1, 1))
                self.kernels_of_phases.append((row, column, kernel))
        else:
            for start in range(0, self.channels, OUTPUTS):
                channels = slice(start, start + OUTPUTS)
                kernel = make_kernel(weight[channels], channels, layer.stride, layer.padding)
                self.kernels_of_channels.append(kernel)

    def forward(self, x):
        """(B, in, h, w) -> what the layer makes of it, (B, out, h', w')."""
        # in float32: bf16 has no room for both the integer and its fraction
        q = x.float().div(self.input_scale).round_().add_(self.zero_point)
        q = q.clamp_(0, self.largest).to(torch.uint8).contiguous(memory_format=torch.channels_last)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        if not self.transposed:
            parts = [kernel(q, dtype) for kernel in self.kernels_of_channels]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        B, _, h, w = q.shape
        size = B, self.channels, 2 * h, 2 * w
        made = torch.empty(size, dtype=dtype, memory_format=torch.channels_last)
        for row, column, kernel in self.kernels_of_phases:
            # padded on all sides, the kernels of odd rows or columns begin one input too early
            made[:, :, row::2, column::2] = kernel(q, dtype)[:, :, row:, column:]
        return made


def int8_layer(layer):
    """The Int8Convolution that gives what the quantized layer gives."""
    weight_scale = layer.weight_scale.flatten()
    return Int8Convolution(
        layer, layer.input_range, layer.input_scale.item(), weight_scale, layer.bias
    )


class Int8IntegerConvolution(nn.Module):
    """A layer of the integer h_s with its sums in int32, the same bits: one for each 8-bit digit.

    exact: the IntegerConvolution of `layer`. The kernel returns sums in float32, which holds every
    integer up to 2^24: where `largest_sum` is more, it must not be used.
    """

    def __init__(self, exact, layer):
        super().__init__()
        ones = torch.ones(layer.out_channels)
        self.kernel = Int8Convolution(layer, DIGIT, 1.0, ones, torch.zeros_like(ones))
        self.largest_sum = self.kernel.largest_sum
        self.multiplier, self.bias = exact.multiplier, exact.bias[:, None, None]

    def forward(self, q):
        high = torch.floor((q - DIGIT[0]) / 256)
        low = q - 256 * high
        with torch.autocast("cpu", enabled=False):
            high_sums, low_sums = self.kernel(torch.cat([high, low])).chunk(2)
        return high_sums.double().mul_(256).add_(low_sums).add_(self.bias)


class LastConvolution(nn.Module):
    """A float transposed convolution to few channels as an ordinary one and `pixel_shuffle`.

    (B, C, h, w) -> (B, 3, 2h, 2w). That takes 36 products for 25, and, with so few output channels,
    half the time (tools/benchmark.py).
    """

    def __init__(self, layer):
        super().__init__()
        weight = subpixel(layer.weight.detach()).to(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", layer.bias.detach().repeat_interleave(4))

    def forward(self, x):
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, padding=1), 2)


def faster(network):
    """g_a, h_a or g_s in its faster form; layers that have none are shared with `network`."""
    modules = OrderedDict()
    for name, layer in network.named_children():
        if isinstance(layer, QuantizedConvolution) and layer.input_range:
            modules[name] = int8_layer(layer) if available() else layer
        elif isinstance(layer, GDN):
            modules[name] = CachedGDN(layer)
        elif getattr(layer, "transposed", False) and layer.out_channels == 3:
            modules[name] = LastConvolution(layer)
        else:
            modules[name] = layer
    return nn.Sequential(modules)


def speed_up_h_s(exact, h_s):
    """Replace layers of an IntegerHyperSynthesis, in place, by what gives the same bits sooner.

    h_s: the quantized network that it was made of.
    """
    if not available():
        tell_of_simulation()
        return
    for k, layer in enumerate(h_s_layers(h_s)):
        if layer.input_range == WIDE:
            quick = Int8IntegerConvolution(exact.layers[k], layer)
            if quick.largest_sum <= 2**24:
                exact.layers[k] = quick


@functools.cache
def tell_of_simulation():
    print(
        "note: torch has no exact int8 convolution on this CPU; 8 bits are simulated, "
        "each file is decoded to the same symbols, no faster than with floats",
        file=sys.stderr,
    )


@functools.cache
def available():
    """Does this torch have the kernel, and are its sums right where they are largest?"""
    try:
        return kernel_is_exact()
    except (AttributeError, RuntimeError, TypeError):
        return False


@torch.no_grad()
def kernel_is_exact():
    """Does it give what the simulation gives? Its sums saturate without VNNI instructions."""
    transposed = nn.utils.skip_init(
        nn.ConvTranspose2d, 64, 8, 5, stride=2, padding=2, output_padding=1
    )
    layer = QuantizedConvolution(transposed, SIGNED)
    layer.weight_scale.fill_(1)
    layer.weight.fill_(127)
    layer.weight[::3] = -127
    layer.bias.zero_()
    x = torch.full((1, 64, 8, 8), 127.0)
    x[:, ::3] = -128
    return torch.equal(int8_layer(layer)(x), layer(x))
