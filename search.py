"""Search how many channels each of the codec's twelve groups may keep.

    python search.py                                        after python train.py
    python search.py --checkpoint runs/small.pt --data photos/ --amp --target 0.6 --of macs

Prints the sensitivity of J to each group, moves the threshold alpha until the target share of
parameters (or multiply-accumulates) is gone, and writes plan.json for prune.py.
"""

import json
import time

import numpy as np

from lic.codec.checkpoint import FLOAT_STAGES, load
from lic.codec.structure import total_stride
from lic.files import LicError, check_writable, run, warn_of_slow_bf16, write_bytes
from lic.images import fixed_crops, load_images
from lic.options import (
    make_parser,
    multiple_of,
    positive_number,
    positive_whole_number,
    share,
    whole_number,
)
from lic.shrink import search
from lic.shrink.pruning import importance, most_important, narrow
from lic.shrink.statistics import observe
from lic.train.loss import mean_loss


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="runs/base.pt", help="codec to prune (default: runs/base.pt)")
    add("--data", help="folder of images, searched recursively (default: synthetic images)")
    add("--target", type=share, default=0.5, help="share to remove, 0 to 1 (default: 0.5)")
    add("--of", choices=("params", "macs", "both"), default="params",
        help="what the target counts; both: the smaller share of the two (default: params)")
    add("--delta", type=positive_number, default=0.02,
        help="how far from the target a plan may be (default: 0.02)")
    add("--method", choices=("threshold", "evolve", "uniform"), default="threshold",
        help="threshold on sensitivities; the same, then evolved; or one ratio for all groups "
        "(default: threshold)")
    add("--importance", choices=("residual", "l1"), default="residual",
        help="which channels of a group go first (default: residual)")
    add("--sensitivities",
        help="take them from this plan of the same checkpoint (default: measure them)")
    add("--tries", type=positive_whole_number, default=200,
        help="plans that evolve tries (default: 200)")
    add("--seed", type=whole_number, default=0, help="of evolve (default: 0)")
    add("--crops", type=positive_whole_number, default=16,
        help="calibration images, at most (default: 16)")
    add("--crop", type=multiple_of(total_stride()), default=256,
        help=f"their side in pixels, a multiple of {total_stride()} (default: 256)")
    add("--amp", action="store_true", help="bf16 autocast: faster with AVX-512 bf16")
    add("--out", default="runs/plan.json", help="plan to write (default: runs/plan.json)")
    # fmt: on
    return parser.parse_args()


def earlier_sensitivities(path, fingerprint, measure):
    """Those of a plan for the same checkpoint and with the same measure of importance."""
    plan = search.load_plan(path, fingerprint)
    if not plan["sensitivity"] or plan["importance"] != measure:
        raise LicError(
            f"{path} holds no sensitivities with --importance {measure}; "
            "leave out --sensitivities to measure them"
        )
    return {
        group: {int(width): zeta for width, zeta in row.items()}
        for group, row in plan["sensitivity"].items()
    }


def main():
    args = parse_args()
    check_writable(args.out)
    if args.amp:
        warn_of_slow_bf16()
    start = time.monotonic()
    model, meta = load(args.checkpoint, stages=FLOAT_STAGES)
    config = model.config
    train, _ = load_images(args.data, args.crop)
    x = fixed_crops(train, args.crops, args.crop)  # (crops, 3, crop, crop)

    statistics = observe(model, x)
    scores = importance(model, statistics, args.importance)
    J = mean_loss(model, x, args.amp)  # (levels,)

    def keep(widths):
        return {group: most_important(scores[group], width) for group, width in widths.items()}

    def loss_of(widths, statistics):
        return mean_loss(narrow(model, keep(widths), statistics), x, args.amp)

    def rise(widths):
        return (loss_of(widths, statistics) / J - 1).mean().item()

    table, alpha, ratio = None, None, None
    if args.method == "uniform":
        ratio, widths, S = search.uniform_widths(config, args.target, args.of)
        print(f"ratio {ratio:.3f} for every group")
    else:
        if args.sensitivities:
            table = earlier_sensitivities(args.sensitivities, meta["fingerprint"], args.importance)
        else:
            print("rise of J when one group alone keeps so many channels, mean over the levels")
            table = search.sensitivities(config, rise)
        alpha, widths, S = search.adaptive_search(table, config, args.target, args.of)
        print(f"alpha {alpha:.5f}")
    method, out = args.method, args.out
    missed = abs(S - args.target) > args.delta
    if missed:
        out += ".nearest"  # what was measured is kept, but it is not the plan asked for
        method = "threshold" if method == "evolve" else method
    elif method == "evolve":
        rng = np.random.default_rng(args.seed)
        widths = search.evolve(rise, widths, config, args.of, args.tries, rng)

    J_zeros, J_folded = loss_of(widths, None), loss_of(widths, statistics)
    sparsity = search.sparsity(config, widths)
    plan = {
        "format": search.FORMAT,
        "baseline": meta["fingerprint"],
        "method": method,
        "importance": args.importance,
        "target": args.target,
        "of": args.of,
        "alpha": alpha,
        "ratio": ratio,
        "lambdas": model.lambdas,
        "widths": widths,
        "keep": {group: indices.tolist() for group, indices in keep(widths).items()},
        "sparsity": sparsity,
        "sensitivity": table,
        "J": J.tolist(),
        "J_zeros": J_zeros.tolist(),
        "J_folded": J_folded.tolist(),
    }
    write_bytes(out, json.dumps(plan, indent=1).encode())

    print("kept:", "  ".join(f"{g} {w}/{config['widths'][g]}" for g, w in widths.items()))
    print(
        f"removed: {sparsity['params']:.1%} of the parameters, "
        f"{sparsity['macs']:.1%} of the multiply-accumulates"
    )
    for what, losses in (("dense", J), ("cut and folded", J_folded), ("cut, not folded", J_zeros)):
        print(f"J a level, {what:20}", *(f"{v:.4f}" for v in losses))
    print(f"wrote {out} after {time.monotonic() - start:.0f} s")
    if missed:
        advice = "change --target or --delta"
        if table:
            advice += f"; --sensitivities {out} saves measuring again"
        raise LicError(
            f"no plan removes {args.target:.1%} of {args.of} within {args.delta:.1%}; "
            f"the nearest removes {S:.1%}: {advice}"
        )


if __name__ == "__main__":
    run(main)
