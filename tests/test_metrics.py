"""PSNR, MS-SSIM and BD-rate against closed forms and against values of other programs."""

import numpy as np
import pytest

from lic.metrics import bd_rate, ms_ssim, pchip_values, psnr, rate_differences

MEAN_SCALE = list(zip([0.12392, 0.19798, 0.30724, 0.46061], [27.6995, 29.3588, 31.1289, 32.9507]))
HYPERPRIOR = list(zip([0.13129, 0.20889, 0.31986, 0.47836], [27.5815, 29.1967, 30.9722, 32.8382]))
JPEG = list(
    zip(
        [0.22115, 0.32661, 0.42313, 0.50839, 0.58787], [23.7799, 26.5772, 28.0422, 29.0418, 29.7847]
    )
)


def test_psnr_closed_form_and_no_uint8_wrap_around():
    a, b = np.full((4, 5, 3), 10, np.uint8), np.full((4, 5, 3), 250, np.uint8)
    assert psnr(a, b) == psnr(b, a) == pytest.approx(20 * np.log10(255 / 240))
    assert psnr(a, a) == float("inf")


def two_images():
    y, x = np.mgrid[0:200, 0:240]
    a = np.stack(
        [128 + 80 * np.sin(x / 7) * np.cos(y / 11), 128 + 60 * np.cos((x + y) / 5), (x * y) % 256],
        -1,
    )
    b = a + 20 * np.sin(x * y / 50)[..., None]
    return (np.clip(np.rint(i), 0, 255).astype(np.uint8) for i in (a, b))


def test_ms_ssim_equals_pytorch_msssim():
    """0.9780928 was computed once with pytorch_msssim 1.0.0, ms_ssim(..., data_range=255)."""
    assert ms_ssim(*two_images()) == pytest.approx(0.9780928, abs=2e-6)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 30), (11, 11), (100, 160), (161, 200)])
def test_ms_ssim_of_an_image_with_itself_is_one_at_any_size(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert ms_ssim(image, image) == pytest.approx(1)
    assert 0 <= ms_ssim(image, 255 - image) < 1  # anticorrelated: clamped, not NaN


def test_bd_rate_equals_the_bjontegaard_package():
    """Values computed once with bjontegaard 1.3.0, bd_rate(..., method="pchip")."""
    assert bd_rate(MEAN_SCALE, HYPERPRIOR)[0] == pytest.approx(8.725009854886402, abs=1e-9)
    assert bd_rate(MEAN_SCALE, JPEG)[0] == pytest.approx(188.7262543813244, abs=1e-7)


def test_bd_rate_of_ten_percent_more_bits_is_ten_percent():
    assert bd_rate(JPEG, [(1.1 * r, q) for r, q in JPEG])[0] == pytest.approx(10)
    assert bd_rate(JPEG, JPEG)[0] == pytest.approx(0)


def test_rate_differences_average_to_the_bd_rate():
    quality, percent = rate_differences(MEAN_SCALE, HYPERPRIOR, count=2001)
    mean = 100 * np.expm1(np.log1p(percent / 100).mean())
    assert mean == pytest.approx(bd_rate(MEAN_SCALE, HYPERPRIOR)[0], abs=0.01)
    assert (quality[0], quality[-1]) == (27.6995, 32.8382)  # what both reach
    _, percent = rate_differences(JPEG, [(1.1 * r, q) for r, q in JPEG])
    assert percent == pytest.approx(10)


def test_the_curve_passes_through_its_points_and_rises_between_them():
    x, y = np.array([0.0, 1, 3, 4]), np.array([0.0, 2, 2.5, 7])
    assert pchip_values(x, y, x) == pytest.approx(y)
    assert (np.diff(pchip_values(x, y, np.linspace(0, 4, 200))) >= 0).all()


@pytest.mark.parametrize(
    "curve, why",
    [
        (JPEG[:3], "3 points"),
        ([(r, q + 50) for r, q in JPEG], "no quality range"),
        (JPEG[:4] + [(0.6, 20.0)], "does not rise"),
        (JPEG[:4] + [(0.6, float("nan"))], "not finite"),
    ],
)
def test_bd_rate_refuses_what_cannot_be_compared(curve, why):
    percent, reason = bd_rate(MEAN_SCALE, curve)
    assert percent is None and why in reason
