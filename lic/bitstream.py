"""image -> bytes -> image. The format, byte by byte, is in docs/bitstream.md.

What must agree between the encoder's machine and the decoder's is the table of each symbol.
It comes from h_s: an ordinary float32 convolution differs in its last bits between machines, and
one flipped table index scrambles the rest of the file. So h_s runs on the CPU, in float64, or in a
quantized codec in exact integers (integer.py).
The mean of a Gaussian never enters the coder; a last bit there moves a pixel by one step now and then.

g_a, h_a and g_s may run anywhere, in any precision: the decoder never repeats the first two.
"""

import copy
import struct
import zlib

import numpy as np
import torch
from torch.nn import functional as F

from lic import coder, int8
from lic.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS
from lic.files import BadStream, LicError, warn_of_slow_bf16
from lic.images import to_tensor
from lic.integer import MAX_SYMBOL
from lic.models import STRIDE

MAGIC, VERSION = b"LIC\x89", 2
# magic, version, quality in 1/256 level, height, width, model fingerprint,
# words of z and y, escapes of z and y, CRC-32 of fields and symbols, CRC-32 of the file without this field
HEADER = struct.Struct("<4sBHII8sIIIIII")
MAX_PIXELS = 2**25  # after padding; tests/benchmark.py prints what 4 megapixels take at base widths


@torch.no_grad()
def build_tables(model):
    """The coder's tables for z (one a channel) and y (one a scale), as coder.Tables.

    Called once, when a checkpoint is saved. The tables travel with the weights because a decoder
    that computes them anew on another machine may round a count the other way.
    """
    prior = copy.deepcopy(model.prior_z).cpu().double()
    channels = model.config["widths"]["z"]

    def cdf_z(v):  # (channels, N)
        return torch.sigmoid(prior.logits(torch.from_numpy(v).double()[:, None])[:, 0]).numpy()

    scales = torch.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * torch.arange(SCALE_LEVELS, dtype=torch.float64))

    def cdf_y(v):  # (SCALE_LEVELS, N)
        return (0.5 * torch.erfc(-torch.from_numpy(v) / scales[:, None] * 0.5**0.5)).numpy()

    return {"z": coder.build_tables(cdf_z, channels), "y": coder.build_tables(cdf_y, SCALE_LEVELS)}


