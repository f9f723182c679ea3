"""Train a codec: one model for all rate levels.

    python train.py                              synthetic images, a minute and a half on 2 cores
    python train.py --preset small --data photos/ --amp --steps 30000 --out runs/small.pt
    python train.py --checkpoint runs/small.pt --lr 3e-4 --crop 256 --batch 2 ...       go on

Each image of a batch is coded at a rate level of its own.
"""

import lic.interrupt  # first: from here on Ctrl-C ends with one line

import torch

from lic.codec.checkpoint import FLOAT_STAGES, load_checkpoint, save_checkpoint
from lic.codec.header import MAX_LEVELS
from lic.codec.model import PRESETS, Codec, preset_config
from lic.codec.structure import parameters
from lic.codec.tables import build_tables
from lic.files import LicError
from lic.images import fixed_crops
from lic.options import make_parser, positive_number
from lic.program import quoted, run
from lic.shrink.plan import load_plan
from lic.train.loop import fit
from lic.train.loss import mean_loss
from lic.train.processes import rank
from lic.train.stage import (
    HELD_OUT_CROPS,
    add_training_arguments,
    check_out,
    data_option,
    images_for,
    parse_training_args,
)


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    parser.add_argument("--lambdas", type=positive_number, nargs="+",
                        help="one a rate level, rising (default: the preset's)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, default="tiny",
                       help="widths and lambdas (default: tiny)")
    start.add_argument("--plan", help="widths and lambdas of this plan of search.py, to train "
                       "them from scratch (default: none)")
    start.add_argument("--checkpoint", help="go on from this codec, dense or pruned, with its "
                       "widths, lambdas, weights and stage (default: none)")
    add_training_arguments(parser, steps=1000, lr=2e-3, out="runs/dense.pt")
    # fmt: on
    return parse_training_args(parser)


def main():
    args = parse_args()
    if args.lambdas and (args.plan or args.checkpoint):
        raise LicError("--lambdas: a plan or a checkpoint brings its own")
    if args.lambdas and sorted(set(args.lambdas)) != args.lambdas:
        raise LicError(f"--lambdas {args.lambdas}: give them in rising order")
    if args.lambdas and len(args.lambdas) > MAX_LEVELS:
        raise LicError(f"--lambdas: at most {MAX_LEVELS}, a file cannot name more levels")
    check_out(args)
    torch.manual_seed(args.seed)
    parent, stage = None, "train"
    if args.checkpoint is not None:
        model, parent = load_checkpoint(args.checkpoint, stages=FLOAT_STAGES)
        stage = parent["stage"]  # a pruned codec stays one
    elif args.plan is not None:
        plan = load_plan(args.plan)
        model = Codec({key: plan[key] for key in ("widths", "lambdas")})
    else:
        model = Codec(preset_config(args.preset, args.lambdas))
    train, validation = images_for(args, parent)
    held_out = fixed_crops(validation, HELD_OUT_CROPS, args.crop)  # (16, 3, crop, crop), or fewer
    print(
        f"{args.checkpoint or args.plan or args.preset}: {parameters(model.config):,} parameters, "
        f"{args.steps} steps of {args.batch} crops of {args.crop}x{args.crop}"
    )
    steps = fit(model, train, held_out, args, checkpoint=parent and parent["fingerprint"])
    if rank() > 0:  # of several processes, which all have the same codec, the first writes it
        return

    metrics = {"held_out_J": mean_loss(model, held_out).tolist()}
    print("held_out_J", *(f"{v:.4f}" for v in metrics["held_out_J"]))
    save_checkpoint(args.out, model, build_tables(model), stage, vars(args), steps, parent, metrics)
    following = "quantize.py" if stage == "prune" else "search.py"
    files = f"--checkpoint {quoted(args.out)}{data_option(args)}"
    print(f"wrote {args.out}; next: python {following} {files}")


if __name__ == "__main__":
    run(main)
