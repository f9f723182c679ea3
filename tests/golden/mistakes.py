"""Mistakes in h_s that most files do not notice: those in exact/ refuse each of them."""

import numpy as np
from numpy_decoder import Decoder, leaky_relu


def float32(values):
    """The nearest float32, in float64."""
    return np.asarray(values, np.float32).astype(np.float64)


def half_up(values):
    return np.floor(values + 0.5)


def half_away_from_zero(values):
    return np.sign(values) * np.floor(np.abs(values) + 0.5)


def one_by_one(name, x, weight, bias, backwards):
    """Decoder.convolve with its products added in one order, so that all machines round alike."""
    if name != "h_s.conv3":  # see numpy_decoder.deconv
        channels, h, w = x.shape
        spread = np.zeros((channels, 2 * h, 2 * w), x.dtype)
        spread[:, ::2, ::2] = x
        x, weight = spread, weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    out_channels, _, k, _ = weight.shape
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    taps = windows.transpose(0, 3, 4, 1, 2).reshape(-1, *windows.shape[1:3])
    rows = weight.reshape(out_channels, -1)
    total = np.zeros((out_channels, *windows.shape[1:3]), x.dtype)
    for tap in reversed(range(len(taps))) if backwards else range(len(taps)):
        total = total + rows[:, tap, None, None] * taps[tap]
    return total + bias[:, None, None]


class MistakenDecoder(Decoder):
    """The decoder of ports/ with one thing wrong; without an argument, nothing is.

    multiplier, sums, product, rounded: what an integer h_s does to the multipliers of a layer, to
    its sums, to their product, and instead of rounding half to even. precision: of a float h_s;
    where it is float32 the products are added forwards or backwards.
    """

    def __init__(
        self,
        arrays,
        multiplier=np.asarray,
        sums=np.asarray,
        product=np.asarray,
        rounded=np.rint,
        precision=np.float64,
        backwards=False,
    ):
        super().__init__(arrays)
        self.mistakes, self.precision = (multiplier, sums, product, rounded), precision
        self.backwards = backwards

    def h_s(self, z_hat):
        return self.integer_h_s(z_hat) if self.quantized else self.float_h_s(z_hat)

    def layer(self, name, x):
        """All of a float h_s goes through here."""
        return super().layer(name, x.astype(self.precision) if name.startswith("h_s") else x)

    def convolve(self, name, x, weight, bias):
        if name.startswith("h_s") and x.dtype == np.float32:
            return one_by_one(name, x, weight, bias, self.backwards)
        return Decoder.convolve(name, x, weight, bias)

    def integer_h_s(self, z_hat):
        multiplier, sums, product, rounded = self.mistakes
        x = z_hat.astype(np.float64)
        for name in ("h_s.conv1", "h_s.conv2", "h_s.conv3"):
            weight = self.arrays[f"{name}.weight"].astype(np.float64)
            bias = self.arrays[f"{name}.integer_bias"].astype(np.float64)
            m = multiplier(self.arrays[f"{name}.multiplier"][:, None, None])
            x = sums(self.convolve(name, x, weight, bias))
            if name != "h_s.conv3":
                x = np.clip(rounded(product(leaky_relu(x) * m)), -8224, 57311)
        mean, index = np.split(rounded(product(x * m)), 2)
        return mean / 4096, np.clip(index, 0, 63)


FLOAT_MISTAKES = {
    "h_s in float32": {"precision": np.float32},
    "h_s in float32, summed backwards": {"precision": np.float32, "backwards": True},
}
INTEGER_MISTAKES = {
    "multipliers in float32": {"multiplier": float32},
    "products rounded to float32": {"product": float32},
    "all of it in float32": {"multiplier": float32, "sums": float32, "product": float32},
    "half rounded up": {"rounded": half_up},
    "half rounded away from zero": {"rounded": half_away_from_zero},
}
