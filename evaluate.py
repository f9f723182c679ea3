"""Measure codecs on images with real files, side by side with JPEG, WebP and AVIF.

    python evaluate.py                                      after python quantize.py
    python evaluate.py runs/small.pt runs/pruned.pt runs/quantized.pt --data kodak/ --json runs/kodak.json

For each checkpoint, level and image: the file is written, read back and decoded; bpp is 8 * bytes /
pixels, quality is that of the decoded 8-bit image. Every figure is the mean over the images.
BD-rate: PSNR, PCHIP over log rate, of each checkpoint against every other curve; negative is better.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

from lic.bitstream import MAX_PIXELS, ImageCoder, padded, padded_pixels
from lic.checkpoint import load
from lic.files import LicError, check_writable, read_bytes, run, write_bytes
from lic.images import HELD_OUT, dead_leaves, find_images, read_image
from lic.metrics import bd_rate, kmac_per_pixel, ms_ssim, parameters, psnr
from lic.models import STRIDE

CLASSICAL = {  # name: (Pillow format, feature to ask for, qualities)
    "jpeg": ("JPEG", "jpg", (5, 10, 20, 30, 45, 60, 75, 90)),
    "webp": ("WEBP", "webp", (1, 5, 15, 30, 50, 70, 85)),
    "avif": ("AVIF", "avif", (15, 30, 40, 50, 60, 75)),
}
ALIVE = 0.001  # bits a position (16x16 pixels for y, 64x64 for z) that a channel must carry to count as alive


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=["runs/base.pt", "runs/pruned.pt", "runs/quantized.pt"],
                        help="the first is the anchor of the BD-rates in --json (default: runs/base.pt runs/pruned.pt runs/quantized.pt)")  # fmt: skip
    parser.add_argument("--data", help="folder of images, searched recursively (default: 4 synthetic images)")
    parser.add_argument("--held-out", action="store_true", help="only the images that training with this folder holds out")
    parser.add_argument("--amp", action="store_true", help="code in bf16: faster on a CPU with AVX-512 bf16")
    parser.add_argument("--published", help="JSON of published curves to compare with, as docs/kodak_published.json")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--plot", help="write the rate-distortion plot to this PNG (needs matplotlib)")
    return parser.parse_args()


@torch.inference_mode()
def ideal_bits(model, image, level):
    """-log2 p of the rounded latents, with continuous scales and at most 24 bits a symbol (MAX_BITS, the least
    probability of a table): of each channel of y and of z, (M,) and (Z,) float64."""
    out = model(padded(image), torch.tensor([float(level)]))
    return out.y_bits[0].double().numpy(), out.z_bits[0].double().numpy()


def measure_level(model, coder, images, level, folder):
    """One level of one checkpoint, averaged over the images; and how many channels are alive."""
    rows, positions, y_total, z_total = [], 0, 0, 0
    for image in images:
        path = folder / "image.lic"
        start = time.perf_counter()
        data = coder.compress(image, level)
        encoded = time.perf_counter()
        path.write_bytes(data)
        data = path.read_bytes()
        reading = time.perf_counter()
        decoded = coder.decompress(data)
        end = time.perf_counter()
        y_bits, z_bits = ideal_bits(model, image, level)
        positions, y_total, z_total = positions + padded(image)[0, 0].numel() / STRIDE**2, y_total + y_bits, z_total + z_bits
        pixels = image.shape[0] * image.shape[1]
        rows.append([8 * path.stat().st_size / pixels, (y_bits.sum() + z_bits.sum()) / pixels,
                     psnr(image, decoded), ms_ssim(image, decoded), encoded - start, end - reading])  # fmt: skip
    names = ("bpp", "ideal_bpp", "psnr", "ms_ssim", "encode_seconds", "decode_seconds")
    alive = {"alive_y": int((y_total / positions / 16 > ALIVE).sum()), "alive_z": int((z_total / positions > ALIVE).sum())}
    return {"lmbda": model.lambdas[level], **dict(zip(names, np.mean(rows, axis=0).tolist())), **alive}


def measure_checkpoint(path, images, amp):
    model, meta = load(path)
    coder = ImageCoder(model, meta["tables"], meta["fingerprint"], amp)
    coder.decompress(coder.compress(images[0], 0))  # warm-up
    macs = kmac_per_pixel(model.config)
    with tempfile.TemporaryDirectory() as folder:
        levels = [measure_level(model, coder, images, level, Path(folder)) for level in range(len(model.lambdas))]
    return {"path": path, "stage": meta["stage"], "parameters": parameters(model.config),
            "kmac_per_pixel": {"encoder": macs["encoder"], "decoder": macs["decoder"]},
            "bytes": meta["bytes"], "channels": {k: model.config["widths"][k] for k in "yz"}, "levels": levels}  # fmt: skip


def measure_classical(images):
    """JPEG, WebP and AVIF through Pillow at its default settings: {name: [{"quality", "bpp", ...}]}."""
    results = {}
    for name, (form, feature, qualities) in CLASSICAL.items():
        if not features.check(feature):
            print(f"{name}: this Pillow was built without it, left out")
            continue
        try:
            results[name] = [measure_quality(images, form, quality) for quality in qualities]
        except (OSError, ValueError, RuntimeError) as error:  # each ends at some size, WebP at 16,383 pixels a side
            print(f"{name}: Pillow cannot write these images ({error}), left out")
    return results


def measure_quality(images, form, quality):
    """One quality of one of Pillow's codecs, averaged over the images."""
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format=form, quality=quality)
        decoded = np.asarray(Image.open(buffer).convert("RGB"))
        bpp = 8 * len(buffer.getvalue()) / (image.shape[0] * image.shape[1])
        rows.append([bpp, psnr(image, decoded), ms_ssim(image, decoded)])
    return {"quality": quality, **dict(zip(("bpp", "psnr", "ms_ssim"), np.mean(rows, axis=0).tolist()))}


