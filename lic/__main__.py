"""python -m lic compress photo.png photo.lic | decompress photo.lic photo.png | info photo.lic | export codec.npz"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from lic.bitstream import HEADER, MAX_PIXELS, ImageCoder, read_header
from lic.checkpoint import load
from lic.files import BadStream, LicError, check_writable, read_bytes, run, write_bytes
from lic.images import read_image
from lic.quantization import pack

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "small.pt"


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m lic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("compress", "image to lic file"), ("decompress", "lic file to PNG")):
        command = commands.add_parser(name, help=text)
        command.add_argument("input")
        command.add_argument("output")
        command.add_argument("--checkpoint", default=SHIPPED, help="the codec (default: the one shipped)")
        command.add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                             help=f"refuse larger images, for they need memory (default: {MAX_PIXELS})")  # fmt: skip
    commands.choices["compress"].add_argument(
        "--quality", type=float, default=2.0, help="rate level, 0 (smallest file) up; fractions allowed (default: 2)")  # fmt: skip
    commands.add_parser("info", help="header of a lic file").add_argument("input")
    command = commands.add_parser("export", help="checkpoint as a NumPy archive, for ports to other frameworks")
    command.add_argument("output")
    command.add_argument("--checkpoint", default=SHIPPED, help="the codec (default: the one shipped)")
    return parser.parse_args()


def image_coder(path):
    model, meta = load(path)
    return ImageCoder(model, meta["tables"], meta["fingerprint"])


def compress(args):
    check_writable(args.output)
    image = read_image(args.input)
    data = image_coder(args.checkpoint).compress(image, args.quality, args.max_pixels)
    write_bytes(args.output, data)
    height, width = image.shape[:2]
    print(f"{args.output}: {len(data)} bytes, {8 * len(data) / (height * width):.4f} bpp, {width}x{height}")


def decompress(args):
    if Path(args.output).suffix.lower() != ".png":
        raise LicError(f"{args.output}: the decoder writes PNG; end the name in .png")
    check_writable(args.output)
    image = image_coder(args.checkpoint).decompress(read_bytes(args.input), args.max_pixels)
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


def export(args):
    """All that decoding needs, as docs/porting.md describes it: tensors (int8 if quantized), tables, config."""
    model, meta = load(args.checkpoint)
    arrays = {name: tensor.numpy() for name, tensor in pack(model.state_dict()).items()}
    for kind, tables in meta["tables"].items():
        arrays |= {f"tables.{kind}.{field}": value for field, value in tables._asdict().items()}
    about = {key: meta[key] for key in ("config", "quantization", "fingerprint")}
    buffer = io.BytesIO()
    np.savez(buffer, about=json.dumps(about), **arrays)
    write_bytes(args.output, buffer.getvalue())
    print(f"{args.output}: {len(arrays)} arrays of {args.checkpoint}")


def main():
    args = parse_args()
    try:
        {"compress": compress, "decompress": decompress, "info": info, "export": export}[args.command](args)
    except BadStream as error:
        raise BadStream(f"{args.input}: {error}") from error


if __name__ == "__main__":
    run(main)
