"""Measure codecs on images with real files, side by side with JPEG, WebP and AVIF.

    python evaluate.py                                      after python quantize.py
    python evaluate.py runs/small.pt runs/pruned.pt --data kodak/ --json runs/kodak.json

For each checkpoint, level and image: the file is written, read back and decoded; bpp is 8 * bytes /
pixels, quality is that of the decoded 8-bit image. Every figure is the mean over the images;
MS-SSIM in dB is -10 log10(1 - that mean).
BD-rate: of each checkpoint against every other curve, by PSNR and by MS-SSIM in dB, against the
published ones by PSNR; negative is better. The logarithm of the mean rate is interpolated over the
mean quality by PCHIP.
"""

import lic.interrupt  # first: from here on Ctrl-C ends with one line

import itertools
import json
import sys
from pathlib import Path

import torch

from lic.codec.bitstream import padded_pixels
from lic.codec.checkpoint import load_checkpoint
from lic.files import MAX_PIXELS, UNREADABLE, LicError, claim_output, read_bytes, write_bytes
from lic.images import dead_leaves, digest, find_images, held_out, read_image, read_images
from lic.measure import (
    LOSSLESS,
    Record,
    in_dB,
    measure_checkpoint,
    measure_classical,
    ms_ssim_points,
    points,
)
from lic.metrics import bd_rate, shared_range
from lic.options import make_parser, positive_whole_number, whole_number
from lic.photographs import LARGEST
from lic.plots import import_pyplot, plot_rate_distortion
from lic.program import choose_gpu, processor, run

CHAIN = ["runs/dense.pt", "runs/pruned.pt", "runs/quantized.pt"]
DRAWN = ["webp", "avif", "compressai mbt2018-mean (published)"]  # beside the checkpoints


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", default=CHAIN,
        help=f"the first is the anchor of the BD-rates in --json (default: {' '.join(CHAIN)})")
    add("--data", help="folder of images, searched recursively (default: 4 synthetic images)")
    add("--held-out", action="store_true",
        help="only the images that training with this folder holds out")
    add("--amp", action="store_true", help="code in bf16: faster on some CPUs with AVX-512 bf16")
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="where g_a, h_a and g_s run, but for the search of an effort; on a GPU untried "
        "(default: cpu)")
    add("--effort", type=whole_number, nargs="+", default=[0],
        help="steps of a search for better files, which may take hours; each of several is "
        "measured (default: 0)")
    add("--workers", type=positive_whole_number, default=1,
        help="processes that measure side by side, each on one thread; 1: this one, on all threads "
        "(default: 1)")
    add("--record",
        help="JSON file that keeps the figures of each file once it is measured: a run that "
        "stopped goes on from there; after a change of the code begin a new one")
    add("--published", help="JSON of published curves to compare with, as "
        "docs/kodak_published.json")
    add("--json", help="write all figures to this file")
    add("--plot", help="write the rate-distortion plot to this PNG, beside WebP, AVIF and, if "
        "published, mbt2018-mean (needs matplotlib)")
    add("--overwrite", action="store_true", help="replace what --json and --plot name")
    # fmt: on
    return parser.parse_args()


def show_bd_rates(ours, others, quality="PSNR"):
    """A row an anchor, a column a checkpoint, and why where two curves cannot be compared.

    ours, others: {name: [(bpp, quality in dB)]}; both serve as anchors. quality: its name.
    """
    print(
        f"\n{quality} BD-rate of each checkpoint (column) against each curve (row); "
        f"negative: smaller files at equal {quality}"
    )
    labels = [Path(name).name for name in ours]
    if len(set(labels)) < len(labels):
        labels = list(ours)
    width = max(15, *(len(label) + 2 for label in labels))
    first = max(44, *(len(name) + 2 for name in ours | others))
    print(" " * first + "".join(f"{label:>{width}}" for label in labels))
    remarks = []
    for name, anchor in (ours | others).items():
        row = f"{name:{first}}"
        for test_name, test in ours.items():
            percent, why = bd_rate(anchor, test, (name, test_name))
            cell = "-" if why else f"{percent:+.2f} %"
            row += f"{cell:>{width}}"
            if why:
                remarks.append(f"- not comparable: {why}")
                continue
            low, high, share = shared_range(anchor, test)
            if share < 0.25:
                remarks.append(
                    f"! {name} and {test_name} share {low:.2f} to {high:.2f} dB only, "
                    f"{share:.0%} of the shorter curve: their BD-rate says little"
                )
        print(row)
    for remark in dict.fromkeys(remarks):  # the same for a curve wherever it is met
        print(remark)