def points(rows):
    return [(row["bpp"], row["psnr"]) for row in rows]


def show_bd_rates(ours, others):
    """A row an anchor, a column a checkpoint, and why where two curves cannot be compared.

    ours, others: {name: [(bpp, PSNR)]}; both serve as anchors.
    """
    print("\nPSNR BD-rate of each checkpoint (column) against each curve (row); negative: smaller files at equal PSNR")
    labels = [Path(name).name for name in ours]
    labels = labels if len(set(labels)) == len(labels) else list(ours)
    width = max(15, *(len(label) + 2 for label in labels))
    print(" " * 44 + "".join(f"{label:>{width}}" for label in labels))
    reasons = {}  # the same for a curve wherever it is met
    for name, anchor in (ours | others).items():
        row = f"{name:44}"
        for test_name, test in ours.items():
            percent, why = bd_rate(anchor, test)
            row += f"{'-' if why else f'{percent:+.2f} %':>{width}}"
            if why:
                reasons[why.replace("the first curve", name).replace("the second curve", test_name)] = None
        print(row)
    for why in reasons:
        print(f"- not comparable: {why}")


def import_pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise LicError("--plot needs matplotlib, which is not installed: pip install matplotlib, or leave out --plot") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def load_published(path):
    """{name: [(bpp, PSNR)]} of a file like docs/kodak_published.json."""
    try:
        curves = json.loads(read_bytes(path))["curves"]
        return {f"{name} (published)": list(zip(curve["bpp"], curve["psnr"])) for name, curve in curves.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LicError(f"{path} holds no curves like docs/kodak_published.json") from error


def plot(path, pyplot, ours, others):
    """ours, others: {name: [(bpp, PSNR)]}."""
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for name, curve in ours.items():
        axes.plot(*zip(*curve), marker="o", markersize=4, label=name)
    axes.set_prop_cycle(color=pyplot.colormaps["tab20"].colors[1::2])  # ten lighter ones
    for name, curve in others.items():
        axes.plot(*zip(*curve), linewidth=1, linestyle="--", label=name)
    right = 1.4 * max(bpp for curve in ours.values() for bpp, _ in curve)
    shown = [psnr for curve in (*ours.values(), *others.values()) for bpp, psnr in curve if bpp <= right]
    axes.set(xlabel="bits per pixel (file)", ylabel="PSNR (dB)", xlim=(0, right), ylim=(min(shown) - 0.5, max(shown) + 0.5))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    write_bytes(path, buffer.getvalue())


def main():
    args = parse_args()
    if args.held_out and not args.data:
        raise LicError("--held-out needs --data, the folder that training used")
    for path in filter(None, (args.json, args.plot)):
        check_writable(path)
    pyplot = import_pyplot() if args.plot else None
    published = load_published(args.published) if args.published else {}
    for path in args.checkpoints:
        load(path)  # refuse a bad one before measuring the others
    paths = find_images(args.data)[:: HELD_OUT if args.held_out else 1] if args.data else []
    images = [read_image(path) for path in paths] or [dead_leaves(seed) for seed in range(1000, 1004)]
    for path, image in zip(paths, images):
        if padded_pixels(*image.shape[:2]) > MAX_PIXELS:
            raise LicError(f"{path} has more than {MAX_PIXELS} pixels, the codec's default limit; leave it out or make it smaller")
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    print(f"images: {len(images)}, {pixels} pixels, {torch.get_num_threads()} threads" + ", bf16" * args.amp)

    checkpoints = []
    for path in args.checkpoints:
        result = measure_checkpoint(path, images, args.amp)
        checkpoints.append(result)
        print(f"\n{path} ({result['stage']}): {result['parameters']:,} parameters, kMAC/pixel "
              f"{result['kmac_per_pixel']['encoder']:.2f} to encode, {result['kmac_per_pixel']['decoder']:.2f} to decode, "
              f"{result['bytes']:,} bytes")  # fmt: skip
        print("  lambda      bpp  ideal bpp   PSNR dB   MS-SSIM  (dB)    encode s  decode s  alive y, z")
        for row in result["levels"]:
            print(f"  {row['lmbda']:<8} {row['bpp']:8.4f} {row['ideal_bpp']:9.4f} {row['psnr']:9.3f} {row['ms_ssim']:9.4f} "
                  f"{-10 * np.log10(1 - row['ms_ssim']):6.2f} {row['encode_seconds']:9.3f} {row['decode_seconds']:9.3f}  "
                  f"{row['alive_y']}/{result['channels']['y']}, {row['alive_z']}/{result['channels']['z']}",
                  flush=True)  # fmt: skip
    classical = measure_classical(images)
    for name, rows in classical.items():
        print(f"\n{name}\n  quality     bpp   PSNR dB   MS-SSIM")
        for row in rows:
            print(f"  {row['quality']:<8} {row['bpp']:7.4f} {row['psnr']:9.3f} {row['ms_ssim']:9.4f}")

    for result in checkpoints:
        result["bd_rate_percent"], _ = bd_rate(points(checkpoints[0]["levels"]), points(result["levels"]))
    ours = {result["path"]: points(result["levels"]) for result in checkpoints}
    others = {name: points(rows) for name, rows in classical.items()} | published
    show_bd_rates(ours, others)

    if args.json:
        result = {"images": len(images), "pixels": pixels, "checkpoints": checkpoints, "classical": classical}
        finite = json.loads(json.dumps(result), parse_constant=lambda name: None)  # JSON has no infinity: a lossless PSNR
        write_bytes(args.json, json.dumps(finite, indent=1).encode())
    if args.plot:
        plot(args.plot, pyplot, ours, others)


if __name__ == "__main__":
    run(main)
