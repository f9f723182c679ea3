"""Search how many channels each of the codec's twelve groups may keep.

    python search.py                                        after python train.py
    python search.py --checkpoint runs/small.pt --data photos/ --amp --target 0.6 --of macs

Prints the sensitivity of J to each group, moves the threshold alpha until the target share of
parameters (or multiply-accumulates) is gone, and writes plan.json for prune.py.
"""

import argparse
import json
import time

import numpy as np

from lic import nas
from lic.checkpoint import load, load_plan
from lic.files import LicError, check_writable, run, warn_of_slow_bf16, write_bytes
from lic.images import fixed_crops, load_images
from lic.pruning import importance, most_important, narrow, observe
from lic.training import count, mean_loss, positive_float, positive_int


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/base.pt", help="codec to prune (default: runs/base.pt)")
    parser.add_argument("--data", help="folder of images, searched recursively (default: synthetic images)")
    parser.add_argument("--target", type=float, default=0.5, help="share to remove, 0 to 1 (default: 0.5)")
    parser.add_argument("--of", choices=("params", "macs", "both"), default="params",
                        help="what the target counts; both: the smaller share of the two (default: params)")
    parser.add_argument("--delta", type=positive_float, default=0.02, help="how far from the target a plan may be (default: 0.02)")
    parser.add_argument("--method", choices=("threshold", "evolve", "uniform"), default="threshold",
                        help="threshold on sensitivities; the same, then evolved; or one ratio for all groups (default: threshold)")  # fmt: skip
    parser.add_argument("--importance", choices=("residual", "variance", "taylor", "l1"), default="residual",
                        help="which channels of a group go first (default: residual)")  # fmt: skip
    parser.add_argument("--sensitivities", help="take them from this plan of the same checkpoint (default: measure them)")
    parser.add_argument("--tries", type=positive_int, default=200, help="plans that evolve tries (default: 200)")
    parser.add_argument("--seed", type=count, default=0, help="of evolve (default: 0)")
    parser.add_argument("--crops", type=positive_int, default=16, help="calibration images, at most (default: 16)")
    parser.add_argument("--crop", type=positive_int, default=256, help="their side in pixels, a multiple of 64 (default: 256)")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast: faster with AVX-512 bf16")
    parser.add_argument("--out", default="runs/plan.json", help="plan to write (default: runs/plan.json)")
    return parser.parse_args()


def main():
    args = parse_args()
    if not 0 < args.target < 1:
        raise LicError(f"--target {args.target}: give the share to remove, between 0 and 1")
    check_writable(args.out)
    if args.amp:
        warn_of_slow_bf16()
    start = time.monotonic()
    model, meta = load(args.checkpoint, stages=("train", "control", "prune"))
    train, _ = load_images(args.data, args.crop)
    x = fixed_crops(train, args.crops, args.crop)  # (crops, 3, crop, crop)

    statistics = observe(model, x)
    scores = importance(model, x, statistics, args.importance)
    J = mean_loss(model, x, args.amp)

    def keep(widths):
        return {group: most_important(scores[group], width) for group, width in widths.items()}

    def rise(widths):
        return (mean_loss(narrow(model, keep(widths), statistics), x, args.amp) / J - 1).mean().item()

    table, alpha, ratio = None, None, None
    if args.method == "uniform":
        ratio, widths, S = nas.uniform_widths(model.config, args.target, args.of)
        print(f"ratio {ratio:.3f} for every group")
    else:
        if args.sensitivities:
            earlier = load_plan(args.sensitivities, meta["fingerprint"])
            if not earlier["sensitivity"] or earlier["importance"] != args.importance:
                raise LicError(f"{args.sensitivities} holds no sensitivities with --importance {args.importance}; "
                               f"leave out --sensitivities to measure them")  # fmt: skip
            table = {group: {int(width): zeta for width, zeta in row.items()} for group, row in earlier["sensitivity"].items()}
        else:
            print("rise of J when one group alone keeps so many channels, mean over the levels")
            table = nas.sensitivities(model.config, rise)
        alpha, widths, S = nas.adaptive_search(table, model.config, args.target, args.of)
        print(f"alpha {alpha:.5f}")
    missed = abs(S - args.target) > args.delta
    out = args.out + ".nearest" if missed else args.out
    method = "threshold" if missed and args.method == "evolve" else args.method
    if method == "evolve":
        widths = nas.evolve(rise, widths, model.config, args.of, args.tries, np.random.default_rng(args.seed))

    J_zeros, J_folded = (mean_loss(narrow(model, keep(widths), s), x, args.amp) for s in (None, statistics))
    sparsity = nas.sparsity(model.config, widths)
    plan = {"format": "lic plan", "baseline": meta["fingerprint"], "method": method,
            "importance": args.importance, "target": args.target, "of": args.of, "alpha": alpha, "ratio": ratio,
            "lambdas": model.lambdas, "widths": widths,
            "keep": {group: indices.tolist() for group, indices in keep(widths).items()},
            "sparsity": sparsity, "sensitivity": table,
            "J": J.tolist(), "J_zeros": J_zeros.tolist(), "J_folded": J_folded.tolist()}  # fmt: skip
    write_bytes(out, json.dumps(plan, indent=1).encode())

    print("kept:", "  ".join(f"{g} {w}/{model.config['widths'][g]}" for g, w in widths.items()))
    print(f"removed: {sparsity['params']:.1%} of the parameters, {sparsity['macs']:.1%} of the multiply-accumulates")
    for what, losses in {"dense": J, "cut and folded": J_folded, "cut, not folded": J_zeros}.items():
        print(f"J a level, {what:20}", *(f"{v:.4f}" for v in losses))
    print(f"wrote {out} after {time.monotonic() - start:.0f} s")
    if missed:
        raise LicError(f"no plan removes {args.target:.1%} of {args.of} within {args.delta:.1%}; the nearest removes {S:.1%}: change "
                       f"--target or --delta" + f"; --sensitivities {out} saves measuring again" * bool(table))  # fmt: skip


if __name__ == "__main__":
    run(main)
