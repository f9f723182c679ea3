"""Search how many channels each of the codec's twelve groups may keep.

    python search.py                                        after python train.py
    python search.py --checkpoint runs/small.pt --data photos/ --target 0.5

Prints the sensitivity of J to each group, moves the threshold alpha until the target share of
parameters (or multiply-accumulates) is gone, and writes plan.json for prune.py.
"""

import argparse
import json
import time

from lic import nas
from lic.checkpoint import load
from lic.files import LicError, check_writable, run, write_bytes
from lic.images import fixed_crops, load_images
from lic.pruning import importance, most_important, narrow
from lic.training import mean_loss, positive, rate


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/base.pt", help="dense codec (default: runs/base.pt)")
    parser.add_argument("--data", help="folder of images, searched recursively (default: synthetic images)")
    parser.add_argument("--target", type=float, default=0.5, help="share to remove, 0 to 1 (default: 0.5)")
    parser.add_argument("--of", choices=("params", "macs"), default="params", help="what the target counts (default: params)")
    parser.add_argument("--delta", type=rate, default=0.02, help="how near to the target is enough (default: 0.02)")
    parser.add_argument("--method", choices=("threshold", "uniform"), default="threshold",
                        help="threshold on sensitivities, or one ratio for all groups (default: threshold)")  # fmt: skip
    parser.add_argument("--crops", type=positive, default=16, help="calibration images (default: 16)")
    parser.add_argument("--crop", type=positive, default=256, help="their side in pixels, a multiple of 64 (default: 256)")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast: faster with AVX-512 bf16")
    parser.add_argument("--out", default="runs/plan.json", help="plan to write (default: runs/plan.json)")
    return parser.parse_args()


def main():
    args = parse_args()
    if not 0 < args.target < 1:
        raise LicError(f"--target {args.target}: give the share to remove, between 0 and 1")
    check_writable(args.out)
    start = time.monotonic()
    model, meta = load(args.checkpoint, stages=("train", "control", "prune"))
    train, _ = load_images(args.data, args.crop)
    x = fixed_crops(train, args.crops, args.crop)  # (crops, 3, crop, crop)

    scores = importance(model, x)
    table, alpha, ratio = None, None, None
    if args.method == "threshold":
        print("rise of J when one group alone keeps so many channels, mean over the levels")
        table = nas.sensitivities(model, scores, x, args.amp)
        alpha, widths, S = nas.adaptive_search(table, model.config, args.target, args.of, args.delta)
        print(f"alpha {alpha:.5f}")
    else:
        ratio, widths, S = nas.uniform_widths(model.config, args.target, args.of, args.delta)
        print(f"ratio {ratio:.3f} for every group")
    if abs(S - args.target) > args.delta:
        raise LicError(f"no plan removes {args.target:.0%} of the {args.of} within {args.delta:.0%}; "
                       f"the nearest removes {S:.1%}: change --target or --delta")  # fmt: skip

    keep = {group: most_important(scores[group], width) for group, width in widths.items()}
    J, J_narrow = mean_loss(model, x), mean_loss(narrow(model, keep), x)
    sparsity = nas.sparsity(model.config, widths)
    plan = {"format": "lic plan", "baseline": meta["fingerprint"], "method": args.method,
            "target": args.target, "of": args.of, "alpha": alpha, "ratio": ratio, "widths": widths,
            "keep": {group: indices.tolist() for group, indices in keep.items()},
            "sparsity": sparsity, "sensitivity": table,
            "J": J.tolist(), "J_narrow": J_narrow.tolist()}  # fmt: skip
    write_bytes(args.out, json.dumps(plan, indent=1).encode())

    print("kept:", "  ".join(f"{g} {w}/{model.config['widths'][g]}" for g, w in widths.items()))
    print(f"removed: {sparsity['params']:.1%} of the parameters, {sparsity['macs']:.1%} of the multiply-accumulates")
    print("J a level, dense:                   ", *(f"{v:.4f}" for v in J))
    print("J a level, cut, before fine-tuning: ", *(f"{v:.4f}" for v in J_narrow))
    print(f"wrote {args.out} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run(main)
