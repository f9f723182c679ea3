"""Quantize a codec to 8-bit weights and activations.

    python quantize.py                                      after python prune.py
    python quantize.py --checkpoint runs/pruned.pt --data photos/ --steps 2000 --amp

The channels' ranges are balanced first (quantization.equalize). Weights: int8, one scale an output channel.
Activations: 8 bits, calibrated on training crops.
--steps of training with simulated quantization then adapt the weights and the activations' scales; 0 skips them.
"""

import argparse
import copy

import torch

from lic.bitstream import build_tables
from lic.checkpoint import load, save
from lic.files import check_writable, run
from lic.images import fixed_crops, load_images
from lic.integer import freeze_h_s
from lic.pruning import rows
from lic.quantization import (
    CLIPPED,
    INPUTS,
    WEIGHT,
    equalize,
    fake_quantize,
    input_scales,
    largest_scale,
    least_error_scale,
    quantize_layers,
)
from lic.training import add_training_arguments, fit, image_losses, mean_loss, positive


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/pruned.pt", help="float codec (default: runs/pruned.pt)")
    parser.add_argument("--calibration", type=positive, default=512,
                        help="crops of at most 128x128 that set the scales, each of another image (default: 512)")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only print what each part of the calibration costs")
    add_training_arguments(parser, steps=200, lr=1e-4, out="runs/quantized.pt")
    return parser.parse_args()


@torch.no_grad()
def report(model, calibration, held_out):
    """Print the rise of J that each part costs without training: its mean over images and levels, and the worst of them."""
    base = image_losses(model, held_out)

    def rise(start, scales=None, names=INPUTS):
        """scales: of the inputs; None: the weights alone."""
        quantized = copy.deepcopy(start)
        quantize_layers(quantized, scales or largest, names)
        for name in names:
            if not scales:
                quantized.get_submodule(name).input_range = None
        rises = image_losses(quantized, held_out) / base - 1
        return f"{rises.mean():+8.2%} {rises.max():+8.2%}"

    equalized = copy.deepcopy(model)
    equalize(equalized, calibration)
    every = [name for name, input_range in INPUTS.items() if input_range]
    least, largest, chosen = (input_scales(equalized, calibration, clipped) for clipped in (every, [], CLIPPED))
    print("rise of J: mean over images and levels, and worst")
    print(f"weights alone, as trained                {rise(model)}")
    print(f"weights alone, equalized                 {rise(equalized)}")
    print(f"and activations: as trained              {rise(model, input_scales(model, calibration))}")
    print(f"                 equalized               {rise(equalized, chosen)}")
    print(f"                 least error everywhere  {rise(equalized, least)}")
    print(f"                 nothing clipped         {rise(equalized, largest)}")
    print("\nequalized      weights alone     with inputs, as chosen")
    for network in ("g_a", "h_a", "h_s", "g_s"):
        names = [name for name in INPUTS if name.startswith(network)]
        print(f"{network:10} {rise(equalized, None, names)}  {rise(equalized, chosen, names)}")
    print("\nequalized      weights alone     with its input:    nothing clipped    weights' error: mean and worst row; mean with the largest")
    print("                                 least error                           weight's scale")
    for name in INPUTS:
        W = rows(equalized.get_submodule(name))
        error = [(fake_quantize(W, scale[:, None], *WEIGHT) - W).norm(dim=1) / W.norm(dim=1).clamp(min=1e-12)
                 for scale in (least_error_scale(W, *WEIGHT), largest_scale(W, *WEIGHT))]  # fmt: skip
        inputs = f"{rise(equalized, least, [name])}  {rise(equalized, largest, [name])}" if name in every else " " * 36
        print(f"{name:10} {rise(equalized, None, [name])}  {inputs}  {error[0].mean():.3%}  {error[0].max():.3%}  {error[1].mean():.3%}")


def main():
    args = parse_args()
    check_writable(args.out)
    model, meta = load(args.checkpoint, stages=("train", "control", "prune"))
    train, validation = load_images(args.data, args.crop)
    calibration = fixed_crops(train, args.calibration, min(128, args.crop))
    if args.report:
        return report(model, calibration, fixed_crops(validation, 64, args.crop))

    held_out = fixed_crops(validation, 16, args.crop)
    metrics = {"held_out_J_float": mean_loss(model, held_out).tolist()}
    equalize(model, calibration)
    quantize_layers(model, input_scales(model, calibration))
    metrics["held_out_J_calibrated"] = mean_loss(model, held_out).tolist()
    if args.steps:
        fit(model, train, held_out, args, parent=meta["fingerprint"])
        metrics["held_out_J_tuned"] = mean_loss(model, held_out).tolist()

    for name, J in metrics.items():
        print(f"{name:22}", *(f"{v:.4f}" for v in J))
    freeze_h_s(model)
    save(args.out, model, build_tables(model), "quantize", vars(args), args.steps, parent=meta, metrics=metrics)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
