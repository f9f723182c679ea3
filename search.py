"""Search how many channels each of the codec's twelve groups may keep.

    python search.py                                        after python train.py
    python search.py --checkpoint runs/small.pt --data photos/ --amp --target 0.6 --of macs

Prints the sensitivity of J to each group, narrows first what costs least for what it removes, until
the target share of parameters and multiply-accumulates is gone, and writes plan.json for prune.py.
--method threshold searches as in the paper: one threshold on the sensitivities of all.
"""

import lic.interrupt  # first: from here on Ctrl-C ends with one line

import copy
import functools
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
from lic.shrink.timing import milliseconds, time_layers
from lic.train.loss import mean_loss
from lic.train.stage import (
    add_image_arguments,
    check_image_arguments,
    data_option,
    images_for,
)


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
    add("--sensitivities",
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


def measured_or_earlier(args, config, fingerprint, rise):
    """zeta of each group, {group: {width: zeta}}: those of --sensitivities, or measured now.

    Of the untouched groups, too: another search may go on from them.
    """
    if args.sensitivities:
        return earlier_sensitivities(args, fingerprint)
    print("rise of J when one group alone keeps so many channels, mean over the levels")
    return search.sensitivities(config, rise)


def earlier_sensitivities(args, fingerprint):
    """Those of a plan for the same checkpoint, measured as they would be now."""
    plan = load_plan(args.sensitivities, fingerprint)
    if not plan["sensitivity"]:
        raise LicError(f"{args.sensitivities} holds no sensitivities; leave out --sensitivities")
    for option in ("importance", "crops", "crop"):
        then, now = plan[option], vars(args)[option]
        if then != now:
            raise LicError(
                f"{args.sensitivities} was measured with --{option} {then}, not {now}; give the "
                "same, or leave out --sensitivities"
            )
    table = {}
    for group, row in plan["sensitivity"].items():
        table[group] = {int(width): zeta for width, zeta in row.items()}
    return table


class Cutter:
    """What a plan costs: J of one codec, cut to any widths, on the crops x (B, 3, H, W).

    The codec is cut on the CPU; J is computed on the device.
    """

    def __init__(self, model, x, measure, amp, device):
        self.model, self.x, self.amp = model, x.to(device), amp
        self.statistics = observe(model, x)
        self.scores = importance(model, self.statistics, measure)
        self.J = mean_loss(copy.deepcopy(model).to(device), self.x, amp)  # (levels,)

    def kept(self, widths):
        """{group: indices of its most important channels}."""
        return {group: most_important(self.scores[group], n) for group, n in widths.items()}

    def loss(self, widths, fold=True):
        """J of each level, (levels,), when the groups in `widths` are narrowed."""
        narrowed = narrow(self.model, self.kept(widths), self.statistics if fold else None)
        return mean_loss(narrowed.to(self.x.device), self.x, self.amp)

    def rise(self, widths):
        """Relative rise of J over the whole codec's, mean over the levels: a number."""
        return (self.loss(widths) / self.J - 1).mean().item()


class Saving:
    """What a plan saves: the shares of a codec that it removes.

    of: what the target counts, as --of; timing: from time_layers, where that is time.
    """

    def __init__(self, config, of, timing):
        self.config, self.of = config, of
        self.cost = functools.partial(milliseconds, timing) if timing else None

    def removed(self, widths):
        """{"params": S, "macs": S, "both": S}, and "time", if that counts."""
        return search.sparsity(self.config, widths, self.cost)

    def share(self, widths):
        """S of what the target counts."""
        return self.removed(widths)[self.of]

    def shares(self, widths):
        """Those that evolution must not lessen: (1,), or of both (2,)."""
        counted = ("params", "macs") if self.of == "both" else (self.of,)
        S = self.removed(widths)
        return np.array([S[what] for what in counted])


def first_plan(args, table, free, share):
    """Widths by --method (those that evolve begins with), S, and the alpha or ratio that was found.

    free: {group: width} of the groups that may be narrowed.
    """
    if args.method == "uniform":  # the control
        ratio, widths, S = search.uniform_widths(free, share, args.target)
        print(f"ratio {ratio:.3f} for every group")
        return widths, S, {"ratio": ratio}
    table = {group: table[group] for group in free}
    if args.method == "threshold":  # alpha, moved until the target is met
        alpha, widths, S = search.adaptive_search(table, share, args.target)
        print(f"alpha {alpha:.5f}")
        return widths, S, {"alpha": alpha}
    widths, S = search.greedy_search(table, share, args.target)
    return widths, S, {}


def outcome(widths, cutter, saving):
    """What a plan holds of its widths: {group: channels} of all groups, and what comes of them."""
    return {
        "widths": widths,
        "keep": {group: kept.tolist() for group, kept in cutter.kept(widths).items()},
        "sparsity": saving.removed(widths),
        "J": cutter.J.tolist(),
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
    start = time.monotonic()
    model, meta = load_checkpoint(args.checkpoint, stages=FLOAT_STAGES)
    full = model.config["widths"]
    free = {group: width for group, width in full.items() if group not in args.untouched}
    if not free:
        raise LicError("--untouched names all groups: nothing is left to narrow")
    train, _ = images_for(args, meta)
    x = fixed_crops(train, args.crops, args.crop)  # (crops, 3, crop, crop)
    cutter = Cutter(model, x, args.importance, args.amp, args.device)
    timing = None
    if args.of == "time":
        timing = time_layers(model.config, args.decodings)
        print(
            f"768x512 pixels, encoded once and decoded {args.decodings:g} times, take the codec "
            f"{milliseconds(timing, full):.0f} ms, entropy coding left out"
        )
    saving = Saving(model.config, args.of, timing)

    table = None
    if args.method != "uniform":
        table = measured_or_earlier(args, model.config, meta["fingerprint"], cutter.rise)
    widths, S, searched = first_plan(args, table, free, saving.share)
    asked = ("importance", "target", "of", "untouched", "crops", "crop")
    plan = {
        "baseline": meta["fingerprint"],
        "method": "greedy" if args.method == "evolve" else args.method,
        **{option: vars(args)[option] for option in asked},
        "lambdas": model.lambdas,
        "timing": timing,
        "sensitivity": table,
        "alpha": None,
        "ratio": None,
        **searched,
        **outcome(full | widths, cutter, saving),
    }
    missed = abs(S - args.target) > args.delta
    out = free_name(args.out + ".nearest") if missed else args.out  # not what was asked for
    save_plan(out, plan)
    if args.method == "evolve" and not missed:  # whole plans
        print(f"wrote {out}, the greedy plan; evolving it")
        rng = np.random.default_rng(args.seed)
        widths = search.evolve(cutter.rise, saving.shares, widths, free, args.tries, rng)
        plan |= {"method": "evolve", **outcome(full | widths, cutter, saving)}
        save_plan(out, plan)

    show(plan, full)
    print(f"wrote {out} after {time.monotonic() - start:.0f} s")
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
