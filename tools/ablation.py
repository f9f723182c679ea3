"""What each part of quantization costs (minutes).

    python tools/ablation.py --photos photos/                 rise of J on held-out crops
    python tools/ablation.py --photos photos/ --data kodak/   BD-rate with real files

Prints the rise of J over the float codec: of rounded weights, of rounded inputs, of both, then of
each layer alone. With --data, the PSNR BD-rate over the float codec in its place, step by step up
to the codec that quantize.py made. --photos is the training folder; the scales are calibrated on
it as quantize.py does it.
"""

import copy
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lic.codec import structure
from lic.codec.bitstream import ImageCoder
from lic.codec.checkpoint import FLOAT_STAGES, load_checkpoint
from lic.codec.eight_bits import (
    WEIGHT,
    eight_bit_inputs,
    fake_quantize,
    input_ranges,
    quantize_layers,
)
from lic.codec.integer import freeze_h_s
from lic.codec.tables import build_tables
from lic.images import find_images, fixed_crops, read_image
from lic.measure import crew, measure_levels, points
from lic.metrics import bd_rate
from lic.options import make_parser, multiple_of, positive_whole_number
from lic.photographs import load_images
from lic.program import run
from lic.shrink.quantization import equalize, input_scales, largest_scale, sample
from lic.shrink.rounding import patch_moments, round_weights
from lic.shrink.statistics import layer_inputs
from lic.train.loss import image_losses

LABEL = 49  # columns of the label before a rise


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--photos", required=True, help="folder of images to calibrate on, the training folder")
    add("--validation", help="folder of images to hold out (default: one in sixteen of --photos)")
    add("--data", help="folder of images to measure BD-rates on (default: rise of J instead)")
    add("--float", dest="float_path", default="checkpoints/pruned.pt",
        help="the float codec (default: checkpoints/pruned.pt)")  # fmt: skip
    add("--quantized", default="checkpoints/quantized.pt",
        help="what quantize.py made of it (default: checkpoints/quantized.pt)")  # fmt: skip
    add("--calibration", type=positive_whole_number, default=512,
        help="crops to calibrate on, each of another image (default: 512)")  # fmt: skip
    add("--crop", type=multiple_of(structure.total_stride()), default=128,
        help="side of a crop, pixels (default: 128)")  # fmt: skip
    return parser.parse_args()


# copies of a codec, one part of it changed


def equalized_copy(model, calibration):
    codec = copy.deepcopy(model)
    equalize(codec, calibration)
    return codec


@torch.no_grad()
def with_nearest_weights(model, names=None):
    """Weights of the layers `names`, by default all, on the 8-bit grid by the nearest integers."""
    codec = copy.deepcopy(model)
    for name in names or input_ranges():
        layer = codec.get_submodule(name)
        out_axis, _ = structure.channel_axes(layer)
        scale = largest_scale(structure.weight_rows(layer), *WEIGHT)
        scale = structure.broadcast(scale, out_axis)
        layer.weight.copy_(fake_quantize(layer.weight, scale, *WEIGHT))
    return codec


def with_8_bit_weights(model, moments, names=None):
    """Weights of the layers `names`, by default all, rounded so that errors cancel.

    Returns the codec and what `round_weights` returns. moments: from `float_moments`.
    """
    codec = copy.deepcopy(model)
    quantize_layers(codec, names=names)
    codec = with_float_inputs(codec, names)
    gains = round_weights(codec, {name: moments[name] for name in names or input_ranges()})
    return codec, gains


def with_rounded_inputs(model, scales, names=None):
    """Inputs of the layers `names`, by default all that can be, on the grids of `scales`."""
    codec = copy.deepcopy(model)
    quantize_layers(codec, scales, names)
    return codec


def with_float_inputs(quantized, names=None):
    """The inputs of the layers `names`, by default all, not rounded."""
    codec = copy.deepcopy(quantized)
    for name in names or input_ranges():
        codec.get_submodule(name).input_range = None
    return codec


