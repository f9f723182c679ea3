"""What each part of quantization costs (minutes).

    python tests/ablation.py --photos photos/                 rise of J on held-out crops, by part and by layer
    python tests/ablation.py --photos photos/ --data kodak/   BD-rate over the float codec with real files, step by step

--photos: the training folder, from which the scales are calibrated as quantize.py does it.
"""

import argparse
import copy
import math
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import measure_level, points  # noqa: E402
from lic.bitstream import ImageCoder, build_tables  # noqa: E402
from lic.checkpoint import load  # noqa: E402
from lic.files import run  # noqa: E402
from lic.images import find_images, fixed_crops, load_images, read_image  # noqa: E402
from lic.integer import freeze_h_s  # noqa: E402
from lic.metrics import bd_rate  # noqa: E402
from lic.pruning import channel_axes, rows, watch  # noqa: E402
from lic.quantization import (  # noqa: E402
    INPUTS,
    EIGHT_BIT,
    WEIGHT,
    along,
    equalize,
    fake_quantize,
    input_scales,
    largest_scale,
    quantize_layers,
)
from lic.rounding import patch_moments, round_weights  # noqa: E402
from lic.training import image_losses  # noqa: E402


@torch.no_grad()
def percentile_scales(model, x, share):
    """Scales of the 8-bit inputs such that `share` of the values are not clipped: {layer: ()}."""
    seen = watch(model, x, EIGHT_BIT, lambda v: v.flatten()[:: v.numel() // 5_000 | 1].clone())
    scales = {}
    for name, parts in seen.items():
        low, high = INPUTS[name]
        v = torch.cat(parts)
        steps = torch.where(v > 0, v / high, v / low).sort().values
        scales[name] = steps[int(share * (len(steps) - 1))]
    return scales


@torch.no_grad()
def to_nearest(model, names=INPUTS):
    """Weights on the 8-bit grid by the nearest integers, in place; activations float."""
    for name in names:
        layer = model.get_submodule(name)
        scale = along(channel_axes(layer)[0], largest_scale(rows(layer), *WEIGHT))
        layer.weight.copy_(fake_quantize(layer.weight, scale, *WEIGHT))
    return model


def with_float_inputs(codec, names=INPUTS):
    """A copy of a quantized codec in which the inputs of the layers `names` are not rounded."""
    codec = copy.deepcopy(codec)
    for name in names:
        codec.get_submodule(name).input_range = None
    return codec


def with_8_bit_weights(model, calibration):
    """A copy of a float codec with rounded weights, activations float; and its `round_weights`' moments and gains."""
    codec = copy.deepcopy(model)
    quantize_layers(codec)
    codec = with_float_inputs(codec)
    moments = patch_moments(codec, calibration)
    return codec, moments, round_weights(codec, moments)


def show_layers(model, trained, calibration, held_out):
    """Print the rise of J that each part costs without training, and each input after it: mean over images and levels, and worst."""
    base = image_losses(model, held_out)

    def change(codec):
        rises = image_losses(codec, held_out) / base - 1
        return f"{rises.mean():+8.2%} {rises.max():+8.2%}"

    def rounded_inputs(start, scales, names=INPUTS):
        codec = copy.deepcopy(start)
        quantize_layers(codec, scales, names)
        return codec

    equalized = copy.deepcopy(model)
    equalize(equalized, calibration)
    chosen = input_scales(equalized, calibration)
    least, largest = (input_scales(equalized, calibration, clipped) for clipped in (EIGHT_BIT, []))
    weights, moments, gains = with_8_bit_weights(equalized, calibration)
    print("rise of J: mean over images and levels, and worst")
    print(f"weights alone: nearest integers, not equalized   {change(to_nearest(copy.deepcopy(model)))}")
    print(f"               nearest integers, equalized       {change(to_nearest(copy.deepcopy(equalized)))}")
    print(f"               errors cancel, not equalized      {change(with_8_bit_weights(model, calibration)[0])}")
    print(f"               errors cancel, equalized          {change(weights)}")
    print(f"inputs alone:  not equalized                     {change(rounded_inputs(model, input_scales(model, calibration)))}")
    print(f"               equalized                         {change(rounded_inputs(equalized, chosen))}")
    print(f"               least error everywhere            {change(rounded_inputs(equalized, least))}")
    print(f"               nothing clipped                   {change(rounded_inputs(equalized, largest))}")
    for share in (0.999, 0.9999):
        scales = chosen | percentile_scales(equalized, calibration, share)
        print(f"               {share:.2%} of the values inside       {change(rounded_inputs(equalized, scales))}")
    both = rounded_inputs(equalized, chosen)
    round_weights(both, patch_moments(both, calibration))
    print(f"both, equalized                                  {change(both)}")

    print("\nequalized      weights: nearest    errors cancel    error of the      inputs: least error    nothing clipped")
    print("                                                  output smaller by")
    for name in INPUTS:
        codec = copy.deepcopy(equalized)
        quantize_layers(codec, names=[name])
        codec.get_submodule(name).input_range = None
        round_weights(codec, {name: moments[name]})
        inputs = ""
        if INPUTS[name]:
            clipped = change(rounded_inputs(equalized, least, [name])) if name in EIGHT_BIT else f"{'16 bits':>17}"
            inputs = f"{clipped}  {change(rounded_inputs(equalized, largest, [name]))}"
        nearest = to_nearest(copy.deepcopy(equalized), [name])
        print(f"{name:10} {change(nearest)} {change(codec)}  {10 * math.log10(gains[name]):6.1f} dB  {inputs}", flush=True)

    print(f"\nquantized and trained     {change(trained)}")
    rounded = [name for name in INPUTS if trained.get_submodule(name).input_range]
    for name in rounded:
        print(f"input of {name} float {change(with_float_inputs(trained, [name]))}")
    print(f"all inputs float          {change(with_float_inputs(trained, rounded))}")


def variants(model, trained, calibration):
    """(name, codec) of each measurement; model, trained: the float codec and what quantize.py made of it."""

    def quantized(start, names=INPUTS, float_inputs=()):
        codec = copy.deepcopy(start)
        quantize_layers(codec, scales, names, float_inputs)
        round_weights(codec, patch_moments(codec, calibration, names))
        freeze_h_s(codec)
        return codec

    def simulated(codec):
        codec = copy.deepcopy(codec)
        codec.quantization = None  # the coder then runs the same h_s, 8 bits simulated, in float64
        return codec

    yield "float", model
    yield "8-bit weights, nearest, not equalized", to_nearest(copy.deepcopy(model))
    equalized = copy.deepcopy(model)
    equalize(equalized, calibration)
    scales = input_scales(equalized, calibration)
    yield "8-bit weights, nearest", to_nearest(copy.deepcopy(equalized))
    yield "8-bit weights, errors cancel", simulated(with_8_bit_weights(equalized, calibration)[0])
    yield "h_s alone, in integers", quantized(equalized, [n for n in INPUTS if n.startswith("h_s")])
    yield "8 bits in all, calibrated", quantized(equalized)
    yield "8 bits as shipped, calibrated", quantized(equalized, float_inputs=trained.quantization.get("float_inputs", ()))
    yield "8 bits as shipped, trained", trained
    yield "the same, h_s simulated in float64", simulated(trained)
    yield "its weights, activations float", simulated(with_float_inputs(trained))


def show_bd_rates(model, trained, calibration, images):
    anchor = None
    for name, codec in variants(model, trained, calibration):
        coder = ImageCoder(codec, build_tables(codec), "0" * 16)
        with tempfile.TemporaryDirectory() as folder:
            curve = points(measure_level(codec, coder, images, level, Path(folder)) for level in range(len(codec.lambdas)))
        anchor = anchor or curve
        percent, why = bd_rate(anchor, curve)
        print(f"{name:40}" + (why or f"{percent:+.2f} %"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--data")
    parser.add_argument("--float", default="checkpoints/pruned.pt")
    parser.add_argument("--quantized", default="checkpoints/quantized.pt")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--crop", type=int, default=128)
    args = parser.parse_args()
    train, validation = load_images(args.photos, args.crop)
    calibration = fixed_crops(train, args.calibration, args.crop)
    model, _ = load(vars(args)["float"])
    if args.data:
        images = [read_image(path) for path in find_images(args.data)]
        print(f"PSNR BD-rate over {vars(args)['float']}, {len(images)} images")
        show_bd_rates(model, load(args.quantized)[0], calibration, images)
    else:
        show_layers(model, load(args.quantized)[0], calibration, fixed_crops(validation, 64, args.crop))


if __name__ == "__main__":
    run(main)
