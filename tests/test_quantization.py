"""8-bit tensors: the grid, the axis, the disk, and that a quantized codec decodes what it
encodes."""

import copy

import numpy as np
import pytest
import torch
from helpers import lively_codec, photo_like, quantized_codec
from torch.nn import functional as F

from lic.codec import integer
from lic.codec.bitstream import ImageCoder
from lic.codec.checkpoint import load_checkpoint, save_checkpoint
from lic.codec.eight_bits import (
    LEAKY,
    SIGNED,
    WEIGHT,
    eight_bit_inputs,
    fake_quantize,
    input_ranges,
    pack,
    quantize_layers,
    unpack,
)
from lic.codec.integer import MAX_SYMBOL, IntegerHyperSynthesis, freeze_h_s
from lic.codec.structure import channel_axes
from lic.codec.tables import build_tables
from lic.files import LicError
from lic.shrink.quantization import (
    clipped_inputs,
    equalize,
    input_scales,
    least_error_scale,
    sample,
)
from lic.shrink.rounding import patch_moments, round_weights
from lic.shrink.statistics import layer_inputs


@pytest.fixture(scope="module")
def quantized():
    return quantized_codec()


def test_an_input_in_bf16_is_rounded_once(quantized):
    """With --amp layers hand on bf16, in which a 16-bit integer has no room, and an 8-bit one
    none for its fraction."""
    for name in ("g_a.conv2", "h_s.conv3"):
        layer = quantized.get_submodule(name)
        low, high = layer.input_range
        x = (torch.linspace(low, high, 5000) * layer.input_scale.detach()).bfloat16()
        assert torch.equal(layer.quantized_input(x), layer.quantized_input(x.float())), name
        assert layer.quantized_input(x.double()).dtype == torch.float64


@pytest.mark.parametrize("low, high", [SIGNED, LEAKY, WEIGHT])
def test_fake_quantization_stays_on_the_integer_grid_and_clips(low, high):
    v = torch.linspace(-3, 3, 999)
    q = fake_quantize(v, torch.tensor(0.01), low, high) / 0.01
    torch.testing.assert_close(q, q.round(), rtol=0, atol=1e-3)
    assert q.min() >= low - 1e-3 and q.max() <= high + 1e-3


def test_gradient_passes_inside_the_range_only():
    v = torch.tensor([-10.0, 0.3, 10.0], requires_grad=True)
    fake_quantize(v, torch.tensor(0.01), -127, 127).sum().backward()
    torch.testing.assert_close(v.grad, torch.tensor([0.0, 1.0, 0.0]))


def test_gradient_of_a_scale_is_lsqs(quantized):
    """Esser et al., arXiv:1902.08153, eq. 3: q - v/s inside the range, the border outside;
    times 1 / sqrt(N high)."""
    layer = copy.deepcopy(quantized.g_s.conv2)
    s = layer.input_scale.item()
    layer.quantized_input(torch.tensor([-1000.0, 0.3, 1.4, 2000.0]) * s).sum().backward()
    expected = (-128 + (0 - 0.3) + (1 - 1.4) + 127) / (4 * 127) ** 0.5
    assert layer.input_scale.grad.item() == pytest.approx(expected, rel=1e-4)


def test_nothing_is_clipped_in_the_encoder_and_rare_values_are_elsewhere():
    model, x = lively_codec(), photo_like()
    scales = input_scales(model, x)
    for name, inputs in layer_inputs(model, x, scales, lambda v: v).items():
        v = torch.cat([part.flatten() for part in inputs])
        low, high = input_ranges()[name]
        outside = (v > (high + 1e-3) * scales[name]) | (v < (low - 1e-3) * scales[name])
        assert outside.double().mean() < 0.01
        assert not (name.startswith("g_a") and outside.any()), name
        if name.startswith("h_s"):
            assert torch.where(v > 0, v / high, v / low).max() == pytest.approx(
                scales[name] / 2
            )  # room for twice as much


def test_least_error_scale_clips_an_outlier_that_the_largest_value_would_follow():
    torch.manual_seed(0)
    v = torch.randn(4, 200_000)
    v[:, 0] = 15
    error = lambda s: (fake_quantize(v, s[:, None], *WEIGHT) - v).square().sum(1)  # noqa: E731
    assert (error(least_error_scale(v, *WEIGHT)) < 0.9 * error(v.abs().amax(1) / 127)).all()