def with_simulated_h_s(quantized):
    """The coder then runs the same h_s, 8 bits simulated, in float64."""
    codec = copy.deepcopy(quantized)
    codec.quantization = None
    return codec


def float_moments(model, calibration):
    """`patch_moments` of a float codec, none of its inputs rounded."""
    codec = copy.deepcopy(model)
    quantize_layers(codec)
    return patch_moments(with_float_inputs(codec), calibration)


@torch.no_grad()
def percentile_scales(model, x, share):
    """Scales of the 8-bit inputs that clip no more than 1 - `share` of the values: {layer: ()}."""
    ranges = input_ranges()
    scales = {}
    for name, samples in layer_inputs(model, x, eight_bit_inputs(), sample).items():
        low, high = ranges[name]
        v = torch.cat(samples)
        needed = torch.where(v > 0, v / high, v / low).sort().values  # scale that just holds v
        scales[name] = needed[int(share * (len(needed) - 1))]
    return scales


# rise of J


def show_rises(model, trained, calibration, held_out):
    """Print the rise of J that each part costs, without training and after it.

    model, trained: the float codec and what quantize.py made of it. Mean over images and levels,
    and worst.
    """
    base = image_losses(model, held_out)

    def rise(codec):
        rises = image_losses(codec, held_out) / base - 1
        return f"{rises.mean():+8.2%} {rises.max():+8.2%}"

    equalized = equalized_copy(model, calibration)
    moments = float_moments(equalized, calibration)
    least_error = input_scales(equalized, calibration, clipped=eight_bit_inputs())
    nothing_clipped = input_scales(equalized, calibration, clipped=[])

    print("rise of J: mean over images and levels, and worst")
    show_weights(model, equalized, calibration, moments, rise)
    show_inputs(model, equalized, calibration, least_error, nothing_clipped, rise)
    show_layers(equalized, moments, least_error, nothing_clipped, rise)
    show_trained(trained, rise)


def show_row(label, result):
    print(f"{label:{LABEL}}{result}", flush=True)


def show_weights(model, equalized, calibration, moments, rise):
    """Both ways to round the weights, inputs float. moments: `float_moments` of equalized."""
    codec = with_nearest_weights(model)
    show_row("weights alone: nearest integers, not equalized", rise(codec))
    codec = with_nearest_weights(equalized)
    show_row("               nearest integers, equalized", rise(codec))
    codec, _ = with_8_bit_weights(model, float_moments(model, calibration))
    show_row("               errors cancel, not equalized", rise(codec))
    codec, _ = with_8_bit_weights(equalized, moments)
    show_row("               errors cancel, equalized", rise(codec))


def show_inputs(model, equalized, calibration, least_error, nothing_clipped, rise):
    """Several ways to choose the scales of the inputs, weights float; then both rounded."""
    codec = with_rounded_inputs(model, input_scales(model, calibration))
    show_row("inputs alone:  not equalized", rise(codec))
    chosen = input_scales(equalized, calibration)
    codec = with_rounded_inputs(equalized, chosen)
    show_row("               equalized", rise(codec))
    codec = with_rounded_inputs(equalized, least_error)
    show_row("               least error everywhere", rise(codec))
    codec = with_rounded_inputs(equalized, nothing_clipped)
    show_row("               nothing clipped", rise(codec))
    for share in (0.999, 0.9999):
        scales = chosen | percentile_scales(equalized, calibration, share)
        codec = with_rounded_inputs(equalized, scales)
        show_row(f"               {share:.2%} of the values inside", rise(codec))
    codec = with_rounded_inputs(equalized, chosen)
    round_weights(codec, patch_moments(codec, calibration))
    show_row("both, equalized", rise(codec))


