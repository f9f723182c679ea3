"""Quantize a codec to 8-bit weights and activations.

    python quantize.py                                      after python prune.py
    python quantize.py --checkpoint runs/pruned.pt --data photos/ --steps 2000 --amp

The channels' ranges are balanced first (quantization.equalize). Activations: 8 bits, in h_s 16, calibrated on training
crops; the latents and the input of the last layer, where 8 bits cost most, stay float. --steps of training with rounded
activations then adapt the weights, still float, and the scales of the 8 bits; 0 skips them. Weights: int8, one scale an
output channel, rounded last, so that the errors cancel in each layer's output (rounding.py).
"""

import argparse

from lic.bitstream import build_tables
from lic.checkpoint import load, save
from lic.files import LicError, run
from lic.images import fixed_crops, load_images
from lic.integer import freeze_h_s
from lic.quantization import EIGHT_BIT, equalize, input_scales, quantize_layers
from lic.rounding import patch_moments, round_weights
from lic.training import add_training_arguments, check_out, fit, mean_loss, positive_int


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/pruned.pt", help="float codec (default: runs/pruned.pt)")
    parser.add_argument("--calibration", type=positive_int, default=512,
                        help="crops of at most 128x128 that set scales and rounding, each of another image (default: 512)")  # fmt: skip
    parser.add_argument("--float-inputs", nargs="*", metavar="LAYER", default=["g_s.conv4"], choices=EIGHT_BIT,
                        help="layers whose input stays float (default: g_s.conv4; without a name: none)")  # fmt: skip
    add_training_arguments(parser, steps=200, lr=1e-4, out="runs/quantized.pt")
    return parser.parse_args()


def main():
    args = parse_args()
    check_out(args)
    model, meta = load(args.checkpoint, stages=("train", "control", "prune"))
    train, validation = load_images(args.data, args.crop)
    calibration = fixed_crops(train, args.calibration, min(128, args.crop))
    held_out = fixed_crops(validation, 16, args.crop)
    metrics = {"held_out_J_float": mean_loss(model, held_out).tolist()}
    equalize(model, calibration)
    quantize_layers(model, input_scales(model, calibration), float_inputs=args.float_inputs)
    metrics["held_out_J_inputs"] = mean_loss(model, held_out).tolist()
    if args.steps:
        fit(model, train, held_out, args, parent=[meta["fingerprint"], args.calibration])
        metrics["held_out_J_tuned"] = mean_loss(model, held_out).tolist()
        if any(p <= 0 for name, p in model.named_parameters() if name.endswith("input_scale")):
            raise LicError("training drove the scale of an activation to zero; quantize again with a smaller --lr")

    round_weights(model, patch_moments(model, calibration))
    metrics["held_out_J"] = mean_loss(model, held_out).tolist()
    freeze_h_s(model)

    for name, J in metrics.items():
        print(f"{name:18}", *(f"{v:.4f}" for v in J))
    save(args.out, model, build_tables(model), "quantize", vars(args), args.steps, parent=meta, metrics=metrics)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