def padded(image):
    """image (H, W, 3) uint8 -> x (1, 3, H', W') in [0, 1]: right and bottom edges repeated to multiples of 64."""
    height, width = image.shape[:2]
    return F.pad(to_tensor([image]), (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


def _integers(tensor, what):
    """Rounded latent as flat int32, in (channel, row, column) order; refuses what an integer cannot hold."""
    tensor = tensor.round()
    if not (tensor.isfinite().all() and tensor.abs().max() < MAX_SYMBOL):
        raise LicError(f"the model gives {what} that is not finite or beyond 2^30; its weights are not usable")
    return tensor.to(torch.int32).flatten().numpy()


class ImageCoder:
    """Compresses and decompresses with one model. checkpoint.load gives model, tables and fingerprint.

    On the CPU the networks run in a faster form, a quantized codec's on int8 kernels where there are any (int8.py).
    amp: g_a, h_a and g_s in bf16 autocast. A file made so is as valid and is read by any decoder.
    """

    def __init__(self, model, tables, fingerprint, amp=False):
        self.model = model.eval()
        self.amp = amp
        h_s = copy.deepcopy(model.h_s).cpu()
        self.h_s = int8.Int8HyperSynthesis(h_s) if model.quantization else h_s.double()
        self.g_a, self.h_a, self.g_s = model.g_a, model.h_a, model.g_s
        if model.log_gain.device.type == "cpu":
            if amp:
                warn_of_slow_bf16()
            self.g_a, self.h_a, self.g_s = (int8.convert(network) for network in (model.g_a, model.h_a, model.g_s))
        self.tables = tables
        self.fingerprint = bytes.fromhex(fingerprint)[:8]

    def _network(self, network, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            return network(x).float()

    def _entropy_parameters(self, z_hat):
        """z_hat (Z, h, w) int32 -> mean (1, M, 4h, 4w) float64, table index (M * 4h * 4w,) uint8."""
        z_hat = torch.from_numpy(z_hat).double()[None].contiguous(memory_format=torch.channels_last)
        if self.model.quantization:
            mean, index = self.h_s(z_hat)
        else:
            mean, log_scale = self.h_s(z_hat).chunk(2, 1)
            index = self.model.prior_y.scale_index(log_scale)
        return mean, index.flatten().to(torch.uint8).numpy()

    def _z_index(self, h, w):
        return np.repeat(np.arange(self.model.config["widths"]["z"], dtype=np.uint16), h * w)

    @torch.inference_mode()
    def compress(self, image, quality, max_pixels=MAX_PIXELS):
        """image (H, W, 3) uint8 of any size, quality a level in [0, levels - 1], in steps of 1/256 -> bytes.
        Raises LicError for another quality or more than max_pixels."""
        levels = len(self.model.lambdas)
        if not 0 <= quality <= levels - 1:
            raise LicError(f"quality {quality} is not between 0 and {levels - 1}, this checkpoint's levels")
        quality = round(quality * 256)
        height, width = image.shape[:2]
        if padded_pixels(height, width) > max_pixels:
            raise LicError(f"the image has {width}x{height} pixels, more than the limit of {max_pixels}; "
                           f"raise it with --max-pixels, which the decoder will need too")  # fmt: skip
        device = self.model.log_gain.device
        x = padded(image).to(device)
        gain, _ = self.model.gains(torch.tensor([quality / 256], device=device))
        y = self._network(self.g_a, x - 0.5) * gain  # (1, M, H/16, W/16)
        z = self._network(self.h_a, y).cpu()  # (1, Z, H/64, W/64)

        z_symbols = _integers(z, "z")
        mean, y_index = self._entropy_parameters(z_symbols.reshape(z.shape[1:]))
        y_symbols = _integers(y.cpu() - mean, "y")
        z_words, z_escapes = coder.encode(z_symbols, self._z_index(*z.shape[2:]), self.tables["z"])
        y_words, y_escapes = coder.encode(y_symbols, y_index, self.tables["y"])

        payload = b"".join(part.astype("<u4" if part.dtype == np.uint32 else "<i4").tobytes()
                           for part in (z_words, y_words, z_escapes, y_escapes))  # fmt: skip
        lengths = len(z_words), len(y_words), len(z_escapes), len(y_escapes)
        header = HEADER.pack(MAGIC, VERSION, quality, height, width, self.fingerprint, *lengths, 0, 0)[:-8]
        header += struct.pack("<I", _symbols_crc(header, z_symbols, y_symbols))
        return header + struct.pack("<I", zlib.crc32(payload, zlib.crc32(header))) + payload

    @torch.inference_mode()
    def decompress(self, data, max_pixels=MAX_PIXELS):
        """bytes -> image (H, W, 3) uint8. Raises BadStream rather than return a wrong image."""
        header = read_header(data)
        if header["fingerprint"] != self.fingerprint:
            raise BadStream(f"the file was made by model {header['fingerprint'].hex()}, "
                            f"this checkpoint is {self.fingerprint.hex()}; decode with the same model")  # fmt: skip
        height, width, level = header["height"], header["width"], header["quality"]
        if padded_pixels(height, width) > max_pixels:
            raise BadStream(f"the file declares {width}x{height} pixels, more than the limit of {max_pixels}; "
                            f"raise it with --max-pixels")  # fmt: skip
        if level > len(self.model.lambdas) - 1:
            raise BadStream(f"the file declares quality {level}, which this model does not have")
        lengths = header["lengths"]
        cuts = HEADER.size + 4 * np.cumsum([0, *lengths])
        types = ("<u4", "<u4", "<i4", "<i4")
        z_words, y_words, z_escapes, y_escapes = (
            np.frombuffer(data[a:b], t).astype(t[1:]) for a, b, t in zip(cuts, cuts[1:], types)
        )
        if any((np.abs(part.astype(np.int64)) >= MAX_SYMBOL).any() for part in (z_escapes, y_escapes)):
            raise BadStream("the file holds a symbol of 2^30 or more, which no encoder writes")
        h, w = -(-height // STRIDE), -(-width // STRIDE)
        z_symbols = coder.decode(z_words, z_escapes, self._z_index(h, w), self.tables["z"])
        mean, y_index = self._entropy_parameters(z_symbols.reshape(-1, h, w))
        y_symbols = coder.decode(y_words, y_escapes, y_index, self.tables["y"])
        if _symbols_crc(data[: HEADER.size - 8], z_symbols, y_symbols) != header["symbols_crc"]:
            raise BadStream("the decoded symbols are not the encoder's: the file was forged, "
                            "or this machine computes h_s differently")  # fmt: skip

        device = self.model.log_gain.device
        _, inverse_gain = self.model.gains(torch.tensor([level], device=device))
        y_hat = (torch.from_numpy(y_symbols).reshape(mean.shape) + mean).float().to(device)
        x_hat = self._network(self.g_s, y_hat.contiguous(memory_format=torch.channels_last) * inverse_gain) + 0.5
        x_hat = (x_hat[0, :, :height, :width].clamp(0, 1) * 255).round().to(torch.uint8)
        return x_hat.permute(1, 2, 0).contiguous().cpu().numpy()


def padded_pixels(height, width):
    """Pixels of an image after padding: what its size costs in memory."""
    return -(-height // STRIDE) * -(-width // STRIDE) * STRIDE**2


def _symbols_crc(fields, z_symbols, y_symbols):
    """CRC-32 of the header's fields before it and of all symbols."""
    crc = zlib.crc32(fields)
    for symbols in (z_symbols, y_symbols):
        crc = zlib.crc32(symbols.astype("<i4").tobytes(), crc)
    return crc


def read_header(data):
    """Fields of a compressed file after checking all that can be checked without the model; BadStream says what is wrong."""
    if data[:4] != MAGIC:
        raise BadStream("this is not a lic file: it does not begin with its magic number")
    if len(data) > 4 and data[4] != VERSION:
        raise BadStream(f"the file has format version {data[4]}; this program reads version {VERSION}")
    if len(data) < HEADER.size:
        raise BadStream("the file is truncated: its header is not complete")
    _, _, quality, height, width, fingerprint, *lengths, symbols_crc, crc = HEADER.unpack_from(data)
    if len(data) != HEADER.size + 4 * sum(lengths):
        raise BadStream(f"the file has {len(data)} bytes where its header declares {HEADER.size + 4 * sum(lengths)}")
    if zlib.crc32(data[HEADER.size :], zlib.crc32(data[: HEADER.size - 4])) != crc:
        raise BadStream("the file is damaged: its checksum does not match")
    if height == 0 or width == 0:
        raise BadStream(f"the file declares an image of {width}x{height} pixels")
    return {"quality": quality / 256, "height": height, "width": width, "fingerprint": fingerprint,
            "lengths": lengths, "symbols_crc": symbols_crc}  # fmt: skip
