"""The search: how many channels each of the twelve groups may keep.

J = R + lmbda * 255^2 * MSE with real rounding, on calibration crops. Following the paper's Fig. 1:

1. zeta_g(w): relative rise of J, averaged over the levels, when only group g is narrowed to w.
2. Given alpha, every group keeps the smallest w with zeta_g(w) <= alpha.
3. Adaptive search: bisection over the values that alpha can usefully take until
   |S - S_target| <= delta, S the share of the parameters (or multiply-accumulates) removed.

Single-group sensitivities ignore how groups interact; the control is `uniform_widths`, one
ratio for all groups.
"""

import math

from lic.metrics import kmac_per_pixel, parameters
from lic.pruning import GROUPS, most_important, narrow
from lic.training import mean_loss

MULTIPLE = 8  # widths that vector units like; odd ones can be slower than what they replace
RATIOS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def round_width(width):
    """The nearest multiple that is not 0."""
    return max(MULTIPLE, MULTIPLE * round(width / MULTIPLE))


def sparsity(config, widths):
    """Share removed by narrowing config to widths: {"params": S, "macs": S}."""
    narrowed = {**config, "widths": widths}
    return {
        "params": 1 - parameters(narrowed) / parameters(config),
        "macs": 1 - kmac_per_pixel(narrowed)["total"] / kmac_per_pixel(config)["total"],
    }


def sensitivities(model, scores, x, amp=False, report=print):
    """zeta of each group and candidate width, measured one group at a time: {group: {width: zeta}}.

    scores: from pruning.importance; x: calibration crops (B, 3, H, W), all coded at every level.
    """
    base = mean_loss(model, x, amp)
    table = {}
    for group in GROUPS:
        full = model.config["widths"][group]
        table[group] = {full: 0.0}
        for width in sorted({w for w in map(round_width, [r * full for r in RATIOS]) if w < full}, reverse=True):
            narrowed = narrow(model, {group: most_important(scores[group], width)})
            table[group][width] = (mean_loss(narrowed, x, amp) / base - 1).mean().item()
        report(f"{group:6}" + "".join(f"{w:5}:{100 * z:+8.2f}%" for w, z in table[group].items()))
    return table


def threshold_widths(table, alpha):
    """Smallest width of each group with zeta <= alpha, or its full width if there is none.

    A negative alpha keeps all but the channels that are better gone.
    """
    return {group: min((w for w, zeta in row.items() if zeta <= alpha), default=max(row)) for group, row in table.items()}


def _bisect(widths_of, low, high, config, target, of, delta):
    """Knob t in [low, high] with a rising sparsity: the try nearest to target; stops within delta."""
    best = None
    for _ in range(50):
        t = (low + high) / 2
        widths = widths_of(t)
        S = sparsity(config, widths)[of]
        if best is None or abs(S - target) < abs(best[2] - target):
            best = (t, widths, S)
        if abs(S - target) <= delta:
            break
        low, high = (t, high) if S < target else (low, t)
    return best


def adaptive_search(table, config, target, of, delta):
    """Alpha, widths and sparsity of the threshold plan nearest to the target sparsity."""
    alphas = sorted({zeta for row in table.values() for zeta in row.values()})  # S changes nowhere else

    def widths_of(t):
        return threshold_widths(table, alphas[int(t)])

    t, widths, S = _bisect(widths_of, 0, len(alphas) - 1e-9, config, target, of, delta)
    return alphas[int(t)], widths, S


def uniform_widths(config, target, of, delta):
    """Ratio, widths and sparsity of the plan that narrows every group by the same ratio.

    Groups round at staggered points, interleaved over the four networks: if all rounded to the nearest
    multiple, equally wide groups would jump together and the plans would leave gaps of a tenth in S.
    """

    def widths_of(t):
        widths = {}
        for i, (group, full) in enumerate(config["widths"].items()):
            narrowed = MULTIPLE * math.floor((1 - t) * full / MULTIPLE + (5 * i % 12 + 0.5) / 12)
            widths[group] = min(full, max(MULTIPLE, narrowed))
        return widths

    t, widths, S = _bisect(widths_of, 0.0, 1.0, config, target, of, delta)
    return 1 - t, widths, S
