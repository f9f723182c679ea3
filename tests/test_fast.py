"""The int8 kernels: the same as the simulation, and not used where they are missing or wrong."""

import copy

import numpy as np
import pytest
import torch
from helpers import WIDTHS, lively_codec, quantized_codec
from torch import nn
from torch.nn import functional as F

from lic.codec import fast
from lic.codec.bitstream import ImageCoder
from lic.codec.eight_bits import SIGNED, WIDE, QuantizedConvolution, eight_bit_inputs
from lic.codec.fast import (
    Int8Convolution,
    Int8IntegerConvolution,
    LastConvolution,
    int8_layer,
)
from lic.codec.integer import IntegerHyperSynthesis
from lic.codec.structure import subpixel
from lic.codec.tables import build_tables
from lic.images import dead_leaves
from lic.metrics import psnr

needs_kernel = pytest.mark.skipif(
    not fast.available(), reason="this torch or this CPU has no exact int8 convolution"
)


@pytest.fixture(scope="module")
def quantized():
    return quantized_codec()


def coder_of(model):
    return ImageCoder(model, {}, "0" * 16)


def kinds(h_s):
    """Which layers of an integer h_s run on the kernels."""
    return [isinstance(layer, Int8IntegerConvolution) for layer in h_s.layers]


def test_the_codec_works_without_fast_kernels(quantized, monkeypatch):
    """Without them a coder writes what one with them reads; g_s differs in last bits."""
    image, tables = dead_leaves(5, 128), build_tables(quantized)
    quick = ImageCoder(quantized, tables, "0" * 16)
    monkeypatch.setattr(fast, "faster", lambda network: network)
    monkeypatch.setattr(fast, "speed_up_h_s", lambda exact, h_s: None)
    plain = ImageCoder(quantized, tables, "0" * 16)
    assert plain.g_s is quantized.g_s and quick.g_s is not quantized.g_s
    decoded = [coder.decode(plain.encode(image, 2)).astype(int) for coder in (quick, plain)]
    assert np.abs(decoded[0] - decoded[1]).max() <= 1


