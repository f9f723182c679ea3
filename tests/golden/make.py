"""Makes the golden files, in about a minute:

    python tests/golden/make.py                 all but those of the shipped codecs
    python tests/golden/make.py --quantized     only those of the small 8-bit codec
    python tests/golden/make.py --shipped       only those of the codecs in checkpoints/

Two small codecs (float and 8-bit, every width another number), files that they wrote, the symbols
and pixels in them, and every layer's input and output for one image. They are made once and pinned:
a test that fails against them says that something changed what old files decode to. Make them anew
only for a new format. Those of the shipped codecs are made anew with each new checkpoint.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parent.parent)]

from lic.__main__ import export  # noqa: E402
from lic.codec import coder  # noqa: E402
from lic.codec.bitstream import ImageCoder, load_coder, padded  # noqa: E402
from lic.codec.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from lic.codec.eight_bits import quantize_layers  # noqa: E402
from lic.codec.integer import freeze_h_s  # noqa: E402
from lic.codec.model import Codec  # noqa: E402
from lic.codec.tables import build_tables  # noqa: E402
from lic.images import dead_leaves, fixed_crops, load_images  # noqa: E402
from lic.shrink.quantization import input_scales  # noqa: E402
from lic.shrink.rounding import patch_moments, round_weights  # noqa: E402
from lic.train.loop import fit  # noqa: E402

WIDTHS = {
    "g_a.1": 9,
    "g_a.2": 10,
    "g_a.3": 11,
    "y": 12,
    "g_s.1": 13,
    "g_s.2": 14,
    "g_s.3": 15,
    "h_a.1": 7,
    "h_a.2": 6,
    "z": 5,
    "h_s.1": 8,
    "h_s.2": 16,
}
SHIPPED = ("base", "pruned", "quantized")


# Encoders out of tune, whose files a decoder must take all the same: y far outside the tables of
# many scales, and z as well, so that there are escapes of both and in many tables.
FORCED = {
    ("codec", "noise"): {"g_a.conv4.weight": 30, "h_a.conv3.weight": 0},
    ("quantized", "noise"): {"g_a.conv4.weight": 30, "h_a.conv3.bias": 20_000},
}


def make_codec():
    """codec.pt, trained for a minute on synthetic images."""
    torch.manual_seed(0)
    train, validation = load_images(None, 64)
    held_out = fixed_crops(validation, 2, 64)
    model = Codec({"widths": WIDTHS, "lambdas": [0.0035, 0.013, 0.0483]})
    args = argparse.Namespace(
        data=None,
        steps=3000,
        batch=8,
        crop=64,
        lr=3e-3,
        amp=False,
        compile=False,
        device="cpu",
        seed=0,
        save_every=3000,
        out=str(FOLDER / "codec.pt"),
        resume=False,
        finish=False,
    )
    fit(model, train, held_out, args)
    Path(args.out + ".state").unlink()
    save_checkpoint(
        FOLDER / "codec.pt",
        model,
        build_tables(model),
        "train",
        {"lr": args.lr, "seed": args.seed},
        args.steps,
    )


def make_quantized():
    """quantized.pt, calibrated from codec.pt."""
    model, meta = load_checkpoint(FOLDER / "codec.pt")
    calibration = fixed_crops(load_images(None, 64)[0], 8, 64)
    quantize_layers(model, input_scales(model, calibration))
    round_weights(model, patch_moments(model, calibration))
    freeze_h_s(model)
    save_checkpoint(FOLDER / "quantized.pt", model, build_tables(model), "quantize", {}, 0, meta)


def images():
    """name -> (H, W, 3) uint8: synthetic, a single pixel, and noise that no table expects."""
    noise = np.random.default_rng(0).integers(0, 2, (40, 33, 1), dtype=np.uint8).repeat(3, 2) * 255
    return {
        "leaves": dead_leaves(100, 128)[:90, :70],
        "pixel": np.array([[[255, 128, 0]]], np.uint8),
        "noise": noise,
    }


class Recorder:
    """Keeps what passes through coder.decode: the symbols as a decoder sees them."""

    def __enter__(self):
        self.decode, self.symbols = coder.decode, []

        def decode(*arguments):
            self.symbols.append(self.decode(*arguments))
            return self.symbols[-1]

        coder.decode = decode
        return self.symbols

    def __exit__(self, *_):
        coder.decode = self.decode


def make_files():
    decoded = {}
    for name, image in images().items():
        Image.fromarray(image).save(FOLDER / f"{name}.png")
    for codec, image, quality in (
        ("codec", "leaves", 0),
        ("codec", "leaves", 1.5),
        ("codec", "noise", 2),
        ("codec", "pixel", 1),
        ("quantized", "leaves", 2),
        ("quantized", "noise", 0),
    ):
        model, meta = load_checkpoint(FOLDER / f"{codec}.pt")
        with torch.no_grad():
            for name, factor in FORCED.get((codec, image), {}).items():
                model.get_parameter(name).mul_(factor)
        image_coder = ImageCoder(model, meta["tables"], meta["fingerprint"])
        data = image_coder.encode(images()[image], quality)
        name = f"{codec}_{image}_{quality}.lic"
        (FOLDER / name).write_bytes(data)
        with Recorder() as symbols:
            pixels = image_coder.decode(data)
        decoded |= {f"{name}.z": symbols[0], f"{name}.y": symbols[1], f"{name}.pixels": pixels}
        print(f"{name}: {len(data)} bytes")
    np.savez_compressed(FOLDER / "decoded.npz", **decoded)


def make_shipped():
    """shipped/NAME.lic, one file of each codec in checkpoints/, and every fourth pixel in it.

    A decoder that reads one other symbol in it refuses it.
    """
    image, pixels = dead_leaves(7, 384)[:256], {}
    for name in SHIPPED:
        codec = load_coder(FOLDER.parent.parent / "checkpoints" / f"{name}.pt")
        data = codec.encode(image, 4)
        (FOLDER / "shipped" / f"{name}.lic").write_bytes(data)
        pixels[name] = codec.decode(data)[::4, ::4]
        print(f"shipped/{name}.lic: {len(data)} bytes")
    np.savez_compressed(FOLDER / "shipped" / "pixels.npz", **pixels)


@torch.inference_mode()
def make_layers():
    """Input of each network ("g_a") and output of each layer ("g_a.conv1") of codec.pt.

    For the upper left 64x64 pixels of leaves.png at quality 1. A layer's input is the output before
    it.
    """
    model, _ = load_checkpoint(FOLDER / "codec.pt")
    seen = {}
    for network in ("g_a", "h_a", "h_s", "g_s"):
        layers = getattr(model, network)
        layers.register_forward_pre_hook(
            lambda _, inputs, name=network: seen.update({name: inputs[0].numpy().copy()})
        )
        for name, layer in layers.named_children():
            name = f"{network}.{name}"
            layer.register_forward_hook(
                lambda *hooked, name=name: seen.update({name: hooked[2].numpy().copy()})
            )
    model(padded(images()["leaves"][:64, :64]), torch.tensor([1.0]))
    np.savez_compressed(FOLDER / "layers.npz", **seen)


if __name__ == "__main__":
    if sys.argv[1:] == ["--shipped"]:
        sys.exit(make_shipped())
    if sys.argv[1:] != ["--quantized"]:
        make_codec()
        make_layers()
    make_quantized()
    for codec in ("codec", "quantized"):
        export(
            argparse.Namespace(
                checkpoint=FOLDER / f"{codec}.pt", output=FOLDER / f"{codec}.npz", overwrite=True
            )
        )
    make_files()
