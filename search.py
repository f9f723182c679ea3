"""Search how many channels each group of a codec may keep.

    python search.py                                        after python train.py
    python search.py --checkpoint runs/small.pt --data photos/ --amp --target 0.6 --of macs

A group is the channels that one layer makes and others read; J is the loss of training, bits a
pixel plus lambda times the squared error. Prints the sensitivity of J to each group, narrows first
what costs least for what it removes, until the target share of parameters and multiply-accumulates
is gone, and writes plan.json for prune.py. --method threshold searches as in the paper: one
threshold on the sensitivities of all.
"""

import lic.interrupt  # first: from here on Ctrl-C ends with one line

import copy
import functools
import hashlib
import time

import numpy as np

from lic.codec.checkpoint import FLOAT_STAGES, load_checkpoint
from lic.codec.structure import groups, total_stride
from lic.files import LicError, claim_output, free_name
from lic.images import fixed_crops
from lic.options import (
    fraction,
    make_parser,
    multiple_of,
    positive_number,
    positive_whole_number,
    whole_number,
)
from lic.program import choose_gpu, quoted, run, warn_of_slow_bf16
from lic.shrink import search
from lic.shrink.plan import load_plan, save_plan
from lic.shrink.pruning import importance, most_important, narrow
from lic.shrink.statistics import observe
from lic.shrink.timing import HEIGHT, WIDTH, milliseconds, time_layers
from lic.train.loss import mean_loss
from lic.train.stage import (
    add_image_arguments,
    check_image_arguments,
    data_option,
    images_for,
)

MEASURED_WITH = ("importance", "crops", "crop", "amp")  # options that sensitivities depend on


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="runs/dense.pt", help="codec to prune (default: runs/dense.pt)")
    add_image_arguments(parser)
    add("--target", type=fraction, default=0.5, help="share to remove, 0 to 1 (default: 0.5)")
    add("--of", choices=("both", "params", "macs", "time"), default="both",
        help="what the target counts: parameters; multiply-accumulates; both: the smaller of these "
        "shares; time: of coding on this machine, in 8 bits (default: both)")
    add("--decodings", type=positive_number, default=1,
        help="how often a picture is decoded once it is encoded, where time counts (default: 1)")
    add("--delta", type=positive_number, default=0.02,
        help="how far from the target a plan may be (default: 0.02)")
    add("--method", choices=("greedy", "threshold", "evolve", "uniform"), default="greedy",
        help="greedy: what costs least for what it removes goes first; threshold: one threshold "
        "for all groups, as in the paper; evolve: the greedy plan, evolved; uniform: one ratio for "
        "all groups (default: greedy)")
    add("--untouched", nargs="+", choices=tuple(groups()), default=[], metavar="GROUP",
        help="groups that are not narrowed, say g_s.2 (default: none)")
    add("--importance", choices=("residual", "l1"), default="residual",
        help="which channels of a group go first (default: residual)")
    add("--sensitivities", metavar="PLAN",
        help="take them from this plan of the same checkpoint (default: measure them; uniform "
        "needs none)")
    add("--tries", type=positive_whole_number, default=200,
        help="plans that evolve tries (default: 200)")
    add("--seed", type=whole_number, default=0, help="of evolve (default: 0)")
    add("--crops", type=positive_whole_number, default=16,
        help="calibration images, at most (default: 16)")
    add("--crop", type=multiple_of(total_stride()), default=256,
        help=f"their side in pixels, a multiple of {total_stride()} (default: 256)")
    add("--amp", action="store_true", help="bf16 autocast: faster on most CPUs with AVX-512 bf16")
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="where J of each plan is computed; on a GPU untried (default: cpu)")
    add("--out", default="runs/plan.json", help="plan to write (default: runs/plan.json)")
    add("--overwrite", action="store_true", help="replace OUT")
    # fmt: on
    return parser.parse_args()


def images_digest(x):
    """A short string that tells the crops x, of which a plan was measured, from others."""
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def earlier_sensitivities(args, fingerprint, images):
    """Those of a plan for the same checkpoint, measured as they would be now.

    images: the digest of the crops. Raises LicError for a plan of another codec, other options or
    other images.
    """
    plan = load_plan(args.sensitivities, fingerprint)
    if not plan["sensitivity"]:
        raise LicError(f"{args.sensitivities} holds no sensitivities; leave out --sensitivities")
    for option in MEASURED_WITH:
        then, now = plan[option], vars(args)[option]
        if then != now:
            raise LicError(
                f"{args.sensitivities} was measured with --{option} {then}, not {now}; give the "
                "same, or leave out --sensitivities"
            )
    if plan["images"] != images:
        raise LicError(
            f"{args.sensitivities} was measured on other images; give the same with --data, or "
            "leave out --sensitivities"
        )
    return plan["sensitivity"]


class Cutter:
    """What a plan costs: J of one codec, cut to any widths, on the crops x (B, 3, H, W).

    The codec is cut on the CPU; J is computed on the device.
    """

    def __init__(self, model, x, measure, amp, device):
        self.model, self.x, self.amp = model, x.to(device), amp
        self.statistics = observe(model, x)
        self.scores = importance(model, self.statistics, measure)
        self.J_dense = mean_loss(copy.deepcopy(model).to(device), self.x, amp)  # (levels,)

    def kept(self, widths):
        """{group: indices of its most important channels}."""
        return {group: most_important(self.scores[group], n) for group, n in widths.items()}

    def loss(self, widths, fold=True):
        """J of each level, (levels,), when the groups in `widths` are narrowed."""
        narrowed = narrow(self.model, self.kept(widths), self.statistics if fold else None)
        return mean_loss(narrowed.to(self.x.device), self.x, self.amp)

    def rise(self, widths):
        """Relative rise of J over the whole codec's, mean over the levels: a number."""
        return (self.loss(widths) / self.J_dense - 1).mean().item()


