"""The codec on the command line.

    python -m lic compress photo.png photo.lic      with --effort 60: slow, a better file
    python -m lic decompress photo.lic photo.png
    python -m lic info photo.lic                    or of a checkpoint
    python -m lic compare photo.png beside.png      a crop beside JPEG and WebP of as many bytes
    python -m lic show photo.png map.png            where in the photograph the bits of its file go
    python -m lic export codec.npz                  weights and tables, for ports
    python -m lic halve codec.pt half.pt            a float codec in half precision: half the bytes

Commands import what they need when they run: help, and `info` of a lic file, need no torch.
"""

import io
import json
from pathlib import Path

from lic import SHIPPED, encode, load
from lic.codec.header import SIZE, read_header
from lic.files import MAX_PIXELS, BadStream, LicError, claim_output, read_bytes, write_bytes
from lic.options import make_parser, positive_whole_number, whole_number
from lic.program import enough_memory, run


def parse_args():
    # fmt: off
    parser = make_parser(__doc__, prog="python -m lic")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name, function, arguments, text):
        command = commands.add_parser(name, help=text)
        command.set_defaults(function=function)
        for argument in arguments:
            command.add_argument(argument)
        if "output" in arguments:
            command.add_argument("--overwrite", action="store_true", help="replace the output")
        return command

    both = ["input", "output"]
    compressing = add("compress", compress, both, "image to lic file")
    decompressing = add("decompress", decompress, both, "lic file to PNG")
    comparing = add("compare", compare, both, "original, lic, JPEG and WebP side by side, as PNG")
    showing = add("show", show, both, "photograph, and a map of the bits of its file, as PNG")
    exporting = add("export", export, ["output"], "checkpoint as a NumPy archive, for ports")
    add("info", info, ["input"], "what is in a lic file or a checkpoint")
    add("halve", halve, both, "checkpoint of a float codec, its weights in half precision")

    coding = (compressing, decompressing, comparing, showing)
    for command in (*coding, exporting):
        command.add_argument("--checkpoint", default=SHIPPED, help="default: the codec shipped")
    for command in coding:
        command.add_argument("--max-pixels", type=positive_whole_number, default=MAX_PIXELS,
                             help=f"refuse larger images (default: {MAX_PIXELS})")
        command.add_argument("--amp", action="store_true",
                             help="bf16: faster on some CPUs with AVX-512 bf16")
    for command in (compressing, comparing, showing):
        command.add_argument("--quality", type=float,
                             help="rate level, from 0, the smallest file; fractions are allowed "
                             "(default: the one in the middle)")
    for command in (compressing, comparing):
        command.add_argument("--effort", type=whole_number, default=0,
                             help="steps of a search for a better file, 60 or 200, say; one takes "
                             "half a second to two a megapixel (default: 0, no search)")
    comparing.add_argument("--crop", type=positive_whole_number, default=256,
                           help="side of the crop, pixels (default: 256)")
    comparing.add_argument("--at", type=whole_number, nargs=2, metavar=("X", "Y"),
                           help="its upper left corner (default: centred)")
    # fmt: on
    return parser.parse_args()


def compress(args):
    from lic.images import read_image
    from lic.metrics import bits_per_pixel

    claim_output(args.output, ".lic", args.overwrite, [args.input])
    image = read_image(args.input, args.max_pixels)
    codec = load(args.checkpoint, args.amp)
    size = f"{image.shape[1]}x{image.shape[0]}"
    with enough_memory(f"{size} pixels"):
        data = encode(codec, image, args.quality, args.effort, args.max_pixels, verbose=True)
    write_bytes(args.output, data)
    print(f"{args.output}: {len(data)} bytes, {bits_per_pixel(len(data), image):.4f} bpp, {size}")


def decompress(args):
    from lic.pictures import png_bytes

    claim_output(args.output, ".png", args.overwrite, [args.input])
    codec = load(args.checkpoint, args.amp)
    with enough_memory(args.input):
        image = codec.decode(read_bytes(args.input), args.max_pixels)
    write_bytes(args.output, png_bytes(image))
    print(f"{args.output}: {image.shape[1]}x{image.shape[0]}")


