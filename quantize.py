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
from lic.quantization import INPUTS, WEIGHT, equalize, fake_quantize, input_scales, least_error_scale, quantize_layers
from lic.training import add_training_arguments, fit, mean_loss

CALIBRATION = 512  # crops of at most 128x128, each of another photograph; with 16, what is rare is clipped (docs/quantization.md)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/pruned.pt", help="float codec (default: runs/pruned.pt)")
    parser.add_argument("--report", action="store_true", help="only print what each part of the calibration costs")
    add_training_arguments(parser, steps=200, lr=1e-4, out="runs/quantized.pt")
    return parser.parse_args()


@torch.no_grad()
def report(model, calibration, held_out):
    """Print the rise of J, mean over the levels, that each part costs without training."""
    base = mean_loss(model, held_out)

    def rise(start, scales, activations=True, names=INPUTS):
        quantized = copy.deepcopy(start)
        quantize_layers(quantized, scales, names)
        for name in names:
            if not activations:
                quantized.get_submodule(name).input_range = None
        return (mean_loss(quantized, held_out) / base - 1).mean().item()

    equalized = copy.deepcopy(model)
    equalize(equalized, calibration)
    for what, start in {"as trained": model, "equalized": equalized}.items():
        scales = input_scales(start, calibration)
        print(f"{what}: weights alone {rise(start, scales, False):+.2%}, weights and activations {rise(start, scales):+.2%}")
    print("\none network at a time, equalized")
    for network in ("g_a", "h_a", "h_s", "g_s"):
        names = [name for name in INPUTS if name.startswith(network)]
        print(f"{network:10} {rise(equalized, scales, False, names):+.3%}, with its inputs {rise(equalized, scales, True, names):+.3%}")
    print("\none layer at a time, equalized        its weights' error: mean and worst row, and mean with scales by the maximum")
    for name in INPUTS:
        W = rows(equalized.get_submodule(name))
        error = [(fake_quantize(W, scale[:, None], *WEIGHT) - W).norm(dim=1) / W.norm(dim=1).clamp(min=1e-12)
                 for scale in (least_error_scale(W, *WEIGHT), W.abs().amax(1).clamp(min=1e-12) / WEIGHT[1])]  # fmt: skip
        print(f"{name:10} {rise(equalized, scales, False, [name]):+.3%}, with its input {rise(equalized, scales, True, [name]):+.3%}"
              f"    {error[0].mean():.3%}  {error[0].max():.3%}  {error[1].mean():.3%}")  # fmt: skip


def main():
    args = parse_args()
    check_writable(args.out)
    model, meta = load(args.checkpoint, stages=("train", "control", "prune"))
    train, validation = load_images(args.data, args.crop)
    calibration = fixed_crops(train, CALIBRATION, min(128, args.crop))
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
