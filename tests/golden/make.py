"""Makes the golden files:

    python tests/golden/make.py                 all but those of the shipped codecs, in a minute
    python tests/golden/make.py exact layers    some of them, by name: see PARTS, at the end
    python tests/golden/make.py shipped         those of the codecs in checkpoints/

Two small codecs (float and 8-bit, every width another number), files that they wrote, the symbols
and pixels in them, and every layer's input and output for one image; and a file that refuses the
mistakes of mistakes.py. They are made once and pinned: a test that fails against them says that
something changed what old files decode to. Make them anew only for a new format. Those of the
shipped codecs are made anew with each new checkpoint.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent.parent), str(FOLDER.parent.parent / "ports")]

from lic.__main__ import export
from lic.codec import ans
from lic.codec.bitstream import ImageCoder, channel_index, load_coder, padded
from lic.codec.checkpoint import load_checkpoint, save_checkpoint
from lic.codec.eight_bits import quantize_layers
from lic.codec.header import Header, crc_of_symbols, pack_file, read_header
from lic.codec.integer import IntegerHyperSynthesis, freeze_h_s
from lic.codec.model import Codec
from lic.codec.tables import Tables, build_tables
from lic.files import release_outputs
from lic.images import dead_leaves, fixed_crops
from lic.photographs import load_images
from lic.shrink.quantization import input_scales
from lic.shrink.rounding import patch_moments, round_weights
from lic.train.loop import fit
from mistakes import FLOAT_MISTAKES, INTEGER_MISTAKES, MistakenDecoder

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
SHIPPED = ("pruned", "quantized")


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
    """Keeps what passes through ans.decode: the symbols as a decoder sees them."""

    def __enter__(self):
        self.decode, self.symbols = ans.decode, []

        def decode(*arguments):
            self.symbols.append(self.decode(*arguments))
            return self.symbols[-1]

        ans.decode = decode
        return self.symbols

    def __exit__(self, *_):
        ans.decode = self.decode


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
    """shipped/NAME.lic, a file of each codec of SHIPPED, and every fourth pixel in it.

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


@torch.inference_mode()
def make_quantized_layers():
    """What the decoder computes of quantized_leaves_2.lic, layer by layer.

    z, the integers that each layer of h_s gives, index, mean; y, the input of g_s and the output of
    each of its layers.
    """
    path = FOLDER / "quantized_leaves_2.lic"
    image_coder = load_coder(FOLDER / "quantized.pt")
    model, seen = image_coder.model, {}
    header, _ = read_header(path.read_bytes())
    with Recorder() as symbols:
        image_coder.decode(path.read_bytes())
    z = torch.from_numpy(symbols[0]).reshape(1, WIDTHS["z"], *padded_size(header, 64))
    y = torch.from_numpy(symbols[1]).reshape(1, WIDTHS["y"], *padded_size(header, 16))

    h_s = IntegerHyperSynthesis(model.h_s)
    for k, layer in enumerate(h_s.layers[1:], start=1):  # what enters conv2 is what conv1 gave
        layer.register_forward_pre_hook(
            lambda _, inputs, k=k: seen.update({f"h_s.conv{k}": inputs[0].numpy().astype(np.int32)})
        )
    mean, index = h_s(z.double())
    for name, layer in model.g_s.named_children():
        layer.register_forward_hook(
            lambda *hooked, name=name: seen.update({f"g_s.{name}": hooked[2].numpy().copy()})
        )
    _, inverse_gain = model.gains(torch.tensor([header.quality / 256]))
    y_hat = (y + mean).float() * inverse_gain
    model.g_s(y_hat)
    np.savez_compressed(
        FOLDER / "layers_quantized.npz",
        z=z.numpy().astype(np.int32),
        mean=mean.numpy(),
        index=index.numpy().astype(np.uint8),
        y=y.numpy().astype(np.int32),
        g_s=y_hat.numpy(),
        **seen,
    )


