"""What evaluate.py and the tools measure: codecs with real files, and Pillow's beside them."""

import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

import lic
from lic.codec import structure
from lic.codec.bitstream import ImageCoder, padded, padded_pixels
from lic.codec.checkpoint import load_checkpoint
from lic.files import LicError, claim_output, read_bytes, write_bytes
from lic.images import digest
from lic.metrics import ms_ssim, psnr

CLASSICAL = {  # name: (Pillow format, feature to ask for, qualities)
    "jpeg": ("JPEG", "jpg", (5, 10, 20, 30, 45, 60, 75, 90)),
    "webp": ("WEBP", "webp", (1, 5, 15, 30, 50, 70, 85)),
    "avif": ("AVIF", "avif", (15, 30, 40, 50, 60, 75)),
}
LOSSLESS = 100.0  # dB, instead of infinity, for a picture that comes back exactly
FIGURES = {"bpp", "psnr", "ms_ssim", "encode_seconds", "decode_seconds"}  # of a file
ALIVE = 0.001  # bits a position that a channel of y or z must carry to count as alive


def bits_per_pixel(size, image):
    """Of a file of `size` bytes."""
    return 8 * size / (image.shape[0] * image.shape[1])


@torch.inference_mode()
def ideal_bits(model, image, level):
    """-log2 p of the rounded latents, by channel of y and of z: (M,) and (Z,) float64.

    With continuous scales, and at most 24 bits a symbol (MAX_BITS, the least probability of a
    table).
    """
    out = model(padded(image), torch.tensor([float(level)]))
    return out.y_bits[0].double().numpy(), out.z_bits[0].double().numpy()


class Record:
    """Figures of the files that an evaluation has measured, kept in a JSON file as it goes.

    An evaluation that was stopped takes from it what is there. It does not know the version of the
    code or the machine. path: None for no file; inputs: what else the command reads and writes.
    Raises LicError for a file that is no record.
    """

    def __init__(self, path=None, inputs=()):
        self.path, self.figures = path, {}
        if path is None:
            return
        claim_output(path, ".json", overwrite=True, inputs=inputs)
        data = read_bytes(path) if Path(path).exists() else b""
        if data:
            try:
                self.figures = json.loads(data)["measured"]
                for figures in self.figures.values():
                    if figures.keys() != FIGURES or {type(v) for v in figures.values()} != {float}:
                        raise ValueError("other figures")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise LicError(f"{path} is no record of measured files; name another") from error
            print(f"{path}: {len(self.figures)} files measured before")

    def look_up(self, key, measure):
        """The figures of `key`, by `measure()` if they are not known yet."""
        if key not in self.figures:
            self.figures[key] = measure()
            if self.path:
                write_bytes(self.path, json.dumps({"measured": self.figures}, indent=1).encode())
        return self.figures[key]


def measure_image(coder, image, level, path, effort=0):
    """One file: its figures, and how many seconds it took to encode and to decode."""
    start = time.perf_counter()
    data = lic.encode(coder, image, level, effort)
    encoded = time.perf_counter()
    path.write_bytes(data)
    data = path.read_bytes()
    reading = time.perf_counter()
    decoded = coder.decode(data)
    end = time.perf_counter()
    return {
        "bpp": bits_per_pixel(path.stat().st_size, image),
        "psnr": min(psnr(image, decoded), LOSSLESS),
        "ms_ssim": ms_ssim(image, decoded),
        "encode_seconds": encoded - start,
        "decode_seconds": end - reading,
    }


def measure_level(coder, images, level, folder, effort=0, record=None):
    """One level of one checkpoint, averaged over the images."""
    record = record or Record()
    precision = "bf16" if coder.amp else "float32"
    rows = []
    for image in images:
        key = (
            f"codec {coder.fingerprint.hex()}, image {digest(image).hex()}, level {level}, "
            f"effort {effort}, {precision}, {torch.get_num_threads()} threads"
        )

        def measure():
            return measure_image(coder, image, level, folder / "image.lic", effort)

        rows.append(record.look_up(key, measure))
    return {"lmbda": coder.model.lambdas[level], **mean_of(rows)}


