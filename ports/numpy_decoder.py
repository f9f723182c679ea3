"""The whole decoder in NumPy and constriction, written from docs/bitstream.md and docs/porting.md.

    python -m lic export codec.npz          the codec that `python -m lic compress` takes
    python ports/numpy_decoder.py codec.npz photo.lic photo.png

No torch and nothing of lic: what a port to another framework has to do, at one place and slowly.
Images are (H, W, 3), latents and weights are channels first, one image at a time.
"""

import json
import struct
import sys
import zipfile
import zlib

import numpy as np

HEADER = struct.Struct("<4sBHII8sIIIIII")
LOG_SCALE_MIN, LOG_SCALE_STEP = np.log(0.11), (np.log(256.0) - np.log(0.11)) / 63
PEDESTAL, BETA_MIN = 2.0**-36, 1e-6


def conv(x, weight, bias, stride):
    """Cross-correlation with zero padding k // 2: x (in, h, w), weight (out, in, k, k)."""
    k = weight.shape[2]
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]  # (in, h', w', k, k)
    return np.tensordot(weight, windows, axes=([1, 2, 3], [0, 3, 4])) + bias[:, None, None]


def deconv(x, weight, bias):
    """ConvTranspose2d 5x5, stride 2, padding 2, output padding 1.

    x (in, h, w), weight (in, out, 5, 5). Input pixel (i, j) adds weight times its value to the
    outputs (2i - 2 .. 2i + 2, 2j - 2 .. 2j + 2). The same as zeros between the pixels and a
    convolution with the kernel turned by 180 degrees.
    """
    channels, h, w = x.shape
    spread = np.zeros((channels, 2 * h, 2 * w), x.dtype)
    spread[:, ::2, ::2] = x
    turned = weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    return conv(spread, turned, bias, stride=1)


def gdn(x, beta, gamma, inverse):
    """beta and gamma as stored: square roots, bounded from below. x (C, h, w), gamma (out, in)."""
    beta = np.maximum(beta, (BETA_MIN + PEDESTAL) ** 0.5) ** 2 - PEDESTAL
    gamma = np.maximum(gamma, PEDESTAL**0.5) ** 2 - PEDESTAL
    energy = beta[:, None, None] + np.tensordot(gamma, x * x, axes=1)
    return x * np.sqrt(energy) if inverse else x / np.sqrt(energy)


def leaky_relu(x):
    return np.where(x < 0, x / 8, x)