def padded_size(header, side):
    """Rows and columns of squares of `side` pixels that cover the padded image."""
    return [-(-pixels // 64) * 64 // side for pixels in (header.height, header.width)]


def make_exact():
    """Files that a decoder with one of the mistakes of mistakes.py refuses.

    exact/float.lic is of codec.npz. exact/integer.lic is of exact/integer.npz: quantized.npz with
    the multipliers of every other channel rounded to powers of two, so that one half occurs.
    """
    forge("float", dict(np.load(FOLDER / "codec.npz")), FLOAT_MISTAKES)
    arrays = dict(np.load(FOLDER / "quantized.npz"))
    for name in ("h_s.conv1", "h_s.conv2", "h_s.conv3"):
        multiplier = arrays[f"{name}.multiplier"]
        multiplier[::2] = 2.0 ** np.round(np.log2(multiplier[::2]))
    about = json.loads(str(arrays["about"]))
    about["fingerprint"] = hashlib.sha256(arrays["h_s.conv3.multiplier"].tobytes()).hexdigest()
    arrays["about"] = np.array(json.dumps(about))
    np.savez(FOLDER / "exact" / "integer.npz", **arrays)
    forge("integer", arrays, INTEGER_MISTAKES)


def forge(name, arrays, mistakes):
    """exact/NAME.lic, of symbols that no encoder gave.

    Random z are drawn until each mistake changes a table index somewhere; around such places z is
    cut out, as far as one index sees, and the pieces are put side by side.
    """
    tables = {
        kind: Tables(*(arrays[f"tables.{kind}.{field}"] for field in Tables._fields))
        for kind in ("z", "y")
    }
    rng, side, patches = np.random.default_rng(0), 64, {}
    while len(patches) < len(mistakes):
        channels = zip(tables["z"].offsets, tables["z"].sizes)
        z = np.stack([rng.integers(o + 17, o + n - 17, (side, side)) for o, n in channels])
        _, index = MistakenDecoder(arrays).h_s(z)
        for mistake, settings in mistakes.items():
            _, other = MistakenDecoder(arrays, **settings).h_s(z)
            for _, i, j in np.argwhere(other != index) // (1, 4, 4):
                if 2 <= i < side - 2 and 2 <= j < side - 2:
                    patches[mistake] = z[:, i - 2 : i + 3, j - 2 : j + 3]

    z = np.concatenate(list(patches.values()), axis=2)
    _, index = MistakenDecoder(arrays).h_s(z)
    z_symbols = z.astype(np.int32).ravel()
    y_symbols = rng.integers(-2, 3, index.size).astype(np.int32)
    z_words, _ = ans.encode(z_symbols, channel_index(z.shape), tables["z"])
    y_words, _ = ans.encode(y_symbols, index.astype(np.uint8).ravel(), tables["y"])
    height, width = 64 * z.shape[1] - 1, 64 * z.shape[2] - 1
    fingerprint = bytes.fromhex(json.loads(str(arrays["about"]))["fingerprint"])[:8]
    header = Header(256, height, width, fingerprint, (len(z_words), len(y_words), 0, 0))
    payload = z_words.astype("<u4").tobytes() + y_words.astype("<u4").tobytes()
    data = pack_file(header, crc_of_symbols(header, z_symbols, y_symbols), payload)
    (FOLDER / "exact" / f"{name}.lic").write_bytes(data)
    print(f"exact/{name}.lic: {len(data)} bytes, {index.size} symbols of y")


def make_archives():
    for codec in ("codec", "quantized"):
        path = FOLDER / codec
        export(argparse.Namespace(checkpoint=f"{path}.pt", output=f"{path}.npz", overwrite=True))
    release_outputs()


PARTS = {
    "codec": make_codec,
    "layers": make_layers,
    "quantized": make_quantized,
    "archives": make_archives,
    "files": make_files,
    "quantized_layers": make_quantized_layers,
    "exact": make_exact,
    "shipped": make_shipped,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or [part for part in PARTS if part != "shipped"]:
        PARTS[name]()
