"""8-bit tensors: the grid, the axis, the disk, and that a quantized codec decodes what it encodes."""

import copy

import numpy as np
import pytest
import torch
from helpers import lively_codec, photo_like

from lic.bitstream import ImageCoder, build_tables
from lic.checkpoint import load, save
from lic.quantization import (
    INPUTS,
    SIGNED,
    UNSIGNED,
    WEIGHT,
    fake_quantize,
    input_scales,
    least_error_scale,
    pack,
    quantize_layers,
    unpack,
)


@pytest.fixture(scope="module")
def quantized():
    model = lively_codec()
    quantize_layers(model, input_scales(model, photo_like()))
    return model


@pytest.mark.parametrize("low, high", [SIGNED, UNSIGNED, WEIGHT])
def test_fake_quantization_stays_on_the_integer_grid_and_clips(low, high):
    v = torch.linspace(-3, 3, 999)
    q = fake_quantize(v, torch.tensor(0.01), low, high) / 0.01
    torch.testing.assert_close(q, q.round(), rtol=0, atol=1e-3)
    assert q.min() >= low - 1e-3 and q.max() <= high + 1e-3


def test_gradient_passes_inside_the_range_only():
    v = torch.tensor([-10.0, 0.3, 10.0], requires_grad=True)
    fake_quantize(v, torch.tensor(0.01), -127, 127).sum().backward()
    torch.testing.assert_close(v.grad, torch.tensor([0.0, 1.0, 0.0]))


def test_least_error_scale_clips_an_outlier_that_the_largest_value_would_follow():
    torch.manual_seed(0)
    v = torch.randn(4, 200_000)
    v[:, 0] = 15
    error = lambda s: (fake_quantize(v, s[:, None], *WEIGHT) - v).square().sum(1)  # noqa: E731
    assert (error(least_error_scale(v, *WEIGHT)) < 0.9 * error(v.abs().amax(1) / 127)).all()


def test_weights_have_one_scale_an_output_channel_on_the_right_axis(quantized):
    original = lively_codec()
    for name in INPUTS:
        layer, weight = quantized.get_submodule(name), original.get_submodule(name).weight
        assert layer.weight_scale.numel() == layer.out_channels
        step = layer.weight_scale.expand_as(weight)
        error = (layer.operands(torch.zeros(1))[1] - weight).abs() / step
        # only clipped values are off by more than half a step, and they are few
        assert (error > 0.5001).float().mean() < 0.02, name


@pytest.mark.parametrize("name", [name for name, input_range in INPUTS.items() if input_range])
def test_inputs_that_claim_8_bits_take_at_most_256_values(quantized, name):
    layer = quantized.get_submodule(name)
    v = torch.linspace(-400, 400, 5001) * layer.input_scale
    assert layer.operands(v)[0].unique().numel() == 256


def test_quantized_codec_is_close_to_the_float_one(quantized):
    x, level = photo_like(), torch.tensor([2.0])
    with torch.no_grad():
        exact, approximate = lively_codec()(x, level), quantized(x, level)
    change = (exact.x_hat - approximate.x_hat).square().mean() / exact.x_hat.var()
    assert 0 < change < 0.02
    assert approximate.y_bits.item() == pytest.approx(exact.y_bits.item(), rel=0.05)


def test_pack_stores_int8_and_unpack_returns_the_same_codec(quantized):
    packed = pack(quantized.state_dict())
    assert sum(t.dtype == torch.int8 for t in packed.values()) == len(INPUTS)
    again = copy.deepcopy(quantized)
    again.load_state_dict(unpack(packed))
    x, level = photo_like(), torch.tensor([1.0])
    with torch.no_grad():
        torch.testing.assert_close(again(x, level).x_hat, quantized(x, level).x_hat)
    for name in INPUTS:
        torch.testing.assert_close(again.get_submodule(name).weight, quantized.get_submodule(name).operands(torch.zeros(1))[1])


def test_quantized_checkpoint_is_small_and_decodes_what_it_encodes(quantized, tmp_path):
    for name, model in (("float.pt", lively_codec()), ("int8.pt", quantized)):
        save(tmp_path / name, model, build_tables(model), "quantize", {}, 0)
    loaded, meta = load(tmp_path / "int8.pt")
    size = {n: sum(t.numel() * t.element_size() for t in s.values()) for n, s in
            (("float", lively_codec().state_dict()), ("int8", pack(quantized.state_dict())))}  # fmt: skip
    assert size["int8"] < 0.4 * size["float"]
    assert (tmp_path / "int8.pt").stat().st_size < (tmp_path / "float.pt").stat().st_size
    image = (photo_like()[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    tables = {"tables": build_tables(quantized), "fingerprint": meta["fingerprint"]}
    data = ImageCoder(quantized, **tables).compress(image, 2)
    decoded = ImageCoder(loaded, meta["tables"], meta["fingerprint"]).decompress(data)
    with torch.no_grad():
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        x_hat = quantized(x, torch.tensor([2.0])).x_hat.clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(decoded - x_hat).mean() < 0.5