def test_weights_have_one_scale_an_output_channel_on_the_right_axis(quantized):
    original = lively_codec()
    for name in input_ranges():
        layer, weight = quantized.get_submodule(name), original.get_submodule(name).weight
        assert layer.weight_scale.numel() == layer.out_channels
        largest = weight.abs().transpose(0, channel_axes(layer)[0]).flatten(1).amax(1)
        torch.testing.assert_close(layer.weight_scale.flatten(), largest / 127, msg=name)
        torch.testing.assert_close(
            layer.integer_weight().float() * layer.weight_scale, layer.weight, msg=name
        )


@pytest.mark.parametrize(
    "name", [name for name, input_range in input_ranges().items() if input_range]
)
def test_inputs_that_claim_8_bits_take_at_most_256_values_and_those_of_h_s_65536(quantized, name):
    layer = quantized.get_submodule(name)
    v = torch.arange(-70_000, 70_000, 0.5) * layer.input_scale
    assert layer.quantized_input(v).unique().numel() == (2**16 if name.startswith("h_s") else 2**8)


def test_weights_that_were_not_rounded_are_refused(tmp_path):
    model = lively_codec()
    tables = build_tables(model)
    quantize_layers(model, input_scales(model, photo_like()))
    for use in (
        lambda: freeze_h_s(model),
        lambda: save_checkpoint(tmp_path / "q.pt", model, tables, "quantize", {}, 0),
    ):
        with pytest.raises(LicError, match="round_weights"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_float_input_is_not_rounded_and_the_checkpoint_knows_it(tmp_path):
    model = quantized_codec(float_inputs=["g_s.conv4"])
    save_checkpoint(tmp_path / "q.pt", model, build_tables(model), "quantize", {}, 0)
    again, _ = load_checkpoint(tmp_path / "q.pt")
    v = torch.linspace(-3, 3, 5001)
    for layer in (model.g_s.conv4, again.g_s.conv4):
        assert torch.equal(layer.quantized_input(v), v)
    assert again.g_s.conv3.quantized_input(v).unique().numel() <= 256
    torch.testing.assert_close(again.g_s.conv4.weight, model.g_s.conv4.weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "float_inputs", [["h_s.conv2"], ["g_s.conv1"], ["g_s.conv9"], 5, {"g_s.conv4": 1}]
)
def test_a_checkpoint_with_other_float_inputs_is_refused(quantized, tmp_path, float_inputs):
    """The integers of h_s have no float form, and whoever wrote anything else meant something
    that is not known here."""
    model = copy.deepcopy(quantized)
    model.quantization = model.quantization | {"float_inputs": float_inputs}
    save_checkpoint(tmp_path / "q.pt", model, build_tables(model), "quantize", {}, 0)
    with pytest.raises(LicError):
        load_checkpoint(tmp_path / "q.pt")


def test_quantized_codec_is_close_to_the_float_one(quantized):
    x, level = photo_like(), torch.tensor([2.0])
    with torch.no_grad():
        exact, approximate = lively_codec()(x, level), quantized(x, level)
    change = (exact.x_hat - approximate.x_hat).square().mean() / exact.x_hat.var()
    assert 0 < change < 0.02
    assert approximate.y_bits.sum().item() == pytest.approx(exact.y_bits.sum().item(), rel=0.05)


def test_pack_stores_int8_and_unpack_returns_the_same_codec(quantized):
    packed = pack(quantized.state_dict())
    assert sum(t.dtype == torch.int8 for t in packed.values()) == len(input_ranges())
    again = copy.deepcopy(quantized)
    again.load_state_dict(unpack(packed))
    x, level = photo_like(), torch.tensor([1.0])
    with torch.no_grad():
        torch.testing.assert_close(again(x, level).x_hat, quantized(x, level).x_hat)
    for name in input_ranges():
        torch.testing.assert_close(
            again.get_submodule(name).weight, quantized.get_submodule(name).weight
        )


def test_quantized_checkpoint_is_small_and_decodes_what_it_encodes(quantized, tmp_path):
    for name, model in (("float.pt", lively_codec()), ("int8.pt", quantized)):
        save_checkpoint(tmp_path / name, model, build_tables(model), "quantize", {}, 0)
    loaded, meta = load_checkpoint(tmp_path / "int8.pt")
    size = {
        n: sum(t.numel() * t.element_size() for t in s.values())
        for n, s in (("float", lively_codec().state_dict()), ("int8", pack(quantized.state_dict())))
    }
    assert size["int8"] < 0.4 * size["float"]
    assert (tmp_path / "int8.pt").stat().st_size < (tmp_path / "float.pt").stat().st_size
    image = (photo_like()[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    data = ImageCoder(quantized, build_tables(quantized), meta["fingerprint"]).encode(image, 2)
    image_coder = ImageCoder(loaded, meta["tables"], meta["fingerprint"])
    decoded = image_coder.decode(data)
    with torch.no_grad():  # the codec's forward, but with the means of the integer h_s
        gain, inverse_gain = quantized.gains(torch.tensor([2.0]))
        y = quantized.g_a(torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.5) * gain
        mean, _ = IntegerHyperSynthesis(quantized.h_s)(quantized.h_a(y).round().double())
        y_hat = (torch.round(y - mean) + mean).float()
        x_hat = (quantized.g_s(y_hat * inverse_gain) + 0.5).clamp(0, 1)[0].permute(
            1, 2, 0
        ).numpy() * 255
    assert np.abs(decoded - x_hat).max() < 1.01


@pytest.fixture(scope="module")
def z_hat():
    """(1, 18, 2, 3) integers in float64, as h_a gives them."""
    model = lively_codec()
    with torch.no_grad():
        return model.h_a(model.g_a(photo_like() - 0.5)).round().double()


def test_integer_h_s_computes_what_was_simulated_in_training(quantized, z_hat):
    with torch.no_grad():
        mean, index = IntegerHyperSynthesis(quantized.h_s)(z_hat)
        simulated_mean, log_scale = quantized.h_s(z_hat.float()).chunk(2, 1)
    assert (mean * 4096 == (mean * 4096).round()).all() and mean.unique().numel() > 1000
    assert (mean - simulated_mean).abs().mean() < 0.01 * simulated_mean.std()
    difference = (index - quantized.prior_y.scale_index(log_scale)).abs()
    assert (
        index.unique().numel() > 10
        and difference.max() <= 1
        and (difference > 0).double().mean() < 0.02
    )


@pytest.mark.filterwarnings("ignore:TF32")
def test_integer_h_s_gives_the_same_bits_in_any_order_of_summation(quantized, z_hat):
    """Channels permuted, in a batch, in another memory layout, with one thread, without oneDNN:
    not one bit differs."""
    plain = IntegerHyperSynthesis(quantized.h_s)
    permuted = copy.deepcopy(plain)
    torch.manual_seed(0)
    first, second, last = plain.layers  # transposed, transposed, ordinary
    orders = [
        torch.randperm(size)
        for size in (len(first.weight), len(second.weight), last.weight.shape[1])
    ]
    permuted.layers[0].weight = first.weight[orders[0]][:, orders[1]]
    permuted.layers[1].weight = second.weight[orders[1]][:, orders[2]]
    permuted.layers[2].weight = last.weight[:, orders[2]]
    for k, order in ((0, orders[1]), (1, orders[2])):
        permuted.layers[k].bias = plain.layers[k].bias[order]
        permuted.layers[k].multiplier = plain.layers[k].multiplier[order]
    expected = torch.cat(plain(z_hat))
    assert torch.equal(torch.cat(permuted(z_hat[:, orders[0]])), expected)
    assert torch.equal(torch.cat([part[1:2] for part in plain(z_hat.repeat(3, 1, 1, 1))]), expected)
    assert torch.equal(
        torch.cat(copy.deepcopy(plain).to(memory_format=torch.channels_last)(z_hat)), expected
    )
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(torch.cat(plain(z_hat)), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(torch.cat(plain(z_hat)), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_order_of_summation_does_matter_for_weights_that_are_no_integers(quantized, z_hat):
    """What the test above would see if the sums were rounded."""
    first = IntegerHyperSynthesis(quantized.h_s).layers[0]
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))

    def sums(weight):
        return [
            F.conv_transpose2d(z, w, stride=2)
            for z, w in ((z_hat, weight), (z_hat[:, order], weight[order]))
        ]

    assert torch.equal(*sums(first.weight)) and not torch.equal(*sums(first.weight * 0.1))


def test_integer_h_s_is_exact_for_the_largest_symbols(quantized):
    """The first layer against Python's integers, with every symbol at the limit and signs that
    add up."""
    first = IntegerHyperSynthesis(quantized.h_s).layers[0]
    weight = first.weight.numpy()  # (Z, out, 5, 5)
    z = (MAX_SYMBOL - 1) * np.sign(weight[:, 0, 2, 2])
    a = first(torch.from_numpy(z).view(1, -1, 1, 1))
    for c in range(
        weight.shape[1]
    ):  # one input pixel reaches output pixel (0, 0) by the kernel's centre
        assert int(a[0, c, 0, 0]) == sum(
            int(v) * int(w) for v, w in zip(z, weight[:, c, 2, 2])
        ) + int(first.bias[c])
    assert a.abs().max() > 2**38


@pytest.mark.parametrize("bias", [2.0**40, 2.0**70, float("nan")])
def test_integer_h_s_sums_stay_below_2_to_53_or_are_refused(quantized, bias):
    model = copy.deepcopy(quantized)
    with torch.no_grad():
        model.h_s.conv3.bias[0] = bias
    with pytest.raises(LicError, match="too large for exact sums"):
        freeze_h_s(model)


def test_the_bound_counts_the_weights(quantized, monkeypatch):
    weights = (
        quantized.h_s.conv1.integer_weight().abs().sum((0, 2, 3))
    )  # (out,) of a transposed convolution
    monkeypatch.setattr(integer, "MAX_SYMBOL", 2**53 / weights.max().item())
    with pytest.raises(LicError, match="too large for exact sums"):
        freeze_h_s(quantized)
    monkeypatch.setattr(integer, "MAX_SYMBOL", 0.99 * 2**53 / weights.max().item())
    freeze_h_s(quantized)


def test_integers_that_were_not_derived_are_refused():
    model, x = lively_codec(), photo_like()
    quantize_layers(model, input_scales(model, x))
    round_weights(model, patch_moments(model, x))
    with pytest.raises(LicError, match="freeze_h_s"):
        ImageCoder(model, build_tables(model), "00")


def test_half_way_sums_round_to_even(quantized):
    """A sum of 0.5 and 1.5 units gives 0 and 2, whatever the platform's habit."""
    h_s = IntegerHyperSynthesis(quantized.h_s)
    for name, value in h_s.named_buffers():
        value.zero_()
    h_s.layers[2].bias[:2], h_s.layers[2].multiplier[:] = torch.tensor([1.0, 3.0]), 0.5
    mean, _ = h_s(torch.zeros(1, 18, 1, 1, dtype=torch.float64))
    assert (mean[0, 0] * 4096).unique().tolist() == [0] and (
        mean[0, 1] * 4096
    ).unique().tolist() == [2]


def test_equalization_changes_no_output_and_balances_inputs_and_weights():
    model, x, level = lively_codec(), photo_like(), torch.tensor([2.0])

    def peaks(model):
        return torch.stack(
            layer_inputs(model, x, ["g_s.conv2"], lambda v: v.abs().amax((0, 2, 3)))["g_s.conv2"]
        ).amax(0)

    with torch.no_grad():
        model.g_s.gdn1.beta[3] *= 30  # a loud channel
        model.g_s.conv2.weight[3] /= 30
        before = model(x, level)
        inputs, weight = peaks(model), model.g_s.conv2.weight.clone()
        equalize(model, x)
        after = model(x, level)
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.y_bits.sum(), before.y_bits.sum(), rtol=1e-3, atol=0)
    spread = lambda v, w: (v / w.abs().amax((1, 2, 3))).log().std()  # noqa: E731
    assert spread(inputs, weight) > 1 and spread(peaks(model), model.g_s.conv2.weight) < 0.01


def test_in_g_a_nothing_is_clipped_and_elsewhere_what_is_rare_may_be():
    names = clipped_inputs()
    assert names and set(names) == {n for n in eight_bit_inputs() if n[:3] in ("g_s", "h_a")}
    model, x = lively_codec(), photo_like()
    by_default = input_scales(model, x)
    largest, least_error = input_scales(model, x, clipped=[]), input_scales(model, x, names)
    for name, scale in by_default.items():
        assert scale == least_error[name]
        assert scale == largest[name] if name not in names else scale <= largest[name]
    assert any(by_default[name] < largest[name] for name in names)


def test_balancing_leaves_a_dead_channel_as_it_is():
    model, x = lively_codec(), photo_like()
    with torch.no_grad():
        model.g_a.conv2.weight[3] = 0
        model.g_a.conv2.bias[3] = 0
    before = model.g_a.conv3.weight[:, 3].clone()
    equalize(model, x)
    torch.testing.assert_close(model.g_a.conv3.weight[:, 3], before)
    assert model.g_a.gdn2.coefficients()[0].isfinite().all()


def test_the_integer_bias_of_h_s_is_the_nearest():
    model = quantized_codec()
    layer = model.h_s.conv1
    sum_unit = layer.weight_scale.double().flatten()  # of z_hat's integers
    error = layer.integer_bias * sum_unit - layer.bias.double()
    assert (error.abs() <= 0.5001 * sum_unit).all() and (error < 0).any() and (error > 0).any()


def test_values_of_an_input_are_sampled_from_every_column():
    columns = torch.arange(64.0).expand(2, 30, 100, 64)
    some = sample(columns)
    assert 2_500 < len(some) < 10_000 and set(some.tolist()) == set(range(64))
    assert some.untyped_storage().nbytes() < columns.numel()
