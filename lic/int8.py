"""The convolutions of a quantized codec on int8 kernels: the same integers as the simulation in quantization.py, faster.

torch has such a kernel on x86, outside its documented interface (it serves torch.compile). So it is looked for and tried
(`available`), and where it is missing, or wrong, the simulation computes the codec. What it gives differs from the simulation in the
last bits of a float32: it sums integers. h_s, which must be exact everywhere, is not computed here but in integer.py.
"""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

from lic.quantization import QuantizedConvTranspose2d


class Int8Convolution(nn.Module):
    """Inference with the int8 weights of a quantized layer; returns bf16 under autocast, else float32.

    The kernel has no transposed form that doubles the size. A transposed convolution of stride 2 is an ordinary one that
    makes four channels of each, one for each position in a 2x2 block of the output, which are then interleaved.
    """

    def __init__(self, layer):
        super().__init__()
        low, high = layer.input_range
        self.zero_point, self.largest = -low, high - low  # the kernel takes 0 to 255
        self.input_scale = layer.input_scale.item()
        self.transposed = isinstance(layer, QuantizedConvTranspose2d)
        weight, repeats = layer.integer_weight(), 1
        self.stride, self.padding = layer.stride, layer.padding
        if self.transposed:
            weight, repeats = subpixel(weight), 4
            self.stride, self.padding = (1, 1), (1, 1)
        self.weight_scale = layer.weight_scale.detach().flatten().repeat_interleave(repeats)
        self.bias = layer.bias.detach().repeat_interleave(repeats)
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int32)
        self.packed = torch.ops.onednn.qconv_prepack(
            weight.to(torch.int8).contiguous(), self.weight_scale, self.input_scale, self.zero_point,
            self.stride, self.padding, (1, 1), 1, None)  # fmt: skip

    def forward(self, x):
        # in float32: bf16 has no room for both the integer and its fraction
        q = x.float().mul(1 / self.input_scale).round_().add_(self.zero_point).clamp_(0, self.largest).to(torch.uint8)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        out = torch.ops.onednn.qconv2d_pointwise(
            q.contiguous(memory_format=torch.channels_last), self.input_scale, self.zero_point, self.packed,
            self.weight_scale, self.weight_zero, self.bias, self.stride, self.padding, (1, 1), 1,
            1.0, 0, dtype, "none", [], "")  # fmt: skip
        return F.pixel_shuffle(out, 2) if self.transposed else out


def subpixel(weight):
    """(in, out, 5, 5) of a transposed convolution with stride 2, padding 2 and output padding 1 -> (4 out, in, 3, 3) of
    the convolution with stride 1 and padding 1 whose output `pixel_shuffle` turns into the same image."""
    c_in, c_out = weight.shape[:2]
    # Output 2a + r takes input a + d - 1 through tap r + 4 - 2d, for d = 0, 1, 2; there is no tap 5.
    taps = F.pad(weight, (0, 1, 0, 1)).view(c_in, c_out, 3, 2, 3, 2).flip(2, 4)  # (in, out, d, r, d', r')
    return taps.permute(1, 3, 5, 0, 2, 4).reshape(4 * c_out, c_in, 3, 3)


def convert(network):
    """A copy of g_a, h_a or g_s of a quantized codec on the CPU, its 8-bit convolutions on int8 kernels where `available`."""
    network = copy.deepcopy(network)
    if available():
        for name, layer in list(network.named_children()):
            if getattr(layer, "input_range", None):
                setattr(network, name, Int8Convolution(layer))
    return network


@functools.cache
def available():
    """Does this torch have the kernel, and are its sums right where they are largest? Without VNNI instructions they saturate."""
    layer = QuantizedConvTranspose2d(64, 8, 5, stride=2, padding=2, output_padding=1)
    layer.attach(layer, (-128, 127))
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
