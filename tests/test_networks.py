"""GDN, the entropy models and the codec's forward: closed forms and inequalities."""

import copy
import math

import pytest
import torch
from helpers import lively_codec, photo_like

from lic.codec.entropy import (
    LOG_SCALE_MIN,
    LOG_SCALE_STEP,
    EntropyBottleneck,
    GaussianConditional,
    add_noise,
    soft_limit,
)
from lic.codec.gdn import GDN, IGDN
from lic.codec.gradients import lower_bound, round_ste
from lic.codec.model import PRESETS, Codec, preset_config


def test_gdn_at_initialisation_is_its_closed_form():
    x = torch.randn(2, 5, 4, 3)
    torch.testing.assert_close(GDN(5)(x), x / torch.sqrt(1 + 0.1 * x**2))
    torch.testing.assert_close(IGDN(5)(x), x * torch.sqrt(1 + 0.1 * x**2))


def test_gdn_mixes_channels_with_gamma_out_in():
    gdn = GDN(2)
    with torch.no_grad():
        gdn.gamma.copy_(
            torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        )  # channel 0 is normalised by channel 1
    x = torch.tensor([3.0, 2.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(gdn(x).flatten(), torch.tensor([3 / math.sqrt(1 + 4), 2.0]))


def test_gdn_stays_finite_when_its_parameters_are_driven_negative():
    gdn = GDN(3)
    with torch.no_grad():
        gdn.beta.fill_(-5)
        gdn.gamma.fill_(-5)
    assert gdn(torch.randn(1, 3, 4, 4)).isfinite().all()


def test_lower_bound_passes_only_gradients_that_climb_back():
    x = torch.tensor([-1.0, -1.0, 2.0, 2.0], requires_grad=True)
    (lower_bound(x, 0.0) * torch.tensor([1.0, -1.0, 1.0, -1.0])).sum().backward()
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0]


def test_prior_mass_sums_to_one_and_matches_the_cumulative():
    torch.manual_seed(0)
    prior = EntropyBottleneck(3).double()
    with torch.no_grad():
        for a in prior.a:
            a.normal_()
    z = torch.arange(-400.0, 401, dtype=torch.float64).expand(3, -1)
    p = prior.likelihood(z[None, :, :, None])[0, :, :, 0]  # (3, 801)
    assert (p > 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    cdf = torch.sigmoid(prior.logits(z[:, None] + 0.5)[:, 0])
    torch.testing.assert_close(p.cumsum(1), cdf, rtol=0, atol=1e-6)


def test_gaussian_mass_sums_to_one_is_symmetric_and_positive_far_out():
    y = torch.arange(-50.0, 51)
    p = torch.exp2(
        -GaussianConditional.bits(y, torch.full_like(y, 0.3), torch.full_like(y, math.log(4.0)))
    )
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    zero = torch.zeros_like(y)
    bits = GaussianConditional.bits(y, zero, zero)
    torch.testing.assert_close(bits, bits.flip(0))
    assert bits.isfinite().all() and (bits.diff()[51:] > 0).all()


def test_gaussian_bits_are_those_of_erfc_where_erfc_is_exact():
    y, log_scale = torch.meshgrid(
        torch.arange(-4.0, 5).double(), torch.linspace(-2, 5, 50).double(), indexing="ij"
    )
    edge = lambda v: 0.5 * torch.erfc(v / log_scale.exp() * 0.5**0.5)  # noqa: E731
    p = edge(y.abs() - 0.5) - edge(y.abs() + 0.5)
    bits = GaussianConditional.bits(y, torch.zeros_like(y), log_scale)
    torch.testing.assert_close(bits[p > 1e-300], -torch.log2(p[p > 1e-300]))


@pytest.mark.parametrize("distance", [300.0, 5312.0, 1e7])
def test_however_far_out_the_gradient_is_a_number_and_leads_back(distance):
    y, mean, log_scale = (torch.tensor([v], requires_grad=True) for v in (0.0, distance, -126.0))
    bits = soft_limit(GaussianConditional.bits(y, mean, log_scale))
    bits.sum().backward()
    assert 24 < bits.item() < 1000
    assert (
        -torch.inf < y.grad < 0 and 0 < mean.grad < torch.inf and -torch.inf < log_scale.grad < 0
    )  # a step down the gradient: nearer, wider


def test_an_outlier_feels_a_gradient_that_does_not_explode():
    log_scale = torch.full((3,), math.log(0.11), requires_grad=True)
    y = torch.tensor([3.0, 20.0, 100.0], requires_grad=True)
    bits = soft_limit(GaussianConditional.bits(y, torch.zeros(3), log_scale))
    bits.sum().backward()
    assert (bits.diff() > 0).all() and ((y.grad > 0.1) & (y.grad < 100)).all()
    assert ((log_scale.grad < -20) & (log_scale.grad > -100)).all()


def test_soft_limit_is_the_identity_below_its_limit():
    bits = torch.linspace(0, 24, 99)
    assert torch.equal(soft_limit(bits), bits)


def test_scale_index_inverts_the_table_of_scales_and_saturates():
    index = torch.arange(64)
    assert torch.equal(
        GaussianConditional.scale_index(LOG_SCALE_MIN + LOG_SCALE_STEP * index), index
    )
    assert GaussianConditional.scale_index(torch.tensor([-1e9, 1e9])).tolist() == [0, 63]


def test_rounding_is_straight_through_and_noise_stays_in_half_a_step():
    y = torch.linspace(-3, 3, 1001, requires_grad=True)
    round_ste(y).sum().backward()
    assert torch.equal(y.grad, torch.ones(1001)) and torch.equal(round_ste(y), torch.round(y))
    noise = add_noise(y) - y
    assert noise.abs().max() <= 0.5 and noise.std().item() == pytest.approx(
        1 / math.sqrt(12), rel=0.1
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_twelve_widths_and_rising_lambdas(preset):
    config = preset_config(preset)
    assert len(config["widths"]) == 12 and config["lambdas"] == sorted(config["lambdas"])


def test_a_fractional_level_takes_the_geometric_mean_of_the_gains():
    model = lively_codec()
    low, high, middle = (model.gains(torch.tensor([level]))[0] for level in (1.0, 2.0, 1.5))
    torch.testing.assert_close(middle, torch.sqrt(low * high))
    torch.testing.assert_close(
        model.gains(torch.tensor([3.0]))[0].flatten(), model.log_gain[3].exp()
    )


def test_a_single_lambda_is_the_fixed_rate_model():
    model = Codec({"widths": lively_codec().config["widths"], "lambdas": [0.01]})
    assert torch.equal(model.gains(torch.zeros(2))[0], torch.ones(2, 12, 1, 1))


def test_every_parameter_gets_a_gradient():
    model = lively_codec().train()
    out = model(photo_like(), torch.tensor([0.5]))
    (out.x_hat.square().mean() + out.y_bits.sum() + out.z_bits.sum()).backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []


def test_lively_codec_spans_many_integers():
    model = lively_codec()
    with torch.no_grad():
        y = model.g_a(photo_like() - 0.5)
        z = model.h_a(y)
    assert y.round().unique().numel() > 20 and z.round().unique().numel() > 8


def with_outliers():
    """A codec of which some y cost more than the coder's 24 bits."""
    codec = lively_codec()
    with torch.no_grad():
        codec.h_s[-1].bias[codec.config["widths"]["y"] :] -= 4
    return codec


def test_training_counts_noisy_latents_and_eval_mode_rounded_ones(monkeypatch):
    codec, x, level = with_outliers(), photo_like(), torch.tensor([1.0])
    with torch.no_grad():
        gain, _ = codec.gains(level)
        y = codec.g_a(x - 0.5) * gain
        z = codec.h_a(y)
        mean, log_scale = codec.h_s(z.round()).chunk(2, 1)
        monkeypatch.setattr("lic.codec.model.add_noise", lambda v, part: v + 0.25)
        noisy = codec.train()(x, level)
        rounded = codec.eval()(x, level)
        y_hat = (y - mean).round() + mean
        bits = codec.prior_y.bits(y + 0.25, mean, log_scale)
        bits_hat = codec.prior_y.bits(y_hat, mean, log_scale)
        assert bits.max() > 40 and bits_hat.max() > 40
        torch.testing.assert_close(noisy.y_bits, soft_limit(bits).sum((2, 3)))
        torch.testing.assert_close(rounded.y_bits, bits_hat.clamp(max=24).sum((2, 3)))
        torch.testing.assert_close(noisy.z_bits, codec.prior_z.bits(z + 0.25).sum((2, 3)))
        torch.testing.assert_close(rounded.z_bits, codec.prior_z.bits(z.round()).sum((2, 3)))


def test_the_rate_of_y_trains_the_analysis_of_z_through_its_rounding():
    codec = lively_codec().train()
    codec(photo_like(), torch.tensor([1.0])).y_bits.sum().backward()
    assert codec.h_a.conv3.weight.grad.abs().sum() > 0


def test_a_gain_begins_as_the_root_of_lmbda_and_is_undone():
    codec = Codec(preset_config("tiny"))
    lambdas = torch.tensor(codec.lambdas)
    for level in range(4):
        gain, inverse_gain = codec.gains(torch.tensor([float(level)]))
        expected = torch.sqrt(lambdas[level] / lambdas[-1]).expand_as(gain)
        torch.testing.assert_close(gain, expected)
        torch.testing.assert_close(gain * inverse_gain, torch.ones_like(gain))


def test_z_costs_at_most_24_bits_and_the_scale_of_y_at_most_256():
    prior = EntropyBottleneck(2)
    far = torch.full((1, 2, 1, 1), 1e6)
    torch.testing.assert_close(prior.bits(far), torch.full_like(far, 24.0))
    y = torch.tensor([1000.0])
    at_most = GaussianConditional.bits(y, 0 * y, torch.tensor([math.log(256)]))
    beyond = GaussianConditional.bits(y, 0 * y, torch.tensor([20.0]))
    torch.testing.assert_close(beyond, at_most)


def test_the_density_of_z_is_computed_in_float32_under_autocast():
    prior, z = EntropyBottleneck(2), torch.randn(1, 2, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        p = prior.likelihood(z)
    assert p.dtype == torch.float32
    exact = copy.deepcopy(prior).double().likelihood(z.double())
    torch.testing.assert_close(p.double(), exact, rtol=1e-4, atol=1e-6)


def test_at_the_bound_every_gradient_passes():
    x = torch.zeros(2, requires_grad=True)
    (lower_bound(x, 0.0) * torch.tensor([1.0, -1.0])).sum().backward()
    assert x.grad.tolist() == [1.0, -1.0]