def info(args):
    data = read_bytes(args.input)
    if data[:2] == b"PK":  # torch.save's files are zip archives
        checkpoint_info(args.input)
        return
    header, _ = read_header(data)
    z_words, y_words, z_escapes, y_escapes = header.lengths
    print(
        f"{header.width}x{header.height} pixels, quality {header.quality / 256:g}, "
        f"model {header.fingerprint.hex()}"
    )
    print(
        f"{len(data)} bytes: header {SIZE}, z {4 * z_words}, y {4 * y_words}, "
        f"escaped symbols {4 * (z_escapes + y_escapes)}"
    )


def checkpoint_info(path):
    from lic.codec import checkpoint, structure

    model, meta = checkpoint.load_checkpoint(path)
    config = meta["config"]
    macs = structure.kmac_per_pixel(config)
    print(f"{path}: stage {meta['stage']}, {meta['bytes']:,} bytes, model {meta['fingerprint']}")
    print(f"quantization: {json.dumps(meta['quantization']) if meta['quantization'] else 'none'}")
    print(f"lambdas: {' '.join(map(str, config['lambdas']))}")
    print(
        f"parameters: {structure.parameters(config):,}; kMAC/pixel: "
        f"{macs['encoder']:.2f} to encode, {macs['decoder']:.2f} to decode"
    )
    print(f"\n{structure.table_of_groups(config['widths'])}")
    print(f"\n{table_of_layers(model)}\n")
    for entry in meta["lineage"]:
        arguments = " ".join(f"{key}={value}" for key, value in entry["arguments"].items())
        print(f"{entry['stage']}: {entry['steps']} steps, data {entry['data']}, {arguments}")
    for name, value in meta["metrics"].items():
        print(f"{name}: {json.dumps(value)}")


def table_of_layers(model):
    """What each layer computes, and in how many bits its input comes, as text."""
    from lic.codec import eight_bits, structure

    reads = {layer.name: layer.reads for layer in structure.LAYERS}
    kmac = structure.kmac_of_layers(model.config["widths"])
    total, in_8_bits = sum(kmac.values()), 0
    lines = ["layer      channels    kernel  kMAC/pixel  share   input"]
    for name, c_in, c_out, kernel, _ in structure.layer_sizes(model.config["widths"]):
        limits = getattr(model.get_submodule(name), "input_range", None)
        if limits:
            bits = "16 bits" if limits == eight_bits.WIDE else "8 bits"
        else:
            bits = {structure.IMAGE: "pixels", "z": "integers"}.get(reads.get(name), "float")
        if bits == "8 bits":
            in_8_bits += kmac[name]
        channels, share = f"{c_in} -> {c_out}", kmac[name] / total
        lines.append(
            f"{name:10} {channels:11} {kernel}x{kernel} {kmac[name]:13.2f} {share:6.1%}   {bits}"
        )
    if in_8_bits:
        share = in_8_bits / total
        lines.append(f"{share:.0%} of the multiply-accumulates have weights and inputs of 8 bits")
    return "\n".join(lines)