def show_layers(equalized, moments, least_error, nothing_clipped, rise):
    """A row a layer: its weights rounded in two ways, then its input with two scales."""
    print("\nequalized      weights: nearest    errors cancel    error of the      "
          "inputs: least error    nothing clipped")  # fmt: skip
    print("                                                  output smaller by")
    for name, limits in input_ranges().items():
        nearest = with_nearest_weights(equalized, [name])
        cancelled, gains = with_8_bit_weights(equalized, moments, [name])
        decibels = 10 * math.log10(gains[name])
        inputs = ""
        if limits:
            inputs = f"{'16 bits':>17}"
            if name in eight_bit_inputs():
                inputs = rise(with_rounded_inputs(equalized, least_error, [name]))
            inputs += f"  {rise(with_rounded_inputs(equalized, nothing_clipped, [name]))}"
        print(f"{name:10} {rise(nearest)} {rise(cancelled)}  {decibels:6.1f} dB  {inputs}",
              flush=True)  # fmt: skip


def show_trained(trained, rise):
    """The codec that was trained, and what each of its rounded inputs costs it."""
    print(f"\nquantized and trained     {rise(trained)}")
    rounded = [name for name in input_ranges() if trained.get_submodule(name).input_range]
    for name in rounded:
        print(f"input of {name} float {rise(with_float_inputs(trained, [name]))}")
    print(f"all inputs float          {rise(with_float_inputs(trained))}")


# BD-rate


def variants(model, trained, calibration):
    """(label, codec) of each BD-rate; model, trained: as in `show_rises`."""
    equalized = equalized_copy(model, calibration)
    scales = input_scales(equalized, calibration)
    moments = float_moments(equalized, calibration)
    h_s = [name for name in input_ranges() if name.startswith("h_s")]
    float_inputs = trained.quantization.get("float_inputs", ())

    def quantized(names=None, float_inputs=()):
        codec = copy.deepcopy(equalized)
        quantize_layers(codec, scales, names, float_inputs)
        round_weights(codec, patch_moments(codec, calibration, names))
        freeze_h_s(codec)
        return codec

    yield "float", model
    yield "8-bit weights, nearest, not equalized", with_nearest_weights(model)
    yield "8-bit weights, nearest", with_nearest_weights(equalized)
    cancelled, _ = with_8_bit_weights(equalized, moments)
    yield "8-bit weights, errors cancel", with_simulated_h_s(cancelled)
    yield "h_s alone, in integers", quantized(h_s)
    yield "8 bits in all, calibrated", quantized()
    yield "8 bits as shipped, calibrated", quantized(float_inputs=float_inputs)
    yield "8 bits as shipped, trained", trained
    yield "the same, h_s simulated in float64", with_simulated_h_s(trained)
    all_float = with_float_inputs(trained)
    yield "its weights, activations float", with_simulated_h_s(all_float)


def show_bd_rates(model, trained, calibration, images):
    anchor = None
    for label, codec in variants(model, trained, calibration):
        curve = rate_curve(codec, images)
        anchor = anchor or curve
        percent, why = bd_rate(anchor, curve)
        result = why or f"{percent:+.2f} %"
        print(f"{label:40}{result}", flush=True)


def rate_curve(codec, images):
    """[(bpp, PSNR)] of real files, a point a level."""
    coder = ImageCoder(codec, build_tables(codec), fingerprint="0" * 16)
    with crew(None, coder, workers=1) as each:
        return points(measure_levels(coder, images, each))


def main():
    args = parse_args()
    train, validation = load_images(args.photos, args.crop, args.validation)
    calibration = fixed_crops(train, args.calibration, args.crop)
    model, _ = load_checkpoint(args.float_path, stages=FLOAT_STAGES)
    trained, _ = load_checkpoint(args.quantized, stages=("quantize",))
    if args.data:
        images = [read_image(path) for path in find_images(args.data)]
        print(f"PSNR BD-rate over {args.float_path}, {len(images)} images")
        show_bd_rates(model, trained, calibration, images)
    else:
        show_rises(model, trained, calibration, fixed_crops(validation, 64, args.crop))


if __name__ == "__main__":
    run(main)