def test_a_transposed_convolution_is_an_ordinary_one_and_a_shuffle():
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(3, 2, 5, 5, generator=generator),
        torch.randn(2, 3, 4, 6, generator=generator),
    )
    expected = F.conv_transpose2d(x, weight, stride=2, padding=2, output_padding=1)
    torch.testing.assert_close(
        F.pixel_shuffle(F.conv2d(x, subpixel(weight), padding=1), 2), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "float_inputs", [None, ["g_s.conv4"]], ids=["float codec", "8-bit weights"]
)
def test_the_last_layer_in_float_is_an_ordinary_convolution(float_inputs):
    model = quantized_codec(float_inputs) if float_inputs else lively_codec()
    last = ImageCoder(model, build_tables(model), "0" * 16).g_s.conv4
    assert isinstance(last, LastConvolution)
    x = torch.randn(2, WIDTHS["g_s.3"], 6, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.g_s.conv4(x)
        torch.testing.assert_close(
            last(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


@needs_kernel
@pytest.mark.parametrize("name", eight_bit_inputs())
def test_a_layer_gives_what_was_simulated(quantized, name):
    layer = quantized.get_submodule(name)
    low, high = layer.input_range
    steps = torch.randint(
        low - 20,
        high + 21,
        (2, layer.in_channels, 12, 10),
        generator=torch.Generator().manual_seed(1),
    )
    x = (steps * layer.input_scale.detach()).to(
        memory_format=torch.channels_last
    )  # some are clipped
    with torch.no_grad():
        expected, result = layer(x), int8_layer(layer)(x)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = int8_layer(layer)(x)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(
        coarse.float(), expected, rtol=2**-7, atol=0.02 * expected.abs().max().item()
    )


@needs_kernel
@pytest.mark.parametrize("loud", [1, 1000], ids=["usual z", "activations at their bounds"])
def test_h_s_on_the_kernels_gives_the_same_bits(quantized, loud):
    z_hat = (
        torch.randint(
            -20, 21, (2, WIDTHS["z"], 3, 4), generator=torch.Generator().manual_seed(3)
        ).double()
        * loud
    )
    plain, quick = IntegerHyperSynthesis(quantized.h_s), coder_of(quantized).h_s
    assert kinds(quick) == [False, True, True]
    for k, channels in (
        (1, WIDTHS["h_s.1"]),
        (2, WIDTHS["h_s.2"]),
    ):  # what the layers see takes all their integers
        q = torch.randint(WIDE[0], WIDE[1] + 1, (2, channels, 6, 8)).double()
        assert torch.equal(quick.layers[k](q), plain.layers[k](q))
    for expected, result in zip(plain(z_hat), quick(z_hat)):
        assert torch.equal(result, expected) and expected.unique().numel() > 10
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick(z_hat)[0], plain(z_hat)[0])


@needs_kernel
def test_h_s_stays_in_float64_where_a_float32_would_round_its_sums(quantized):
    model = copy.deepcopy(quantized)
    model.h_s.conv3 = QuantizedConvolution(nn.Conv2d(500, 2, 3, padding=1), WIDE, integer=True)
    model.h_s.conv3.weight_scale.fill_(1)
    model.h_s.conv3.multiplier.fill_(1)
    with torch.no_grad():
        model.h_s.conv3.weight.fill_(127)  # 255 * 127 * 4,500 is 8.7 times 2^24
    assert kinds(coder_of(model).h_s) == [False, True, False]


@needs_kernel
def test_an_input_in_bf16_is_rounded_once(quantized, monkeypatch):
    """128 of the 256 integers have no room in bf16 for a fraction; the kernel must see those
    that a float32 would give."""
    layer = quantized.get_submodule("g_s.conv2")
    steps = (
        torch.linspace(-127, 126, 4096).reshape(1, 1, 64, 64).expand(1, layer.in_channels, 64, 64)
    )
    x = (steps * layer.input_scale.detach()).bfloat16()
    with torch.no_grad():
        result = int8_layer(layer)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(
            result, layer(x.float()), rtol=1e-5, atol=1e-5 * result.abs().max().item()
        )


@needs_kernel
def test_files_are_decoded_alike_with_and_without_the_kernels(quantized, monkeypatch):
    image, tables = dead_leaves(5, 128), build_tables(quantized)
    quick = ImageCoder(quantized, tables, "0" * 16)
    assert sum(
        isinstance(m, Int8Convolution)
        for n in (quick.g_a, quick.h_a, quick.g_s)
        for m in n.modules()
    ) == len(eight_bit_inputs())
    monkeypatch.setattr(fast, "available", lambda: False)
    plain = ImageCoder(quantized, tables, "0" * 16)
    assert any(kinds(quick.h_s)) and not any(kinds(plain.h_s))
    assert not any(
        isinstance(m, Int8Convolution)
        for n in (plain.g_a, plain.h_a, plain.g_s)
        for m in n.modules()
    )
    for coder in (quick, plain):
        data = coder.encode(image, 2)
        decoded = [np.asarray(c.decode(data), dtype=int) for c in (quick, plain)]
        assert np.abs(decoded[0] - decoded[1]).max() <= 1
    images = [coder.decode(coder.encode(image, 2)) for coder in (quick, plain)]
    assert psnr(image, images[0]) == pytest.approx(psnr(image, images[1]), abs=0.01)


def test_the_networks_of_the_model_stay_as_they_are(quantized):
    before = copy.deepcopy(quantized.state_dict())
    coder_of(quantized)
    assert all(torch.equal(v, before[k]) for k, v in quantized.state_dict().items())
    assert not any(isinstance(m, Int8Convolution) for m in quantized.modules())


@pytest.mark.parametrize("fault", [None, "missing", "another interface", "saturates"])
def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch, fault):
    class Operators:
        @staticmethod
        def qconv_prepack(*arguments):
            if fault == "another interface":
                raise RuntimeError("qconv_prepack() takes 3 arguments")
            return arguments[0]

        @staticmethod
        def qconv2d_pointwise(q, input_scale, zero_point, weight, *rest):
            """What CPUs without VNNI do: products summed in pairs, in 16 bits."""
            x = q.double() - zero_point
            exact = F.conv2d(x, weight.double(), None, 1, 1)
            return (exact.clamp(-(2**15), 2**15 - 1) if fault else exact).float()

    operators = object() if fault == "missing" else Operators
    monkeypatch.setattr(torch.ops, "onednn", operators)
    assert fast.available.__wrapped__() is (fault is None)


@needs_kernel
def test_a_layer_of_more_than_256_channels_has_each_with_its_own_scale():
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedConvolution(nn.Conv2d(8, 300, 3, padding=1), SIGNED)
    with torch.no_grad():
        layer.input_scale.fill_(0.1)
        layer.weight_scale.copy_(torch.linspace(0.01, 0.3, 300).view(300, 1, 1, 1))
        integers = torch.randint(-127, 128, layer.weight.shape, generator=generator)
        layer.weight.copy_(integers * layer.weight_scale)
        x = torch.randn(1, 8, 6, 5, generator=generator)
        expected = layer(x)
        torch.testing.assert_close(int8_layer(layer)(x), expected, rtol=1e-4, atol=1e-3)