def load_published(path):
    """{name: [(bpp, PSNR)]} of a file like docs/kodak_published.json."""
    try:
        curves = {}
        for name, curve in json.loads(read_bytes(path))["curves"].items():
            pairs = zip(curve["bpp"], curve["psnr"], strict=True)
            curves[f"{name} (published)"] = [(float(bpp), float(dB)) for bpp, dB in pairs]
        return curves
    except UNREADABLE as error:
        raise LicError(f"{path} holds no curves like docs/kodak_published.json") from error


def images_of(args):
    """The images to measure on: photographs, or four synthetic ones."""
    if args.data is None:
        return [dead_leaves(seed) for seed in range(1000, 1004)]
    paths = find_images(args.data)
    if args.held_out:
        paths = held_out_paths(paths)
    images = read_images(paths)
    for path, image in zip(paths, images):
        if is_too_large(image):  # a long thin one, say
            raise LicError(f"{path}, padded, has more than {MAX_PIXELS} pixels; leave it out")
        if (image == image[0, 0]).all():
            print(f"{path} is one colour; where it comes back exactly it counts as {LOSSLESS} dB")
    return images


def is_too_large(image):
    """Has the image (H, W, 3), padded, more pixels than a coder takes by default?"""
    return padded_pixels(*image.shape[:2]) > MAX_PIXELS


def held_out_paths(paths):
    """Those that training holds out; what it cannot read it has refused, or left out by --skip-bad.

    Training takes larger ones than this script, which are left out here. One image after the other:
    all of them may be more than memory holds.
    """
    digests, too_large = {}, set()
    for path in paths:
        try:
            image = read_image(path, LARGEST)
        except LicError as error:
            print(f"left out: {error}")
            continue
        digests[path] = digest(image)
        if is_too_large(image):
            too_large.add(path)
            print(f"left out, if held out: {path}, padded, has more than {MAX_PIXELS} pixels")
    if not digests:
        raise LicError("none of these images can be used")
    chosen = set(itertools.compress(digests, held_out(digests.values()))) - too_large
    if not chosen:
        raise LicError("none of the images that are held out can be used")
    return [path for path in paths if path in chosen]


def name_of(result):
    """The checkpoint's path; with effort, that too: it is no property of the codec."""
    return result["path"] + (f", effort {result['effort']}" if result["effort"] else "")


def show_checkpoint(result):
    macs, channels = result["kmac_per_pixel"], result["channels"]
    print(
        f"\n{name_of(result)} ({result['stage']}): {result['parameters']:,} parameters, "
        f"kMAC/pixel {macs['encoder']:.2f} to encode, {macs['decoder']:.2f} to decode, "
        f"{result['bytes']:,} bytes"
    )
    print(
        "  lambda      bpp  ideal bpp   PSNR dB   MS-SSIM  (dB)    encode s  decode s  alive y, z"
    )
    for row in result["levels"]:
        ideal, alive = "-", "-"
        if "ideal_bpp" in row:  # not with --effort
            ideal = f"{row['ideal_bpp']:.4f}"
            alive = f"{row['alive_y']}/{channels['y']}, {row['alive_z']}/{channels['z']}"
        print(
            f"  {row['lmbda']:<8} {row['bpp']:8.4f} {ideal:>9} {row['psnr']:9.3f} "
            f"{row['ms_ssim']:9.4f} {in_dB(row['ms_ssim']):6.2f} {row['encode_seconds']:9.3f} "
            f"{row['decode_seconds']:9.3f}  {alive}",
            flush=True,
        )


