"""image -> bytes -> image. The format, byte by byte, is in docs/bitstream.md.

What must agree between the encoder's machine and the decoder's is the table of each symbol.
It comes from h_s: an ordinary float32 convolution differs in its last bits between machines, and
one flipped table index scrambles the rest of the file. So h_s runs in float64, or in a quantized
codec in exact integers (integer.py). The mean of a Gaussian never enters the coder; a last bit
there moves a pixel by one step now and then.

g_a, h_a and g_s may run anywhere, in any precision: the decoder never repeats the first two.
"""

import copy
import math
from functools import partial

import numpy as np
import torch

from lic.codec import ans, checkpoint, fast, strips, structure
from lic.codec.header import MAX_SYMBOL, SIZE, Header, crc_of_symbols, pack_file, read_header
from lic.codec.integer import IntegerHyperSynthesis
from lic.files import MAX_PIXELS, BadStream, LicError
from lic.images import to_tensor
from lic.program import warn_of_slow_bf16


def load_coder(path, amp=False, device="cpu"):
    """The ImageCoder of a checkpoint. Raises LicError for a file that cannot be used."""
    model, meta = checkpoint.load_checkpoint(path)
    return ImageCoder(model, meta["tables"], meta["fingerprint"], amp, device)


class ImageCoder:
    """Encodes and decodes with one model.

    load_checkpoint gives model, tables and fingerprint; the model is put into eval mode. amp: g_a,
    h_a and g_s in bf16 autocast; device: where these three run, h_s and the entropy coder on the
    CPU always. A file made so is as valid and is read by any decoder.
    """

    def __init__(self, model, tables, fingerprint, amp=False, device="cpu"):
        self.amp, self.device = amp, torch.device(device)
        model.eval()
        self.model, self.tables = model, tables
        self.fingerprint = bytes.fromhex(fingerprint)[:8]
        networks = (model.g_a, model.h_a, model.g_s)
        if self.device == torch.device("cpu"):
            if amp:
                warn_of_slow_bf16()
            networks = map(fast.faster, networks)  # may be left out
        else:
            networks = (copy.deepcopy(network).to(device) for network in networks)
        self.g_a, self.h_a, self.g_s = networks
        if model.quantization:
            self.h_s = IntegerHyperSynthesis(model.h_s)
            fast.speed_up_h_s(self.h_s, model.h_s)  # may be left out
        else:
            self.h_s = copy.deepcopy(model.h_s).double()

    def encode(self, image, quality=None, max_pixels=MAX_PIXELS):
        """image (H, W, 3) uint8 of any size -> bytes.

        quality: a rate level, 0 to levels - 1, in steps of 1/256; by default the one in the middle.
        Raises TypeError for an array of another kind, LicError for another quality or more than
        max_pixels. train/effort.py makes better files, slowly.
        """
        level = self.level(quality)
        y, z = self.latents(image, level, max_pixels)
        return self.encode_latents(y, z, level, *image.shape[:2])

    def level(self, quality=None):
        """A quality as a file holds it, in steps of 1/256. Raises LicError for one out of range."""
        levels = len(self.model.lambdas)
        if quality is None:
            quality = self.middle_level()
        if not 0 <= quality <= levels - 1:
            raise LicError(
                f"quality {quality} is not between 0 and {levels - 1}, this checkpoint's levels"
            )
        return round(quality * 256) / 256

    @torch.inference_mode()
    def latents(self, image, level, max_pixels=MAX_PIXELS):
        """What g_a, with the gains, and h_a make of an image, padded to multiples of 64.

        y (1, M, H/16, W/16), z (1, Z, H/64, W/64), not rounded. level: as `level` gives it. Raises
        as `encode` does.
        """
        check_image(image)
        height, width = image.shape[:2]
        pixels = padded_pixels(height, width)
        if pixels > max_pixels:
            raise LicError(
                f"the image is {width}x{height}, padded {pixels} pixels, more than the limit of "
                f"{max_pixels}; raise it with --max-pixels, which the decoder will need too"
            )
        gain, _ = self.model.gains(torch.tensor([level]))
        y = self._analysis(pad_edges(image)) * gain
        return y, self._hyper_analysis(y)

    @torch.inference_mode()
    def encode_latents(self, y, z, level, height, width):
        """The bytes of an image of height x width pixels from its latents, which are rounded here.

        y, z: as `latents` gives them for such an image, or others of the same shapes.
        """
        z_symbols, z_index, y_symbols, y_index = self.symbols(y, z)
        z_words, z_escapes = ans.encode(z_symbols, z_index, self.tables["z"])
        y_words, y_escapes = ans.encode(y_symbols, y_index, self.tables["y"])

        words = [part.astype("<u4").tobytes() for part in (z_words, y_words)]
        escapes = [part.astype("<i4").tobytes() for part in (z_escapes, y_escapes)]
        lengths = len(z_words), len(y_words), len(z_escapes), len(y_escapes)
        header = Header(round(level * 256), height, width, self.fingerprint, lengths)
        symbols_crc = crc_of_symbols(header, z_symbols, y_symbols)
        return pack_file(header, symbols_crc, b"".join(words + escapes))

    @torch.inference_mode()
    def symbols(self, y, z):
        """What is coded of latents, and the table of each: z_symbols, z_index, y_symbols, y_index.

        y (1, M, h, w), z (1, Z, h', w'), as `latents` gives them; all flat, symbols int32.
        """
        z_symbols = integers(z, "z")
        mean, y_index = self.entropy_parameters(z_symbols.reshape(z.shape[1:]))
        return z_symbols, channel_index(z.shape[1:]), integers(y - mean, "y"), y_index

    @torch.inference_mode()
    def decode(self, data, max_pixels=MAX_PIXELS):
        """bytes -> image (H, W, 3) uint8. Raises BadStream rather than return a wrong image."""
        header, symbols_crc = read_header(data)
        self._check(header, max_pixels)
        z_words, y_words, z_escapes, y_escapes = split_payload(data, header.lengths)
        z_shape = self.model.config["widths"]["z"], *coarsest_size(header.height, header.width)
        z_symbols = ans.decode(z_words, z_escapes, channel_index(z_shape), self.tables["z"])
        mean, y_index = self.entropy_parameters(z_symbols.reshape(z_shape))
        y_symbols = ans.decode(y_words, y_escapes, y_index, self.tables["y"])
        if crc_of_symbols(header, z_symbols, y_symbols) != symbols_crc:
            raise BadStream(
                "the decoded symbols are not the encoder's: the file was forged, "
                "or this machine computes h_s differently"
            )
        _, inverse_gain = self.model.gains(torch.tensor([header.quality / 256]))
        y_hat = (torch.from_numpy(y_symbols).reshape(mean.shape) + mean).float()
        y_hat = y_hat.contiguous(memory_format=torch.channels_last)
        image = self._synthesis(y_hat * inverse_gain)  # (H', W', 3)
        return np.ascontiguousarray(image[: header.height, : header.width])

    def middle_level(self):
        """2 of five levels, 0 of one."""
        return len(self.model.lambdas) // 2

    def _check(self, header, max_pixels):
        """Raise BadStream for a file that this model did not make, or that is too large."""
        if header.fingerprint != self.fingerprint:
            raise BadStream(
                f"the file was made by model {header.fingerprint.hex()}, this checkpoint is "
                f"{self.fingerprint.hex()}; decode with the same model"
            )
        pixels = padded_pixels(header.height, header.width)
        if pixels > max_pixels:
            raise BadStream(
                f"the file declares {header.width}x{header.height}, padded {pixels} pixels, more "
                f"than the limit of {max_pixels}; raise it with --max-pixels"
            )
        level = header.quality / 256
        if level > len(self.model.lambdas) - 1:
            raise BadStream(f"the file declares quality {level}, which this model does not have")

    def _run(self, network, x):
        """network(x), from CPU to CPU, in bf16 if that was asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return network(x.to(self.device)).float().cpu()

    def _analysis(self, image):
        """image (H', W', 3) uint8, padded -> g_a's y (1, M, H/16, W/16)."""
        side = strips.coarse_side("g_a")  # 16 pixels
        height, width = image.shape[0] // side, image.shape[1] // side

        def rows(start, end):
            return to_tensor([image[side * start : side * end]]) - 0.5

        return strips.down("g_a", partial(self._run, self.g_a), height, width, rows)

    def _hyper_analysis(self, y):
        """y (1, M, H/16, W/16) -> h_a's z (1, Z, H/64, W/64)."""
        side = strips.coarse_side("h_a") // strips.coarse_side("g_a")  # 4 positions of y
        height, width = y.shape[2] // side, y.shape[3] // side

        def rows(start, end):
            return y[:, :, side * start : side * end]

        return strips.down("h_a", partial(self._run, self.h_a), height, width, rows)

    def _synthesis(self, y_hat):
        """y_hat (1, M, H/16, W/16), gains undone -> g_s's picture (H', W', 3) uint8."""
        parts = []
        for (x_hat,) in strips.up("g_s", lambda rows: (self._run(self.g_s, rows),), y_hat):
            if not x_hat.isfinite().all():
                raise BadStream("g_s gives no number for these symbols: the file was forged")
            pixels = ((x_hat[0] + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            parts.append(pixels.permute(1, 2, 0).numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def entropy_parameters(self, z_hat):
        """z_hat (Z, h, w) int32 -> mean (1, M, 4h, 4w) float64, index (M * 4h * 4w,) uint8."""
        z_hat = torch.from_numpy(z_hat).double()[None]
        z_hat = z_hat.contiguous(memory_format=torch.channels_last)

        def hyper_synthesis(rows):
            if self.model.quantization:  # IntegerHyperSynthesis gives the index itself
                mean, index = self.h_s(rows)
            else:
                mean, log_scale = self.h_s(rows).chunk(2, 1)
                index = self.model.prior_y.scale_index(log_scale)
            return mean, index.to(torch.uint8)

        means, indices = zip(*strips.up("h_s", hyper_synthesis, z_hat))
        return torch.cat(means, 2), torch.cat(indices, 2).flatten().numpy()


def check_image(image):
    """TypeError unless image is an array (H, W, 3) of uint8."""
    found = type(image).__name__
    if isinstance(image, np.ndarray):
        found = f"array {image.shape} of {image.dtype}"
        has_shape = image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        if has_shape and image.dtype == np.uint8:
            return
    raise TypeError(
        f"an image is an array (H, W, 3) of uint8, RGB from 0 to 255; this is {found}: "
        "lic.images.read_image gives such an array of any file"
    )


def pad_edges(image):
    """(H, W, 3) -> (H', W', 3): right and bottom edge repeated to multiples of 64."""
    height, width = image.shape[:2]
    stride = structure.total_stride()
    right, bottom = -width % stride, -height % stride
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")


def padded(image):
    """(H, W, 3) uint8 -> (1, 3, H', W') in [0, 1], padded."""
    return to_tensor([pad_edges(image)])


def coarsest_size(height, width):
    """Height and width of an image's coarsest latent, z: so many strides, rounded up."""
    stride = structure.total_stride()
    return math.ceil(height / stride), math.ceil(width / stride)


def padded_pixels(height, width):
    """Pixels of an image after padding: what its size costs in memory."""
    return math.prod(coarsest_size(height, width)) * structure.total_stride() ** 2


def channel_index(shape):
    """The table of each z: its channel. shape (Z, h, w) -> (Z * h * w,) uint16."""
    channels, h, w = shape
    return np.repeat(np.arange(channels, dtype=np.uint16), h * w)


def integers(tensor, what):
    """Rounded latent as flat int32, in (channel, row, column) order.

    Raises LicError for what an integer cannot hold.
    """
    tensor = tensor.round()
    if not (tensor.isfinite().all() and tensor.abs().max() < MAX_SYMBOL):
        raise LicError(
            f"the model gives {what} that is not finite or beyond 2^30; its weights are not usable"
        )
    return tensor.to(torch.int32).flatten().numpy()


def split_payload(data, lengths):
    """Words of z and y, uint32, and escapes of z and y, int32, from the bytes of a file."""
    parts, start = [], SIZE
    for length, kind in zip(lengths, ("<u4", "<u4", "<i4", "<i4")):
        end = start + 4 * length
        part = np.frombuffer(data[start:end], kind)
        parts.append(part.astype(part.dtype.newbyteorder("=")))
        start = end
    for escapes in parts[2:]:
        if (np.abs(escapes.astype(np.int64)) >= MAX_SYMBOL).any():
            raise BadStream("the file holds a symbol of 2^30 or more, which no encoder writes")
    return parts
