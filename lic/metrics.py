"""What a result is measured by: PSNR, MS-SSIM, BD-rate.

Quality is measured on the decoded, clamped, 8-bit image; rates are those of real files.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def bits_per_pixel(size, image):
    """Of a file of `size` bytes. image: (H, W, 3)."""
    return 8 * size / (image.shape[0] * image.shape[1])


def squared_error(a, b):
    """Mean over pixels and channels of two (H, W, 3) uint8 images, in squared grey levels."""
    difference = np.subtract(a, b, dtype=np.int16)  # uint8 would wrap around
    return np.square(difference, dtype=np.int32).mean()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two (H, W, 3) uint8 images over all three channels."""
    mse = squared_error(a, b)
    return float("inf") if mse == 0 else 10 * math.log10(255**2 / mse)


def ms_ssim(a, b):
    """Multi-scale SSIM of two (H, W, 3) uint8 images, mean over RGB.

    Wang, Simoncelli, Bovik, "Multiscale structural similarity for image quality assessment",
    Asilomar 2003: Gaussian window of 11, sigma 1.5. Below 161 pixels on a side the fifth scale does
    not hold a window: as many scales as fit are used, their weights scaled to sum 1; below 11
    pixels the window shrinks to the side.
    """
    a, b = (torch.from_numpy(np.array(i)).permute(2, 0, 1).float() for i in (a, b))  # (3, H, W)
    side = min(a.shape[1:])
    window = min(11, side)
    scales = 1
    while scales < 5 and math.ceil(side / 2**scales) >= window:
        scales += 1
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    g = torch.exp(-0.5 * ((torch.arange(window) - (window - 1) / 2) / 1.5) ** 2)
    g = (g / g.sum()).tolist()

    def blur(x):  # sums of shifted copies: several times faster here than a convolution
        height, width = x.shape[1] - window + 1, x.shape[2] - window + 1
        x = sum(weight * x[:, :, k : k + width] for k, weight in enumerate(g))
        return sum(weight * x[:, k : k + height] for k, weight in enumerate(g))

    def halve(x):
        padding = [length % 2 for length in x.shape[1:]]
        return F.avg_pool2d(x, 2, padding=padding, count_include_pad=False)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    result = torch.ones(3)
    for k, weight in enumerate(weights):
        if k > 0:
            a, b = halve(a), halve(b)
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        term = (2 * covariance + c2) / (var_a + var_b + c2)
        if k == scales - 1:  # luminance counts at the coarsest scale alone
            term = term * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        result = result * term.mean((1, 2)).clamp(min=0) ** weight  # below 0 it would be NaN
    return min(result.mean().item(), 1.0)  # roundings can make it more


def pchip(x, y):
    """The monotone piecewise cubic through the points (x, y): a polynomial of v - x[i] a piece.

    Fritsch and Butland, "A method for constructing local monotone piecewise cubic interpolants",
    SIAM J. Sci. Stat. Comput. 1984.
    """
    h, slope = np.diff(x), np.diff(y) / np.diff(x)
    d = np.zeros_like(y)
    for i in range(1, len(x) - 1):
        if slope[i - 1] * slope[i] > 0:
            w1, w2 = 2 * h[i] + h[i - 1], h[i] + 2 * h[i - 1]
            d[i] = (w1 + w2) / (w1 / slope[i - 1] + w2 / slope[i])

    def end(h0, h1, s0, s1):  # one-sided three-point slope, kept monotone
        value = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
        if value * s0 <= 0:
            return 0.0
        return 3 * s0 if s0 * s1 < 0 and abs(value) > 3 * abs(s0) else value

    d[0], d[-1] = end(h[0], h[1], slope[0], slope[1]), end(h[-1], h[-2], slope[-1], slope[-2])
    pieces = []
    for i in range(len(h)):
        c2 = (3 * slope[i] - 2 * d[i] - d[i + 1]) / h[i]
        c3 = (d[i] + d[i + 1] - 2 * slope[i]) / h[i] ** 2
        pieces.append(np.poly1d([c3, c2, d[i], y[i]]))
    return pieces


def pchip_integral(x, y, low, high):
    """Integral over [low, high], within x, of the curve that `pchip` draws."""
    total = 0.0
    for i, piece in enumerate(pchip(x, y)):
        a, b = np.clip([low, high], x[i], x[i + 1]) - x[i]
        total += piece.integ()(b) - piece.integ()(a)
    return total


def pchip_values(x, y, at):
    """That curve at the places `at`, an array within the range of x."""
    piece_of = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    pieces = pchip(x, y)
    return np.array([pieces[i](v - x[i]) for i, v in zip(piece_of, at)])


def rate_differences(anchor, test, count=100):
    """How much more rate `test` needs than `anchor`, in percent, at each quality: see `bd_rate`.

    anchor, test: lists of (bpp, quality), as `bd_rate` takes them. Returns `count` qualities that
    both reach, and the percentages there.
    """
    low, high, _ = shared_range(anchor, test)
    quality = np.linspace(low, high, count)
    logarithms = []
    for points in (anchor, test):
        rate, reached = np.array(sorted(points), dtype=np.float64).T
        logarithms.append(pchip_values(reached, np.log(rate), quality))
    return quality, 100 * np.expm1(logarithms[1] - logarithms[0])


def shared_range(anchor, test):
    """Lowest and highest quality that both curves reach, and its share of the shorter curve's."""
    ranges = []
    for points in (anchor, test):
        quality = [q for _, q in points]
        ranges.append((min(quality), max(quality)))
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    shorter = min(r[1] - r[0] for r in ranges)
    return low, high, (high - low) / shorter


def bd_rate(anchor, test, names=("the first curve", "the second curve")):
    """Bjøntegaard delta rate in percent: how much more rate `test` needs at equal quality.

    Negative: less. anchor, test: lists of (bpp, quality). The logarithm of the rate is interpolated
    over quality by PCHIP and averaged over the common quality range. Returns (percent, None) or
    (None, why it cannot be compared), a sentence that calls the curves by `names`.
    """
    curves = []
    for name, points in zip(names, (anchor, test)):
        rate, quality = np.array(sorted(points), dtype=np.float64).reshape(-1, 2).T
        if len(rate) < 4:
            return None, f"{name} has {len(rate)} points, BD-rate needs 4"
        if not (np.isfinite(rate).all() and np.isfinite(quality).all() and (rate > 0).all()):
            return None, f"{name} has points that are not finite or not positive"
        if (np.diff(rate) <= 0).any() or (np.diff(quality) <= 0).any():
            return None, f"{name} does not rise: more bits must give better quality"
        curves.append((quality, np.log(rate)))
    low = max(quality[0] for quality, _ in curves)
    high = min(quality[-1] for quality, _ in curves)
    if low >= high:
        return None, "the curves share no quality range"
    anchor_area, test_area = (pchip_integral(*curve, low, high) for curve in curves)
    return 100 * math.expm1((test_area - anchor_area) / (high - low)), None