class Decoder:
    """arrays: what `python -m lic export` writes."""

    def __init__(self, arrays):
        self.arrays = arrays
        about = json.loads(str(arrays["about"]))
        self.fingerprint = bytes.fromhex(about["fingerprint"])[:8]
        self.widths = about["config"]["widths"]
        quantization = about["quantization"]
        self.quantized = quantization is not None
        if self.quantized:
            self.float_inputs = ["g_s.conv1", *quantization.pop("float_inputs", [])]
            if quantization != {"weight_bits": 8, "activation_bits": 8, "h_s": "16-bit integers"}:
                raise ValueError(f"this decoder does not know {quantization}")

    def layer(self, name, x):
        """One convolution in x's precision.

        The 8-bit weight and input of a quantized codec are made plain.
        """
        weight = self.arrays[f"{name}.weight"].astype(x.dtype)
        bias = self.arrays[f"{name}.bias"].astype(x.dtype)
        if self.quantized:
            weight = weight * self.arrays[f"{name}.weight_scale"]
            if name not in self.float_inputs:
                scale = self.arrays[f"{name}.input_scale"]
                x = np.clip(np.rint(x / scale), -128, 127) * scale
        return self.convolve(name, x, weight, bias)

    @staticmethod
    def convolve(name, x, weight, bias):
        """All layers of a decoder double height and width but this one."""
        if name == "h_s.conv3":
            return conv(x, weight, bias, stride=1)
        return deconv(x, weight, bias)

    def float_h_s(self, z_hat):
        """z_hat (Z, h, w) integers -> mean (M, 4h, 4w) and table index, in float64."""
        x = leaky_relu(self.layer("h_s.conv1", z_hat.astype(np.float64)))
        x = leaky_relu(self.layer("h_s.conv2", x))
        mean, log_scale = np.split(self.layer("h_s.conv3", x), 2)
        index = np.rint((log_scale - LOG_SCALE_MIN) / LOG_SCALE_STEP)
        return mean, np.clip(index, 0, 63)

    def integer_h_s(self, z_hat):
        """The same for a quantized codec: exact in any order of summation."""
        x = z_hat.astype(np.float64)
        for name in ("h_s.conv1", "h_s.conv2", "h_s.conv3"):
            weight = self.arrays[f"{name}.weight"].astype(np.float64)
            bias = self.arrays[f"{name}.integer_bias"].astype(np.float64)
            multiplier = self.arrays[f"{name}.multiplier"][:, None, None]
            sums = self.convolve(name, x, weight, bias)
            if name == "h_s.conv3":
                mean, index = np.split(np.rint(sums * multiplier), 2)
            else:
                x = np.clip(np.rint(leaky_relu(sums) * multiplier), -8224, 57311)
        return mean / 4096, np.clip(index, 0, 63)

    def g_s(self, y):
        """y (M, h, w) float32, gains undone -> x_hat (3, 16h, 16w)."""
        for k in (1, 2, 3):
            y = self.layer(f"g_s.conv{k}", y)
            beta, gamma = self.arrays[f"g_s.gdn{k}.beta"], self.arrays[f"g_s.gdn{k}.gamma"]
            y = gdn(y, beta, gamma, inverse=True)
        return self.layer("g_s.conv4", y) + np.float32(0.5)

    def symbols(self, kind, words, escapes, table_index):
        """Entropy decoding: integers in the order of table_index, which names the table of each."""
        import constriction  # here: the networks need none

        counts = self.arrays[f"tables.{kind}.counts"]
        sizes = self.arrays[f"tables.{kind}.sizes"]
        offsets = self.arrays[f"tables.{kind}.offsets"]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        ans = constriction.stream.stack.AnsCoder(words.astype(np.uint32))
        symbols = np.empty(len(table_index), np.int32)
        used = 0
        for t in np.unique(table_index):
            places = np.flatnonzero(table_index == t)
            p = counts[starts[t] : starts[t + 1]] - 1.0
            # perfect=False: exactly the stored counts
            table = constriction.stream.model.Categorical(p, perfect=False)
            entries = ans.decode(table, len(places))
            symbols[places] = entries + offsets[t]
            escaped = places[entries == sizes[t] - 1]
            if used + len(escaped) > len(escapes):
                raise ValueError("the escaped values run out")
            symbols[escaped] = escapes[used : used + len(escaped)]
            used += len(escaped)
        if used < len(escapes) or not ans.is_empty():
            raise ValueError("the entropy-coded data does not end where it must")
        return symbols

    def decode(self, data):
        """bytes -> z and y symbols (flat int32) and the image (H, W, 3) uint8.

        ValueError for a bad file.
        """
        if len(data) < HEADER.size:
            raise ValueError("the file is truncated")
        fields = HEADER.unpack_from(data)
        magic, version, quality, H, W, fingerprint, *lengths, symbols_crc, crc = fields
        if magic != b"LIC\x89" or version != 2 or fingerprint != self.fingerprint:
            raise ValueError("not a file of this codec")
        expected_crc = zlib.crc32(data[47:], zlib.crc32(data[:43]))
        if len(data) != 47 + 4 * sum(lengths) or expected_crc != crc:
            raise ValueError("the file is damaged")
        payload = np.frombuffer(data, "<u4", offset=47)
        z_words, y_words, z_escapes, y_escapes = np.split(payload, np.cumsum(lengths)[:-1])
        z_escapes, y_escapes = z_escapes.view("<i4"), y_escapes.view("<i4")
        h, w = -(-H // 64), -(-W // 64)  # rounded up
        if not 0 < h * w * 64**2 <= 2**25 or quality > 256 * (len(self.arrays["log_gain"]) - 1):
            raise ValueError(f"the file declares {W}x{H} pixels at quality {quality / 256}")
        for escapes in (z_escapes, y_escapes):
            if (np.abs(escapes.astype(np.int64)) >= 2**30).any():
                raise ValueError("the file holds a symbol of 2^30 or more")

        z_index = np.repeat(np.arange(self.widths["z"]), h * w)
        z = self.symbols("z", z_words, z_escapes, z_index)
        h_s = self.integer_h_s if self.quantized else self.float_h_s
        mean, y_index = h_s(z.reshape(-1, h, w))
        y = self.symbols("y", y_words, y_escapes, y_index.ravel().astype(int))
        z_crc = zlib.crc32(z.astype("<i4"), zlib.crc32(data[:39]))
        if zlib.crc32(y.astype("<i4"), z_crc) != symbols_crc:
            raise ValueError("the symbols are not the encoder's")

        log_gains = self.arrays["log_inverse_gain"]
        low, fraction = divmod(quality / 256, 1)
        high = min(int(low) + 1, len(log_gains) - 1)
        inverse_gain = np.exp(log_gains[int(low)] * (1 - fraction) + log_gains[high] * fraction)
        y_hat = (y.reshape(mean.shape) + mean).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # forged symbols may be that large
            x_hat = self.g_s(y_hat * inverse_gain.astype(np.float32)[:, None, None])[:, :H, :W]
        if not np.isfinite(x_hat).all():
            raise ValueError("g_s gives no number for these symbols")
        pixels = np.rint(255 * np.clip(x_hat, 0, 1)).astype(np.uint8)
        return z, y, pixels.transpose(1, 2, 0)


if __name__ == "__main__":
    from PIL import Image  # only to write the PNG

    if len(sys.argv) != 4:
        sys.exit("usage: python ports/numpy_decoder.py codec.npz photo.lic photo.png")
    archive, compressed, png = sys.argv[1:]
    if not png.endswith(".png"):
        sys.exit("error: this writes PNG; end the name in .png")
    try:
        with open(compressed, "rb") as file:
            _, _, pixels = Decoder(dict(np.load(archive))).decode(file.read())
        Image.fromarray(pixels).save(png)
    except (OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")
