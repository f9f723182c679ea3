"""Quantize a codec to 8-bit weights and activations.

    python quantize.py                                      after python prune.py
    python quantize.py --checkpoint runs/pruned.pt --data photos/ --steps 2000 --amp

First the channels' ranges are balanced. Then the inputs of the convolutions are rounded to 8 bits,
in h_s to 16, with scales calibrated on training crops; the latents and the input of the last layer,
where 8 bits cost most, stay float. --steps of training with rounded inputs adapt the weights, still
float, and the scales of the 8 bits; 0 skips them. The weights are rounded last, to int8 with one
scale an output channel, so that the errors cancel in each layer's output.
"""

import lic.interrupt  # first: from here on Ctrl-C ends with one line

from lic.codec.checkpoint import FLOAT_STAGES, load_checkpoint, save_checkpoint
from lic.codec.eight_bits import eight_bit_inputs, pixel_layers, quantize_layers
from lic.codec.integer import freeze_h_s
from lic.codec.tables import build_tables
from lic.images import fixed_crops
from lic.options import make_parser, positive_whole_number
from lic.program import quoted, run
from lic.shrink.quantization import equalize, input_scales
from lic.shrink.rounding import patch_moments, round_weights
from lic.train.loop import fit
from lic.train.loss import mean_loss
from lic.train.processes import rank
from lic.train.stage import (
    HELD_OUT_CROPS,
    add_training_arguments,
    check_out,
    held_out_option,
    images_for,
    parse_training_args,
)


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", default="runs/pruned.pt",
                        help="float codec (default: runs/pruned.pt)")
    parser.add_argument("--calibration", type=positive_whole_number, default=512,
                        help="crops of at most 128x128 that set scales and rounding, each of "
                        "another image (default: 512)")
    parser.add_argument("--float-inputs", nargs="*", metavar="LAYER", default=pixel_layers(),
                        choices=eight_bit_inputs(),
                        help="layers whose input stays float, in place of the default (default: "
                        "the one that makes the pixels, g_s.conv4; without a name: none)")
    add_training_arguments(parser, steps=200, lr=1e-4, out="runs/quantized.pt")
    # fmt: on
    return parse_training_args(parser)


def main():
    args = parse_args()
    check_out(args)
    model, meta = load_checkpoint(args.checkpoint, stages=FLOAT_STAGES)
    train, validation = images_for(args, meta)
    calibration = fixed_crops(train, args.calibration, min(128, args.crop))
    held_out = fixed_crops(validation, HELD_OUT_CROPS, args.crop)  # (16, 3, crop, crop), or fewer
    metrics = {"held_out_J_float": mean_loss(model, held_out).tolist()}

    equalize(model, calibration)
    scales = input_scales(model, calibration)
    quantize_layers(model, scales, float_inputs=args.float_inputs)
    metrics["held_out_J_inputs"] = mean_loss(model, held_out).tolist()
    begun_with = {"checkpoint": meta["fingerprint"], "calibration": args.calibration}
    steps = fit(model, train, held_out, args, **begun_with)
    if rank() > 0:  # of several processes, which all have the same codec, the first writes it
        return
    metrics["held_out_J_tuned"] = mean_loss(model, held_out).tolist()
    round_weights(model, patch_moments(model, calibration))
    metrics["held_out_J"] = mean_loss(model, held_out).tolist()
    freeze_h_s(model)

    for name, J in metrics.items():
        print(f"{name:18}", *(f"{v:.4f}" for v in J))
    save_checkpoint(
        args.out, model, build_tables(model), "quantize", vars(args), steps, meta, metrics
    )
    codecs = f"{quoted(args.checkpoint)} {quoted(args.out)}"
    print(f"wrote {args.out}; next: python evaluate.py {codecs}{held_out_option(args)}")


if __name__ == "__main__":
    run(main)
