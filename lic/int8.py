"""Faster forms of the same networks, for coding on a CPU.

8-bit convolutions run on int8 kernels, which compute the same integers as the simulation in quantization.py, and the
last layer of g_s as an ordinary convolution. torch has such a kernel on x86, outside its documented interface (it
serves torch.compile). So it is looked for and tried (`available`), and where it is missing, or wrong, the simulation
computes the codec. In g_a, h_a and g_s the result differs from the simulation in the last bits of a float32; in h_s,
which must be exact everywhere, in none.
"""

import functools
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from lic.integer import IntegerHyperSynthesis
from lic.quantization import LEAKY, QuantizedConvTranspose2d


class Int8Convolution(nn.Module):
    """Inference with the int8 weights of a quantized layer; returns bf16 under autocast, else float32.

    The kernel has no transposed form that doubles the size, so `subpixel` turns such a layer into an ordinary one.
    integers: the input already is integers in LEAKY, and the output is the integers of the sums, float32, without a bias.
    """

    def __init__(self, layer, integers=False):
        super().__init__()
        low, high = LEAKY if integers else layer.input_range
        self.zero_point, self.largest = -low, high - low  # the kernel takes 0 to 255
        self.input_scale = 1.0 if integers else layer.input_scale.item()
        self.integers = integers
        self.transposed = isinstance(layer, QuantizedConvTranspose2d)
        weight, repeats = layer.integer_weight(), 1
        self.stride, self.padding = layer.stride, layer.padding
        if self.transposed:
            weight, repeats = subpixel(weight), 4
            self.stride, self.padding = (1, 1), (1, 1)
        self.weight_scale = layer.weight_scale.detach().flatten().repeat_interleave(repeats)
        self.bias = layer.bias.detach().repeat_interleave(repeats)
        if integers:
            self.weight_scale, self.bias = torch.ones_like(self.weight_scale), torch.zeros_like(self.bias)
        self.largest_sum = self.largest * weight.abs().flatten(1).sum(1).max().item()
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qconv_prepack(
            weight.to(torch.int8).contiguous(), self.weight_scale, self.input_scale, self.zero_point,
            self.stride, self.padding, (1, 1), 1, None)  # fmt: skip

    def forward(self, x):
        """(B, in, h, w) -> what the layer makes of it, (B, out, h', w')."""
        # in float32: bf16 has no room for both the integer and its fraction
        q = x.float().div(self.input_scale).round_().add_(self.zero_point).clamp_(0, self.largest).to(torch.uint8)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") and not self.integers else torch.float32
        out = torch.ops.onednn.qconv2d_pointwise(
            q.contiguous(memory_format=torch.channels_last), self.input_scale, self.zero_point, self.packed,
            self.weight_scale, self.weight_zero, self.bias, self.stride, self.padding, (1, 1), 1,
            1.0, 0, dtype, "none", [], "")  # fmt: skip
        return F.pixel_shuffle(out, 2) if self.transposed else out


class Int8HyperSynthesis(IntegerHyperSynthesis):
    """h_s in exact integers, the sums of its two larger layers in int32: z_hat (B, Z, h, w) -> mean and table index, both
    (B, M, 4h, 4w) float64, the same bits as IntegerHyperSynthesis. The two 8-bit digits of each input have sums of their own.
    The kernel returns them in float32, which holds every integer up to 2^24; a layer whose sums could be larger, and any
    layer without the kernel, stays in float64."""

    def __init__(self, h_s):
        super().__init__(h_s)
        self.kernels = {}
        if available():
            for k, layer in ((2, h_s.conv2), (3, h_s.conv3)):
                kernel = Int8Convolution(layer, integers=True)
                if kernel.largest_sum <= 2**24:
                    self.kernels[k] = kernel

    def sums(self, k, q):
        if k not in self.kernels:
            return super().sums(k, q)
        high = torch.floor((q - LEAKY[0]) / 256)
        high, low = self.kernels[k](torch.cat([high, q - 256 * high])).double().chunk(2)
        return 256 * high + low + self.get_buffer(f"bias{k}")[:, None, None]


class LastConvolution(nn.Module):
    """A float transposed convolution, (B, C, h, w) -> (B, 3, 2h, 2w), as an ordinary one and `pixel_shuffle`. That takes
    36 products for 25, and, with so few output channels, half the time (tests/benchmark.py)."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("weight", subpixel(layer.weight.detach()).to(memory_format=torch.channels_last))
        self.register_buffer("bias", layer.bias.detach().repeat_interleave(4))

    def forward(self, x):
        return F.pixel_shuffle(F.conv2d(x, self.weight, self.bias, padding=1), 2)


def subpixel(weight):
    """(in, out, 5, 5) of a transposed convolution with stride 2, padding 2 and output padding 1 -> (4 out, in, 3, 3) of
    the convolution with stride 1 and padding 1 whose output `pixel_shuffle` turns into the same image: it makes four
    channels of each, one for each position in a 2x2 block of the output."""
    c_in, c_out = weight.shape[:2]
    # Output 2a + r takes input a + d - 1 through tap r + 4 - 2d, for d = 0, 1, 2; there is no tap 5.
    taps = F.pad(weight, (0, 1, 0, 1)).view(c_in, c_out, 3, 2, 3, 2).flip(2, 4)  # (in, out, d, r, d', r')
    return taps.permute(1, 3, 5, 0, 2, 4).reshape(4 * c_out, c_in, 3, 3)


def convert(network):
    """g_a, h_a or g_s on the CPU in its faster form; layers that have none are shared with `network`, which stays as it is."""

    def faster(layer):
        if getattr(layer, "input_range", None):
            return Int8Convolution(layer) if available() else layer
        return LastConvolution(layer) if isinstance(layer, nn.ConvTranspose2d) and layer.out_channels == 3 else layer

    return nn.Sequential(OrderedDict((name, faster(layer)) for name, layer in network.named_children()))


@functools.cache
def available():
    """Does this torch have the kernel, and are its sums right where they are largest? Without VNNI instructions they saturate."""
    layer = QuantizedConvTranspose2d(64, 8, 5, stride=2, padding=2, output_padding=1)
    layer.attach(layer, (-128, 127)).weight_scale.fill_(1)
    x = torch.full((1, 64, 8, 8), 127.0)
    x[:, ::3] = -128
    with torch.no_grad():
        layer.weight.fill_(127)
        layer.weight[::3] = -127
        layer.bias.zero_()
        try:
            return torch.equal(Int8Convolution(layer)(x), layer(x))
        except (AttributeError, RuntimeError, TypeError):
            return False
