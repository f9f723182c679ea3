"""What evaluate.py and the tools measure: codecs with real files, and Pillow's beside them."""

import functools
import io
import json
import multiprocessing
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

import lic
from lic.codec import structure
from lic.codec.ans import PRECISION
from lic.codec.bitstream import ImageCoder, load_coder, padded, padded_pixels
from lic.codec.checkpoint import load_checkpoint
from lic.codec.strips import WHOLE, coarse_side
from lic.files import UNREADABLE, LicError, claim_output, read_bytes, write_bytes
from lic.images import dead_leaves, digest
from lic.metrics import bits_per_pixel, ms_ssim, psnr
from lic.pictures import enlarged
from lic.program import keep_freed_memory

CLASSICAL = {  # name: (Pillow format, feature to ask for, qualities)
    "jpeg": ("JPEG", "jpg", (5, 10, 20, 30, 45, 60, 75, 90)),
    "webp": ("WEBP", "webp", (1, 5, 15, 30, 50, 70, 85)),
    "avif": ("AVIF", "avif", (15, 30, 40, 50, 60, 75)),
}
LOSSLESS = 100.0  # dB, instead of infinity, for a picture that comes back exactly
FIGURES = {"bpp", "psnr", "ms_ssim", "encode_seconds", "decode_seconds"}  # of a file
ALIVE = 0.001  # bits a position that a channel of y or z must carry to count as alive


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
            except UNREADABLE as error:
                raise LicError(f"{path} is no record of measured files; name another") from error
            print(f"{path}: {len(self.figures)} files measured before")

    def add(self, key, figures):
        self.figures[key] = figures
        if self.path:
            write_bytes(self.path, json.dumps({"measured": self.figures}, indent=1).encode())


