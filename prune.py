"""Prune a trained codec to the widths that search.py chose, and fine-tune it.

    python prune.py                                         after python search.py
    python prune.py --checkpoint runs/small.pt --data photos/ --amp --steps 5000
    python prune.py --control --data photos/ --amp --steps 5000     the same steps, nothing removed: runs/control.pt
"""

import argparse

import torch

from lic.bitstream import build_tables
from lic.checkpoint import load, load_plan, save
from lic.files import run
from lic.images import fixed_crops, load_images
from lic.metrics import kmac_per_pixel, parameters
from lic.pruning import narrow, observe
from lic.training import add_training_arguments, check_out, fit, mean_loss


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/base.pt", help="codec to prune (default: runs/base.pt)")
    parser.add_argument("--plan", default="runs/plan.json", help="from search.py (default: runs/plan.json)")
    parser.add_argument("--control", action="store_true",
                        help="no plan, no cut: only the extra steps, to compare fairly; writes runs/control.pt by default")  # fmt: skip
    add_training_arguments(parser, steps=500, lr=1e-3, out="runs/pruned.pt")
    if parser.parse_known_args()[0].control:
        parser.set_defaults(out="runs/control.pt")
    return parser.parse_args()


def main():
    args = parse_args()
    check_out(args)
    model, meta = load(args.checkpoint, stages=("train", "control", "prune"))
    plan = None if args.control else load_plan(args.plan, meta["fingerprint"])
    train, validation = load_images(args.data, args.crop)
    held_out = fixed_crops(validation, 16, args.crop)
    metrics = {"held_out_J_before": mean_loss(model, held_out).tolist()}

    if plan:
        dense = model.config
        keep = {group: torch.tensor(kept) for group, kept in plan["keep"].items()}
        calibration = fixed_crops(train, 16, args.crop)
        cuts = {"not folded": narrow(model, keep), "folded": narrow(model, keep, observe(model, calibration))}
        losses = {how: mean_loss(cut, calibration).log().mean().exp().item() for how, cut in cuts.items()}
        print("J of the cut, geometric mean over the levels:", *(f"{how} {J:.4f}" for how, J in losses.items()))
        model = cuts[min(losses, key=losses.get)]
        metrics["held_out_J_cut"] = mean_loss(model, held_out).tolist()
        metrics["plan"] = {k: plan[k] for k in ("method", "importance", "target", "of", "alpha", "ratio", "widths", "sparsity")} | {"J_cut": losses}
        print(f"parameters {parameters(dense):,} -> {parameters(model.config):,}, kMAC/pixel "
              f"{kmac_per_pixel(dense)['total']:.2f} -> {kmac_per_pixel(model.config)['total']:.2f}")  # fmt: skip
    fit(model, train, held_out, args, parent=[meta["fingerprint"], plan and plan["keep"]])
    metrics["held_out_J_tuned"] = mean_loss(model, held_out).tolist()

    for name, J in metrics.items():
        if name != "plan":
            print(f"{name:20}", *(f"{v:.4f}" for v in J))
    stage = "control" if args.control else "prune"
    save(args.out, model, build_tables(model), stage, vars(args), args.steps, parent=meta, metrics=metrics)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
