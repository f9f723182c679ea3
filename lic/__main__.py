"""The codec on the command line.

    python -m lic compress photo.png photo.lic
    python -m lic decompress photo.lic photo.png
    python -m lic info photo.lic
    python -m lic compare photo.png beside.png      a crop beside JPEG and WebP of about as many bytes
    python -m lic export codec.npz                  weights and tables, for ports
    python -m lic halve codec.pt half.pt            a float codec in half precision: half the bytes
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from lic.bitstream import HEADER, MAX_PIXELS, ImageCoder, build_tables, read_header
from lic.checkpoint import load, save
from lic.files import BadStream, LicError, check_writable, read_bytes, run, write_bytes
from lic.images import read_image
from lic.metrics import psnr
from lic.quantization import pack

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "quantized.pt"


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m lic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, inputs, text in (("compress", ["input"], "image to lic file"), ("decompress", ["input"], "lic file to PNG"),
                               ("compare", ["input"], "crops of original, lic, JPEG and WebP side by side, as PNG"),
                               ("export", [], "checkpoint as a NumPy archive, for ports to other frameworks")):  # fmt: skip
        command = commands.add_parser(name, help=text)
        for argument in (*inputs, "output"):
            command.add_argument(argument)
        command.add_argument("--checkpoint", default=SHIPPED, help="the codec (default: the one shipped)")
    for name in ("compress", "decompress", "compare"):
        commands.choices[name].add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                                            help=f"refuse larger images, for they need memory (default: {MAX_PIXELS})")  # fmt: skip
        commands.choices[name].add_argument("--amp", action="store_true", help="bf16: faster on a CPU with AVX-512 bf16")
    for name in ("compress", "compare"):
        commands.choices[name].add_argument("--quality", type=float, default=2.0,
                                            help="rate level, 0 (smallest file) up; fractions allowed (default: 2)")  # fmt: skip
    command = commands.choices["compare"]
    command.add_argument("--crop", type=int, default=256, help="side of the crop, pixels (default: 256)")
    command.add_argument("--at", type=int, nargs=2, metavar=("X", "Y"), help="its upper left corner (default: centred)")
    commands.add_parser("info", help="header of a lic file").add_argument("input")
    command = commands.add_parser("halve", help="checkpoint of a float codec, its weights rounded to half precision")
    for argument in ("input", "output"):
        command.add_argument(argument)
    return parser.parse_args()


def check_output(path, suffix):
    """Refuse a name that is not this command's to write: `compress *.png` must not overwrite a photograph."""
    if Path(path).suffix.lower() != suffix:
        raise LicError(f"{path}: this command writes {suffix[1:]} files; end the name in {suffix}")
    check_writable(path)


def image_coder(path, amp=False):
    model, meta = load(path)
    return ImageCoder(model, meta["tables"], meta["fingerprint"], amp)


def compress(args):
    check_output(args.output, ".lic")
    image = read_image(args.input)
    data = image_coder(args.checkpoint, args.amp).compress(image, args.quality, args.max_pixels)
    write_bytes(args.output, data)
    height, width = image.shape[:2]
    print(f"{args.output}: {len(data)} bytes, {8 * len(data) / (height * width):.4f} bpp, {width}x{height}")


def decompress(args):
    check_output(args.output, ".png")
    image = image_coder(args.checkpoint, args.amp).decompress(read_bytes(args.input), args.max_pixels)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_bytes(args.output, buffer.getvalue())
    print(f"{args.output}: {image.shape[1]}x{image.shape[0]}")


def info(args):
    data = read_bytes(args.input)
    header = read_header(data)
    z_words, y_words, z_escapes, y_escapes = header["lengths"]
    print(f"{header['width']}x{header['height']} pixels, quality {header['quality']:g}, model {header['fingerprint'].hex()}")
    print(f"{len(data)} bytes: header {HEADER.size}, z {4 * z_words}, y {4 * y_words}, "
          f"escaped symbols {4 * (z_escapes + y_escapes)}")  # fmt: skip


