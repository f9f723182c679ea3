"""Prune a trained codec to the widths that search.py chose, and fine-tune it.

    python prune.py                                         after python search.py
    python prune.py --checkpoint runs/small.pt --data photos/ --amp --steps 5000
    python prune.py --control --data photos/ --amp --steps 5000

The last: the same steps with nothing removed, to compare with; it writes runs/control.pt.
"""

import lic.interrupt  # first: from here on Ctrl-C ends with one line

import sys

import torch

from lic.codec.checkpoint import FLOAT_STAGES, load_checkpoint, save_checkpoint
from lic.codec.structure import kmac_per_pixel, parameters
from lic.codec.tables import build_tables
from lic.files import LicError
from lic.images import fixed_crops
from lic.options import make_parser
from lic.program import quoted, run
from lic.shrink.plan import cut_fingerprint, load_plan
from lic.shrink.pruning import best_cut
from lic.train.loop import fit
from lic.train.loss import mean_loss
from lic.train.processes import rank
from lic.train.stage import (
    HELD_OUT_CROPS,
    add_training_arguments,
    check_out,
    data_option,
    held_out_option,
    images_for,
    parse_training_args,
)


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", default="runs/dense.pt",
                        help="codec to prune (default: runs/dense.pt)")
    parser.add_argument("--plan", default="runs/plan.json",
                        help="from search.py (default: runs/plan.json)")
    parser.add_argument("--control", action="store_true",
                        help="no plan, no cut: only the extra steps, to compare fairly; writes "
                        "runs/control.pt by default")
    add_training_arguments(parser, steps=500, lr=1e-3, out="runs/pruned.pt")
    # fmt: on
    if "--control" in sys.argv:  # before parsing, where --resume looks for OUT.state
        parser.set_defaults(out="runs/control.pt")
    args = parse_training_args(parser)
    if args.control and args.plan != parser.get_default("plan"):
        raise LicError("--control cuts nothing: leave out --plan")
    return args


def cut(model, plan, train):
    """The codec with the plan's channels alone, and J of the cut with and without the fold.

    On as many crops of training images as search.py saw, and as large.
    """
    # with a smaller --crop this stage has smaller images, too
    large = [image for image in train if min(image.shape[:2]) >= plan["crop"]]
    if not large:
        raise LicError(
            f"no training image holds the plan's crops of {plan['crop']} pixels; give the "
            "--data that search.py had, or search again with a smaller --crop"
        )
    x = fixed_crops(large, plan["crops"], plan["crop"])  # (crops, 3, crop, crop)
    keep = {group: torch.tensor(kept) for group, kept in plan["keep"].items()}
    return best_cut(model, keep, x, mean_loss)


def main():
    args = parse_args()
    check_out(args)
    model, meta = load_checkpoint(args.checkpoint, stages=FLOAT_STAGES)
    plan = None
    if not args.control:
        plan = load_plan(args.plan, meta["fingerprint"], model.config["widths"])
    train, validation = images_for(args, meta)
    held_out = fixed_crops(validation, HELD_OUT_CROPS, args.crop)  # (16, 3, crop, crop), or fewer
    metrics = {"held_out_J_before": mean_loss(model, held_out).tolist()}

    if plan:
        dense = model.config
        model, J_cut = cut(model, plan, train)
        print(
            "J of the cut, geometric mean over the levels:",
            *(f"{how} {J:.4f}" for how, J in J_cut.items()),
        )
        before, after = kmac_per_pixel(dense)["total"], kmac_per_pixel(model.config)["total"]
        print(
            f"parameters {parameters(dense):,} -> {parameters(model.config):,}, "
            f"kMAC/pixel {before:.2f} -> {after:.2f}"
        )
        metrics["held_out_J_cut"] = mean_loss(model, held_out).tolist()
    begun_with = {"checkpoint": meta["fingerprint"], "plan": plan and cut_fingerprint(plan)}
    steps = fit(model, train, held_out, args, **begun_with)
    if rank() > 0:  # of several processes, which all have the same codec, the first writes it
        return
    metrics["held_out_J"] = mean_loss(model, held_out).tolist()

    for name, J in metrics.items():
        print(f"{name:20}", *(f"{v:.4f}" for v in J))
    if plan:
        recorded = ("method", "importance", "target", "of", "alpha", "ratio", "widths", "sparsity")
        metrics["plan"] = {key: plan[key] for key in recorded} | {"J_cut": J_cut}
    stage = "control" if args.control else "prune"
    save_checkpoint(args.out, model, build_tables(model), stage, vars(args), steps, meta, metrics)
    out = quoted(args.out)
    if args.control:
        following = f"evaluate.py {out} runs/pruned.pt{held_out_option(args)}"
    else:
        following = f"quantize.py --checkpoint {out}{data_option(args)}"
    print(f"wrote {args.out}; next: python {following}")


if __name__ == "__main__":
    run(main)