def show_classical(name, rows):
    print(f"\n{name}\n  quality     bpp   PSNR dB   MS-SSIM")
    for row in rows:
        print(f"  {row['quality']:<8} {row['bpp']:7.4f} {row['psnr']:9.3f} {row['ms_ssim']:9.4f}")


def add_bd_rates(checkpoints):
    """The BD-rates of each checkpoint against the first, in its dict."""
    anchor = checkpoints[0]["levels"]
    for result in checkpoints:
        levels = result["levels"]
        result["bd_rate_percent"], _ = bd_rate(points(anchor), points(levels))
        result["ms_ssim_bd_rate_percent"], _ = bd_rate(
            ms_ssim_points(anchor), ms_ssim_points(levels)
        )


def check(args):
    """Raise LicError for what would fail after hours of measuring."""
    if args.held_out and not args.data:
        raise LicError("--held-out needs --data, the folder that training used")
    for path, suffix in ((args.json, ".json"), (args.plot, ".png")):
        if path:
            inputs = [*args.checkpoints, args.data, args.published]
            claim_output(path, suffix, args.overwrite, filter(None, inputs))
    if args.plot:
        import_pyplot()
    for path in args.checkpoints:
        _, meta = load_checkpoint(path)
        folders = {entry["arguments"].get("validation") for entry in meta["lineage"]} - {None}
        if args.held_out and folders:
            print(
                f"warning: {path} was trained with --validation {' '.join(sorted(folders))} and "
                "saw what --held-out chooses; give that folder as --data",
                file=sys.stderr,
            )


def main():
    args = parse_args()
    check(args)
    published = load_published(args.published) if args.published else {}
    if args.device == "cuda":
        choose_gpu()
    files = [*args.checkpoints, args.data, args.published, args.json, args.plot]
    record = Record(args.record, filter(None, files))
    images = images_of(args)
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    threads = torch.get_num_threads() if args.workers == 1 else 1  # that code a file
    precision = ", bf16" if args.amp else ""
    precision += f", {args.device}" if args.device != "cpu" else ""
    print(f"images: {len(images)}, {pixels} pixels, {threads} threads{precision}")

    checkpoints = []
    for path in args.checkpoints:
        for effort in args.effort:
            result = measure_checkpoint(
                path, images, args.amp, effort, record, args.workers, args.device
            )
            checkpoints.append(result)
            show_checkpoint(result)
    classical = measure_classical(images, args.workers)
    for name, rows in classical.items():
        show_classical(name, rows)
    add_bd_rates(checkpoints)
    ours = {name_of(result): points(result["levels"]) for result in checkpoints}
    others = {name: points(rows) for name, rows in classical.items()} | published
    if args.json:
        document = {
            "images": len(images),
            "pixels": pixels,
            "processor": processor(),
            "threads": threads,
            "amp": args.amp,
            "device": args.device,
            "workers": args.workers,
            "checkpoints": checkpoints,
            "classical": classical,
        }
        write_bytes(args.json, json.dumps(document, indent=1, allow_nan=False).encode())
    if args.plot:
        drawn = {name: curve for name, curve in others.items() if name in DRAWN}
        plot_rate_distortion(args.plot, ours, drawn)
    show_bd_rates(ours, others)
    ours = {name_of(result): ms_ssim_points(result["levels"]) for result in checkpoints}
    others = {name: ms_ssim_points(rows) for name, rows in classical.items()}
    show_bd_rates(ours, others, "MS-SSIM")


if __name__ == "__main__":
    run(main)