def classical(image, form, size):
    """The best JPEG or WebP of at most `size` bytes, or the smallest there is: quality, bytes, decoded image."""

    def encoded(quality):
        buffer = io.BytesIO()
        try:
            Image.fromarray(image).save(buffer, format=form, quality=quality)
        except (OSError, ValueError) as error:  # JPEG ends at 65,500 pixels a side, WebP at 16,383
            raise LicError(f"Pillow cannot write this image as {form}: {error}") from error
        return buffer

    low, high = 0, 100
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encoded(middle).getvalue()) <= size else (low, middle - 1)
    buffer = encoded(low)
    return low, len(buffer.getvalue()), np.asarray(Image.open(buffer).convert("RGB"))


def compare(args):
    check_output(args.output, ".png")
    if Path(args.output).exists():  # what reads like `compare original.png decoded.png` must not overwrite the second
        raise LicError(f"{args.output} exists; compare takes one image and writes another: give the name of a new file")
    image = read_image(args.input)
    height, width = image.shape[:2]
    x, y = args.at or (max(0, (width - args.crop) // 2), max(0, (height - args.crop) // 2))
    if not (0 <= x < width and 0 <= y < height and args.crop > 0):
        raise LicError(f"--crop {args.crop} --at {x} {y} lies outside {args.input}, which is {width}x{height}")
    coder = image_coder(args.checkpoint, args.amp)
    data = coder.compress(image, args.quality, args.max_pixels)
    rows = [("lic", args.quality, len(data), coder.decompress(data, args.max_pixels))]
    rows += [(form, *classical(image, form, len(data))) for form in ("JPEG", "WEBP")]
    for name, quality, size, decoded in rows:
        print(f"{name:5} quality {quality:<5g} {size:8} bytes {8 * size / (height * width):8.4f} bpp {psnr(image, decoded):8.3f} dB"
              + ("  more than lic: its smallest" if size > len(data) else ""))  # fmt: skip
    crops = [picture[y : y + args.crop, x : x + args.crop] for picture in (image, *(row[3] for row in rows))]
    gap = np.full((crops[0].shape[0], 8, 3), 255, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([part for crop in crops for part in (crop, gap)][:-1], axis=1)).save(buffer, format="PNG")
    write_bytes(args.output, buffer.getvalue())
    print(f"{args.output}, left to right: original, lic, JPEG, WebP")


def export(args):
    """All that decoding needs, as docs/porting.md describes it: tensors (int8 if quantized), tables, config."""
    check_output(args.output, ".npz")
    model, meta = load(args.checkpoint)
    arrays = {name: tensor.numpy() for name, tensor in pack(model.state_dict()).items()}
    for kind, tables in meta["tables"].items():
        arrays |= {f"tables.{kind}.{field}": value for field, value in tables._asdict().items()}
    about = {key: meta[key] for key in ("config", "quantization", "fingerprint")}
    buffer = io.BytesIO()
    np.savez(buffer, about=json.dumps(about), **arrays)
    write_bytes(args.output, buffer.getvalue())
    print(f"{args.output}: {len(arrays)} arrays of {args.checkpoint}")


def halve(args):
    """The rounded weights are another codec, with tables and a fingerprint of its own."""
    check_output(args.output, ".pt")
    model, meta = load(args.input, stages=("train", "control", "prune"))
    tables = build_tables(model.half().float())
    save(args.output, model.half(), tables, meta["stage"], {"precision": "half"}, 0, parent=meta, metrics=meta["metrics"])
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes, {args.input} has {meta['bytes']:,}")


def main():
    args = parse_args()
    try:
        {"compress": compress, "decompress": decompress, "info": info, "compare": compare,
         "export": export, "halve": halve}[args.command](args)  # fmt: skip
    except BadStream as error:
        raise BadStream(f"{args.input}: {error}") from error


if __name__ == "__main__":
    run(main)