@contextmanager
def crew(path, coder, workers, effort=0):
    """Yields each(function, jobs): the results of function(coder, *job) for all jobs, in order.

    With several workers these are processes, with one thread and the codec in `path` each, if there
    is one. Raises LicError if one of them dies.
    """
    if workers == 1:
        yield lambda function, jobs: (function(coder, *job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    settings = (path, coder.amp, str(coder.device), effort) if coder else ()
    pool = ProcessPoolExecutor(workers, spawn, begin_work, settings)
    try:
        yield lambda function, jobs: pool.map(functools.partial(work, function), jobs)
    except BrokenProcessPool as error:
        raise LicError(
            "one of the processes that measure has ended, perhaps for lack of memory; "
            "try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_coder = None  # of a process of the crew


def begin_work(path=None, amp=False, device="cpu", effort=0):
    """In a process of the crew, once. path: of the codec, or None."""
    global _coder
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is told by the first process
    keep_freed_memory()
    torch.set_num_threads(1)
    if path:
        with redirect_stderr(io.StringIO()):  # what there is to warn of the first process has told
            _coder = load_coder(path, amp, device)
            warm_up(_coder, dead_leaves(0), effort)


def warm_up(coder, image, effort=0):
    """Code one file whose seconds do not count: the first takes longer."""
    coder.decode(lic.encode(coder, image, 0, min(effort, 1)))


def work(function, job):
    return function(_coder, *job)


def measure_image(coder, image, level, effort=0):
    """One file: its figures, and how many seconds it took to encode and to decode."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.lic"
        start = time.perf_counter()
        data = lic.encode(coder, image, level, effort)
        encoded = time.perf_counter()
        path.write_bytes(data)
        data = path.read_bytes()
        decoding = time.perf_counter()
        decoded = coder.decode(data)
        end = time.perf_counter()
    return {
        "bpp": bits_per_pixel(len(data), image),
        "psnr": min(psnr(image, decoded), LOSSLESS),
        "ms_ssim": ms_ssim(image, decoded),
        "encode_seconds": encoded - start,
        "decode_seconds": end - decoding,
    }


def measure_levels(coder, images, each, effort=0, record=None, threads=1):
    """Every level, averaged over the images: a list of dicts. each: of a `crew`."""
    record = record or Record()
    precision = "bf16" if coder.amp else "float32"
    if coder.device.type != "cpu":
        precision += f" on {coder.device}"
    levels = range(len(coder.model.lambdas))
    digests = [digest(image).hex() for image in images]

    def key_of(level, k):
        return (
            f"codec {coder.fingerprint.hex()}, image {digests[k]}, level {level}, "
            f"effort {effort}, {precision}, {threads} threads"
        )

    missing = {}
    for level in levels:
        for k, image in enumerate(images):
            if key_of(level, k) not in record.figures:
                missing[key_of(level, k)] = (image, level, effort)
    for key, figures in zip(missing, each(measure_image, missing.values())):
        record.add(key, figures)
    rows = []
    for level, lmbda in enumerate(coder.model.lambdas):
        figures = [record.figures[key_of(level, k)] for k in range(len(images))]
        rows.append({"lmbda": lmbda, **mean_of(figures)})
    return rows


def coded_bits(coder, y, z):
    """What each symbol of y and z costs in a file, in bits: (M, h, w) and (Z, h', w') float64.

    y, z: as coder.latents gives them. A symbol costs -log2 of its share of its table; one outside
    the table costs the escape and 32 bits.
    """
    z_symbols, z_index, y_symbols, y_index = coder.symbols(y, z)
    y_bits = bits_of_symbols(y_symbols, y_index, coder.tables["y"])
    z_bits = bits_of_symbols(z_symbols, z_index, coder.tables["z"])
    return y_bits.reshape(y.shape[1:]), z_bits.reshape(z.shape[1:])


def bits_of_blocks(coder, y, z):
    """Bits of each block of the picture that is one position of y, (h, w), and its side, pixels.

    A position of z stands for several blocks: each gets its share of z's bits.
    """
    y_bits, z_bits = (bits.sum(0) for bits in coded_bits(coder, y, z))
    side = coarse_side("g_a")
    ratio = coarse_side("h_a") // side  # blocks on the side of a position of z
    return y_bits + enlarged(z_bits, ratio) / ratio**2, side


def bits_of_symbols(symbols, table_index, tables):
    """-log2 p of each symbol by its table, (n,) float64; symbols, table_index (n,)."""
    last = tables.sizes[table_index] - 1  # the entry "escape"
    entries = symbols.astype(np.int64) - tables.offsets[table_index]
    escaped = (entries < 0) | (entries >= last)
    starts = (np.cumsum(tables.sizes) - tables.sizes)[table_index]
    counts = tables.counts[starts + np.where(escaped, last, entries)]
    return PRECISION - np.log2(counts) + 32 * escaped


def ideal_bits(coder, image, level):
    """-log2 p of the rounded latents, by channel of y and of z: (M,) and (Z,) float64.

    By the model, in float32 on the CPU: with continuous scales where a file has 64, and at most
    MAX_BITS a symbol. Of a picture too large to pass in one piece by the tables: `coded_bits`.
    """
    if padded_pixels(*image.shape[:2]) > WHOLE:
        y, z = coder.latents(image, float(level))
        y_bits, z_bits = coded_bits(coder, y, z)
        return y_bits.sum((1, 2)), z_bits.sum((1, 2))
    with torch.inference_mode():
        out = coder.model(padded(image), torch.tensor([float(level)]))
    return out.y_bits[0].double().numpy(), out.z_bits[0].double().numpy()


def ideal_level(images, level, each):
    """The ideal rate of a level, without effort, and how many channels of y and z are alive."""
    ideal_bpp, pixels, y_total, z_total = [], 0, 0, 0
    bits = each(ideal_bits, [(image, level) for image in images])
    for image, (y_bits, z_bits) in zip(images, bits):
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


def measure_checkpoint(path, images, amp=False, effort=0, record=None, workers=1, device="cpu"):
    """All levels of a checkpoint. effort: steps of train/effort.py; record: a Record or None."""
    model, meta = load_checkpoint(path)
    coder = ImageCoder(model, meta["tables"], meta["fingerprint"], amp, device)
    warm_up(coder, images[0], effort)
    threads = torch.get_num_threads() if workers == 1 else 1
    with crew(path, coder, workers, effort) as each:
        levels = measure_levels(coder, images, each, effort, record, threads)
        if effort == 0:
            for level, row in enumerate(levels):
                row |= ideal_level(images, level, each)
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


def measure_classical(images, workers=1):
    """JPEG, WebP and AVIF through Pillow's defaults: {name: [{"quality", "bpp", ...}]}."""
    results = {}
    with crew(None, None, workers) as each:
        for name, (form, feature, qualities) in CLASSICAL.items():
            if not features.check(feature):
                print(f"{name}: this Pillow was built without it, left out")
                continue
            jobs = [(image, form, quality) for quality in qualities for image in images]
            try:
                rows = list(each(measure_pillow, jobs))
            except BrokenProcessPool:  # a RuntimeError, too, but no fault of the images: see crew
                raise
            # each ends at some size, WebP at 16,383 pixels a side
            except (OSError, ValueError, RuntimeError) as error:
                print(f"{name}: Pillow cannot write these images ({error}), left out")
                continue
            results[name], count = [], len(images)
            for k, quality in enumerate(qualities):
                figures = mean_of(rows[k * count : (k + 1) * count])
                results[name].append({"quality": quality, **figures})
    return results


def measure_pillow(_, image, form, quality):
    """One file of one of Pillow's codecs."""
    data, decoded = pillow_coded(image, form, quality)
    return {
        "bpp": bits_per_pixel(len(data), image),
        "psnr": min(psnr(image, decoded), LOSSLESS),
        "ms_ssim": ms_ssim(image, decoded),
    }


def points(rows):
    """[(bpp, PSNR)] of measured levels or qualities."""
    return [(row["bpp"], row["psnr"]) for row in rows]


def ms_ssim_points(rows):
    """[(bpp, MS-SSIM in dB)] of the same."""
    return [(row["bpp"], in_dB(row["ms_ssim"])) for row in rows]


def in_dB(ms_ssim):
    """-10 log10(1 - MS-SSIM), at most LOSSLESS: near 1 it tells more than MS-SSIM itself."""
    return min(LOSSLESS, -10 * np.log10(max(1 - ms_ssim, 1e-10)))
