"""Rounding of weights with errors that cancel: the formula, its integers, and what it gains
over the nearest ones."""

import copy

import pytest
import torch
from helpers import lively_codec, photo_like
from torch import nn

from lic.codec.eight_bits import input_ranges, quantize_layers
from lic.codec.structure import broadcast, channel_axes, weight_rows
from lic.shrink.quantization import input_scales, largest_scale
from lic.shrink.rounding import (
    output_error,
    patch_moments,
    patches,
    round_rows,
    round_weights,
    tap_groups,
)
from lic.shrink.statistics import layer_inputs


def conv(c_in, c_out, kernel=5, stride=2):
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)


def deconv(c_in, c_out):
    return nn.ConvTranspose2d(c_in, c_out, 5, stride=2, padding=2, output_padding=1)


@pytest.mark.parametrize(
    "layer",
    [conv(3, 4), conv(3, 4, kernel=3, stride=1), deconv(3, 4)],
    ids=["5x5", "3x3", "transposed"],
)
def test_output_error_is_what_the_layer_puts_out(layer):
    """The sum over patches and groups of taps, against the squared output of the layer itself,
    borders included."""
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.bias.zero_()
        expected = layer(x).square().sum()
    u, W = patches(layer, x), weight_rows(layer)
    H = u.T @ u
    error = sum(
        output_error(W[:, taps], H[entries][:, entries]) for taps, entries in tap_groups(layer)
    )
    torch.testing.assert_close(error, expected)


@pytest.mark.parametrize("layer", [conv(2, 4), deconv(2, 4)], ids=["convolution", "transposed"])
def test_groups_of_taps_cover_each_weight_once(layer):
    taps = torch.cat([taps for taps, _ in tap_groups(layer)])
    assert taps.sort().values.equal(torch.arange(weight_rows(layer).shape[1]))
    assert len(tap_groups(layer)) == (4 if isinstance(layer, nn.ConvTranspose2d) else 1)


def correlated(K):
    """Second moments of a row of K pixels, neighbours 95 % alike."""
    k = torch.arange(K)
    return 0.95 ** (k[:, None] - k).abs()


def test_unpredictable_inputs_leave_the_nearest_integers():
    W = 40 * torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_rows(W, torch.eye(50)), W.round().clamp(-127, 127))


def test_errors_cancel_where_inputs_are_alike():
    """Theory for many weights: of the error of white noise 1 - 0.95^2, a tenth, is left."""
    W = 15 * torch.randn(20, 200, generator=torch.Generator().manual_seed(2))
    H, Q = correlated(200), round_rows(W, correlated(200))
    assert torch.equal(Q, Q.round()) and (Q - W).abs().max() < 4
    assert 0.08 < output_error(W - Q, H) / output_error(W - W.round(), H) < 0.14


def test_integers_stay_within_8_bits_and_dead_inputs_do_no_harm():
    W = 130 * torch.rand(5, 30, generator=torch.Generator().manual_seed(3))
    H = correlated(30)
    H[7], H[:, 7] = 0, 0
    Q = round_rows(W, H)
    assert Q.isfinite().all() and Q.abs().max() == 127


def test_an_input_that_is_always_zero_leaves_the_nearest_integers():
    W = 30 * torch.randn(6, 50, generator=torch.Generator().manual_seed(4))
    assert torch.equal(round_rows(W, torch.zeros(50, 50)), W.round())


def test_each_layer_errs_less_than_with_the_nearest_integers_by_as_much_as_round_weights_says(
    monkeypatch,
):
    monkeypatch.setattr("lic.shrink.rounding.PATCHES", 1_000_000)  # all there are
    model, x = lively_codec(), photo_like()
    quantize_layers(model, input_scales(model, x))
    nearest, rounded = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for name in input_ranges():
            layer = nearest.get_submodule(name)
            scale = broadcast(largest_scale(weight_rows(layer), -127, 127), channel_axes(layer)[0])
            layer.weight.copy_((layer.weight / scale).round() * scale)
    gains = round_weights(
        rounded, patch_moments(rounded, x.repeat(4, 1, 1, 1))
    )  # once at each level
    assert all(gain > 1 for gain in gains.values())

    errors = {}  # of each layer's real output on the same images
    for name in input_ranges():
        inputs = torch.cat(layer_inputs(model, x, [name], lambda v: v)[name])
        with torch.no_grad():
            out, near, better = (
                codec.get_submodule(name)(inputs) for codec in (model, nearest, rounded)
            )
        errors[name] = ((near - out).square().sum() / (better - out).square().sum()).item()
    for name, gain in gains.items():
        assert errors[name] == pytest.approx(gain, rel=0.01), name