def compare(args):
    from lic.images import read_image
    from lic.measure import best_within
    from lic.metrics import bits_per_pixel, psnr
    from lic.pictures import beside, png_bytes

    claim_output(args.output, ".png", args.overwrite, [args.input])
    image = read_image(args.input, args.max_pixels)
    height, width = image.shape[:2]
    x, y = args.at or (max(0, (width - args.crop) // 2), max(0, (height - args.crop) // 2))
    if x >= width or y >= height:
        raise LicError(f"--at {x} {y} lies outside {args.input}, which is {width}x{height}")
    codec = load(args.checkpoint, args.amp)
    quality = codec.middle_level() if args.quality is None else args.quality
    data = encode(codec, image, quality, args.effort, args.max_pixels, verbose=True)
    results = [("lic", quality, data, codec.decode(data, args.max_pixels))]
    for name, form in (("JPEG", "JPEG"), ("WebP", "WEBP")):
        try:
            results.append((name, *best_within(image, form, len(data))))
        except LicError as error:
            print(f"{name} is left out: {error}")

    pictures, captions = [image], [f"original\n{image.size:,} bytes"]
    for name, quality, coded, decoded in results:
        dB = psnr(image, decoded)
        remark = "  more than lic: its smallest" if len(coded) > len(data) else ""
        print(
            f"{name:5} quality {quality:<5g} {len(coded):8} bytes "
            f"{bits_per_pixel(len(coded), image):8.4f} bpp {dB:8.3f} dB{remark}"
        )
        pictures.append(decoded)
        captions.append(f"{name}\n{len(coded):,} bytes, {dB:.2f} dB")
    crops = [picture[y : y + args.crop, x : x + args.crop] for picture in pictures]
    write_bytes(args.output, png_bytes(beside(crops, captions)))
    shown = ["original", *(name for name, *_ in results)]
    print(f"{args.output}, left to right: {', '.join(shown)}")


def show(args):
    from lic.images import read_image
    from lic.measure import bits_of_blocks
    from lic.pictures import beside, enlarged, heat, png_bytes

    claim_output(args.output, ".png", args.overwrite, [args.input])
    image = read_image(args.input, args.max_pixels)
    height, width = image.shape[:2]
    codec = load(args.checkpoint, args.amp)
    with enough_memory(f"{width}x{height} pixels"):
        y, z = codec.latents(image, codec.level(args.quality), args.max_pixels)
        bits, side = bits_of_blocks(codec, y, z)
        coloured = heat(enlarged(bits, side)[:height, :width], bits.max())
    captions = (
        f"{Path(args.input).name}, {width}x{height}",
        f"{bits.sum() / 8:,.0f} bytes of y and z\nblack 0, white {bits.max():.0f} bits a block",
    )
    write_bytes(args.output, png_bytes(beside((image, coloured), captions)))
    print(
        f"{args.output}: a block of {side}x{side} takes {bits.min():.0f} to {bits.max():.0f} bits"
    )


def export(args):
    """All that decoding needs, as docs/porting.md describes it.

    Tensors (int8 if quantized), tables, config.
    """
    import numpy as np

    from lic.codec import checkpoint
    from lic.codec.eight_bits import pack

    claim_output(args.output, ".npz", args.overwrite, [args.checkpoint])
    model, meta = checkpoint.load_checkpoint(args.checkpoint)
    arrays = {name: tensor.numpy() for name, tensor in pack(model.state_dict()).items()}
    for kind, tables in meta["tables"].items():
        for field, value in tables._asdict().items():
            arrays[f"tables.{kind}.{field}"] = value
    about = {key: meta[key] for key in ("config", "quantization", "fingerprint")}
    buffer = io.BytesIO()
    np.savez(buffer, about=json.dumps(about), **arrays)
    write_bytes(args.output, buffer.getvalue())
    print(f"{args.output}: {len(arrays)} arrays of {args.checkpoint}")


def halve(args):
    """The rounded weights are another codec, with tables and a fingerprint of its own."""
    from lic.codec import checkpoint
    from lic.codec.tables import build_tables

    claim_output(args.output, ".pt", args.overwrite, [args.input])
    model, meta = checkpoint.load_checkpoint(args.input, stages=checkpoint.FLOAT_STAGES)
    model.half().float()  # in place: now the weights are rounded
    tables = build_tables(model)
    checkpoint.save_checkpoint(
        args.output,
        model.half(),
        tables,
        meta["stage"],
        {"precision": "half"},
        0,
        parent=meta,
        metrics=meta["metrics"],  # of the codec before it was rounded
    )
    size = Path(args.output).stat().st_size
    print(f"{args.output}: {size:,} bytes, {args.input} has {meta['bytes']:,}")


def main():
    args = parse_args()
    try:
        args.function(args)
    except BadStream as error:
        raise BadStream(f"{args.input}: {error}") from error


if __name__ == "__main__":
    run(main)