def outcome(widths, cutter, sparsity):
    """What a plan holds of its widths, {group: channels} of all groups, and what comes of them."""
    return {
        "widths": widths,
        "keep": {group: kept.tolist() for group, kept in cutter.kept(widths).items()},
        "sparsity": sparsity,
        "J": cutter.J_dense.tolist(),
        "J_zeros": cutter.loss(widths, fold=False).tolist(),
        "J_folded": cutter.loss(widths).tolist(),
    }


def show(plan, full):
    """Print what a plan keeps of the widths `full`, what it removes and what that does to J."""
    print("kept:", "  ".join(f"{g} {w}/{full[g]}" for g, w in plan["widths"].items()))
    sparsity = plan["sparsity"]
    print(
        f"removed: {sparsity['params']:.1%} of the parameters, "
        f"{sparsity['macs']:.1%} of the multiply-accumulates"
        + (f", {sparsity['time']:.1%} of the time" if "time" in sparsity else "")
    )
    codecs = {"dense": "J", "cut and folded": "J_folded", "cut, not folded": "J_zeros"}
    for what, key in codecs.items():
        print(f"J a level, {what:20}", *(f"{v:.4f}" for v in plan[key]))


def main():
    args = parse_args()
    check_image_arguments(args)
    inputs = (args.checkpoint, args.sensitivities, args.data, args.validation)
    claim_output(args.out, ".json", args.overwrite, filter(None, inputs))
    if args.device == "cuda":
        choose_gpu()
    elif args.amp:
        warn_of_slow_bf16()
    began = time.monotonic()
    model, meta = load_checkpoint(args.checkpoint, stages=FLOAT_STAGES)
    full = model.config["widths"]
    free = {group: width for group, width in full.items() if group not in args.untouched}
    if not free:
        raise LicError("--untouched names all groups: nothing is left to narrow")
    train, _ = images_for(args, meta)
    x = fixed_crops(train, args.crops, args.crop)  # (crops, 3, crop, crop)
    images = images_digest(x)
    cutter = Cutter(model, x, args.importance, args.amp, args.device)
    timing, cost = None, None
    if args.of == "time":
        timing = time_layers(model.config, args.decodings)
        cost = functools.partial(milliseconds, timing)
        print(
            f"{WIDTH}x{HEIGHT} pixels, encoded once and decoded {args.decodings:g} times, take the "
            f"codec {cost(full):.0f} ms, entropy coding left out"
        )

    def removed(widths):  # {"params": S, "macs": S, "both": S}, perhaps "time"
        return search.sparsity(model.config, widths, cost)

    def share(widths):  # S of what the target counts
        return removed(widths)[args.of]

    # 1. the sensitivity of J to each group, to the untouched, too: another search may go on from it
    table = None
    if args.sensitivities:
        table = earlier_sensitivities(args, meta["fingerprint"], images)
    elif args.method != "uniform":
        print("rise of J when one group alone keeps so many channels, mean over the levels")
        table = search.sensitivities(model.config, cutter.rise)

    # 2. the widths, and the share S that they remove
    alpha, ratio = None, None
    if args.method == "uniform":  # the control
        ratio, widths, S = search.uniform_widths(free, share, args.target)
        print(f"ratio {ratio:.3f} for every group")
    else:
        free_table = {group: table[group] for group in free}
        if args.method == "threshold":
            alpha, widths, S = search.adaptive_search(free_table, share, args.target)
            print(f"alpha {alpha:.5f}")
        else:  # greedy, where evolve begins, too
            widths, S = search.greedy_search(free_table, share, args.target)

    # 3. the plan
    widths = full | widths
    plan = {
        "baseline": meta["fingerprint"],
        "method": "greedy" if args.method == "evolve" else args.method,
        **{option: vars(args)[option] for option in ("target", "of", "untouched", *MEASURED_WITH)},
        "images": images,
        "lambdas": model.lambdas,
        "timing": timing,
        "sensitivity": table,
        "alpha": alpha,
        "ratio": ratio,
        **outcome(widths, cutter, removed(widths)),
    }
    missed = abs(S - args.target) > args.delta
    out = free_name(args.out + ".nearest") if missed else args.out  # not what was asked for
    save_plan(out, plan)
    if args.method == "evolve" and not missed:  # whole plans
        print(f"wrote {out}, the greedy plan; evolving it")
        rng = np.random.default_rng(args.seed)
        start = {group: widths[group] for group in free}
        widths = full | search.evolve(cutter.rise, share, start, free, args.tries, rng)
        plan |= {"method": "evolve", **outcome(widths, cutter, removed(widths))}
        save_plan(out, plan)

    show(plan, full)
    print(f"wrote {out} after {time.monotonic() - began:.0f} s")
    if missed:
        advice = "change --target or --delta"
        if table:
            advice += f"; --sensitivities {quoted(out)} saves measuring again"
        raise LicError(
            f"no plan removes {args.target:.1%} of {args.of} within {args.delta:.1%}; "
            f"the nearest removes {S:.1%}: {advice}"
        )
    files = f"--checkpoint {quoted(args.checkpoint)} --plan {quoted(out)}"
    print(f"next: python prune.py {files}{data_option(args)}")


if __name__ == "__main__":
    run(main)