def ideal_level(model, images, level):
    """The ideal rate of a level, without effort, and how many channels of y and z are alive."""
    ideal_bpp, pixels, y_total, z_total = [], 0, 0, 0
    for image in images:
        y_bits, z_bits = ideal_bits(model, image, level)
        ideal_bpp.append(bits_per_pixel((y_bits.sum() + z_bits.sum()) / 8, image))
        pixels += padded_pixels(*image.shape[:2])
        y_total, z_total = y_total + y_bits, z_total + z_bits
    where = structure.positions()
    return {
        "ideal_bpp": float(np.mean(ideal_bpp)),
        "alive_y": int((y_total / (pixels * where["y"]) > ALIVE).sum()),
        "alive_z": int((z_total / (pixels * where["z"]) > ALIVE).sum()),
    }


def mean_of(rows):
    """Dicts of the same figures, averaged."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def measure_checkpoint(path, images, amp=False, effort=0, record=None):
    """All levels of a checkpoint. effort: steps of train/effort.py; record: a Record or None."""
    model, meta = load_checkpoint(path)
    coder = ImageCoder(model, meta["tables"], meta["fingerprint"], amp)
    coder.decode(coder.encode(images[0], 0))  # warm-up
    levels = []
    with tempfile.TemporaryDirectory() as folder:
        for level in range(len(model.lambdas)):
            row = measure_level(coder, images, level, Path(folder), effort, record)
            if effort == 0:
                row |= ideal_level(model, images, level)
            levels.append(row)
    macs, widths = structure.kmac_per_pixel(model.config), model.config["widths"]
    return {
        "path": path,
        "fingerprint": meta["fingerprint"],
        "stage": meta["stage"],
        "effort": effort,
        "parameters": structure.parameters(model.config),
        "kmac_per_pixel": {"encoder": macs["encoder"], "decoder": macs["decoder"]},
        "bytes": meta["bytes"],
        "channels": {"y": widths["y"], "z": widths["z"]},
        "levels": levels,
    }


def pillow_coded(image, form, quality):
    """The file that Pillow writes at a quality, bytes, and what it decodes to."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form, quality=quality)
    return buffer.getvalue(), np.asarray(Image.open(buffer).convert("RGB"))


def best_within(image, form, size):
    """The best JPEG or WebP of at most `size` bytes, or the smallest there is.

    Returns its quality, its bytes and the decoded image. Raises LicError where Pillow cannot write
    this image in that form.
    """
    low, high = 0, 100
    try:
        while low < high:
            middle = (low + high + 1) // 2
            if len(pillow_coded(image, form, middle)[0]) <= size:
                low = middle
            else:
                high = middle - 1
        return low, *pillow_coded(image, form, low)
    except (OSError, ValueError) as error:  # JPEG ends at 65,500 pixels a side, WebP at 16,383
        raise LicError(f"Pillow cannot write this image as {form}: {error}") from error


def measure_classical(images):
    """JPEG, WebP and AVIF through Pillow's defaults: {name: [{"quality", "bpp", ...}]}."""
    results = {}
    for name, (form, feature, qualities) in CLASSICAL.items():
        if not features.check(feature):
            print(f"{name}: this Pillow was built without it, left out")
            continue
        try:
            results[name] = [measure_quality(images, form, quality) for quality in qualities]
        # each ends at some size, WebP at 16,383 pixels a side
        except (OSError, ValueError, RuntimeError) as error:
            print(f"{name}: Pillow cannot write these images ({error}), left out")
    return results


def measure_quality(images, form, quality):
    """One quality of one of Pillow's codecs, averaged over the images."""
    rows = []
    for image in images:
        data, decoded = pillow_coded(image, form, quality)
        rows.append(
            {
                "bpp": bits_per_pixel(len(data), image),
                "psnr": min(psnr(image, decoded), LOSSLESS),
                "ms_ssim": ms_ssim(image, decoded),
            }
        )
    return {"quality": quality, **mean_of(rows)}


def points(rows):
    return [(row["bpp"], row["psnr"]) for row in rows]
