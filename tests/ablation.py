"""What each part of quantization costs, in BD-rate over the float codec with real files (takes minutes).

    python tests/ablation.py --data kodak/ --photos photos/ --float checkpoints/pruned.pt --quantized checkpoints/quantized.pt

--photos: the training folder, from which the scales are calibrated as quantize.py does it.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import measure_level, points  # noqa: E402
from lic.bitstream import ImageCoder  # noqa: E402
from lic.checkpoint import load  # noqa: E402
from lic.files import run  # noqa: E402
from lic.images import find_images, fixed_crops, load_images, read_image  # noqa: E402
from lic.integer import freeze_h_s  # noqa: E402
from lic.metrics import bd_rate  # noqa: E402
from lic.pruning import channel_axes, rows  # noqa: E402
from lic.quantization import INPUTS, WEIGHT, along, equalize, fake_quantize, input_scales, least_error_scale, quantize_layers  # noqa: E402


@torch.no_grad()
def round_weights(model):
    """Weights on the 8-bit grid, activations float, in place."""
    for name in INPUTS:
        layer = model.get_submodule(name)
        scale = along(channel_axes(layer)[0], least_error_scale(rows(layer), *WEIGHT))
        layer.weight.copy_(fake_quantize(layer.weight, scale, *WEIGHT))
    return model


def quantized(model, scales, names=INPUTS):
    quantize_layers(model, scales, names)
    freeze_h_s(model)
    return model


def variants(model, trained, calibration):
    """(name, codec) of each measurement; model, trained: the float codec and what quantize.py made of it."""
    yield "float", model
    yield "8-bit weights, as trained", round_weights(copy.deepcopy(model))
    equalized = copy.deepcopy(model)
    equalize(equalized, calibration)
    scales = input_scales(equalized, calibration)
    yield "8-bit weights, equalized", round_weights(copy.deepcopy(equalized))
    yield "h_s alone: 8 bits, in integers", quantized(copy.deepcopy(equalized), scales, [n for n in INPUTS if n.startswith("h_s")])
    yield "all: 8 bits, calibrated", quantized(equalized, scales)
    yield "all: 8 bits, calibrated and trained", trained
    simulated = copy.deepcopy(trained)
    simulated.quantization = None  # the coder then runs the same h_s, 8 bits simulated, in float64
    yield "the same, h_s simulated in float64", simulated
    weights = copy.deepcopy(simulated)
    for name in INPUTS:
        weights.get_submodule(name).input_range = None
    yield "its weights, activations float", weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--float", default="checkpoints/pruned.pt")
    parser.add_argument("--quantized", default="checkpoints/quantized.pt")
    args = parser.parse_args()
    images = [read_image(path) for path in find_images(args.data)]
    calibration = fixed_crops(load_images(args.photos, 256)[0], 512, 128)
    model, meta = load(vars(args)["float"])
    print(f"PSNR BD-rate over {vars(args)['float']}, {len(images)} images")
    anchor = None
    for name, codec in variants(model, load(args.quantized)[0], calibration):
        coder = ImageCoder(codec, meta["tables"], meta["fingerprint"])
        with tempfile.TemporaryDirectory() as folder:
            curve = points(measure_level(codec, coder, images, level, Path(folder)) for level in range(len(codec.lambdas)))
        anchor = anchor or curve
        percent, why = bd_rate(anchor, curve)
        print(f"{name:40}" + (why or f"{percent:+.2f} %"), flush=True)


if __name__ == "__main__":
    run(main)
