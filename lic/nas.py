"""The search: how many channels each of the twelve groups may keep.

J = R + lmbda * 255^2 * MSE with real rounding, on calibration crops. Following the paper's Fig. 1:

1. zeta_g(w): relative rise of J, averaged over the levels, when only group g is narrowed to w.
2. Given alpha, every group keeps the smallest w with zeta_g(w) <= alpha.
3. Adaptive search: bisection over the values that alpha can usefully take until
   S is as near to S_target as it gets, S the share of the parameters (or multiply-accumulates) removed.

Single-group sensitivities ignore how groups interact. `evolve` goes on from the threshold plan and measures
whole plans; the control is `uniform_widths`, one ratio for all groups.
"""

import math

from lic.metrics import kmac_per_pixel, parameters

MULTIPLE = 8  # widths that vector units like; odd ones can be slower than what they replace
RATIOS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def round_width(width):
    """The nearest multiple that is not 0."""
    return max(MULTIPLE, MULTIPLE * round(width / MULTIPLE))


def sparsity(config, widths):
    """Share removed by narrowing config to widths, and the smaller of the two: {"params": S, "macs": S, "both": S}."""
    narrowed = {**config, "widths": widths}
    params = 1 - parameters(narrowed) / parameters(config)
    macs = 1 - kmac_per_pixel(narrowed)["total"] / kmac_per_pixel(config)["total"]
    return {"params": params, "macs": macs, "both": min(params, macs)}


def sensitivities(config, rise, report=print):
    """zeta of each group and candidate width, measured one group at a time: {group: {width: zeta}}.

    rise: {group: width} -> relative rise of J, averaged over the levels, when the groups named are narrowed.
    """
    table = {}
    for group, full in config["widths"].items():
        table[group] = {full: 0.0}
        for width in sorted({w for w in map(round_width, [r * full for r in RATIOS]) if w < full}, reverse=True):
            table[group][width] = rise({group: width})
        report(f"{group:6}" + "".join(f"{w:5}:{100 * z:+8.2f}%" for w, z in table[group].items()))
    return table


def threshold_widths(table, alpha):
    """Smallest width of each group with zeta <= alpha, or its full width if there is none.

    A negative alpha keeps all but the channels that are better gone.
    """
    return {group: min((w for w, zeta in row.items() if zeta <= alpha), default=max(row)) for group, row in table.items()}


def _bisect(widths_of, low, high, config, target, of):
    """Knob t in [low, high] with a rising sparsity: the try nearest to target."""
    best = None
    for _ in range(50):
        t = (low + high) / 2
        widths = widths_of(t)
        S = sparsity(config, widths)[of]
        if best is None or abs(S - target) < abs(best[2] - target):
            best = (t, widths, S)
        low, high = (t, high) if S < target else (low, t)
    return best


def adaptive_search(table, config, target, of):
    """Alpha, widths and sparsity of the threshold plan nearest to the target sparsity."""
    alphas = sorted({zeta for row in table.values() for zeta in row.values()})  # S changes nowhere else

    def widths_of(t):
        return threshold_widths(table, alphas[int(t)])

    t, widths, S = _bisect(widths_of, 0, len(alphas) - 1e-9, config, target, of)
    return alphas[int(t)], widths, S


def uniform_widths(config, target, of):
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

    t, widths, S = _bisect(widths_of, 0.0, 1.0, config, target, of)
    return 1 - t, widths, S


def evolve(rise, start, config, of, tries, rng, report=print):
    """Widths of the least rise found among `tries` plans that cost no more than the plan `start`.

    rise, as above, of all groups narrowed together is the fitness. Each try crosses two of the
    eight best plans group by group, moves two groups by one to three multiples, then spends what is left of the
    budget; a plan that was there before is not measured again. After Real et al., "Regularized evolution for image
    classifier architecture search", arXiv:1802.01548, but with crossover, and the best are kept, none dies of age.
    """
    groups, budget = list(start), sparsity(config, start)[of]
    population, seen = [(rise(start), start)], {tuple(start.values())}
    report(f"try 0: rise of J {population[0][0]:+.2%}")
    for count in range(1, tries + 1):
        a, b = (population[rng.integers(len(population))][1] for _ in range(2))
        child = {group: (a, b)[rng.integers(2)][group] for group in groups}
        for group in rng.choice(groups, 2, replace=False):
            child[group] += MULTIPLE * int(rng.integers(1, 4)) * (1, -1)[rng.integers(2)]
        _fit_budget(child, config, of, budget, rng)
        if tuple(child.values()) in seen:
            continue
        seen.add(tuple(child.values()))
        population = sorted([*population, (rise(child), child)], key=lambda plan: plan[0])[:8]
        if population[0][1] is child:
            report(f"try {count}: rise of J {population[0][0]:+.2%}")
    return population[0][1]


def _fit_budget(widths, config, of, budget, rng):
    """Narrow random groups until the sparsity reaches `budget`, then widen others while it stays there; in place."""
    full = config["widths"]
    widths.update({group: min(full[group], max(MULTIPLE, width)) for group, width in widths.items()})
    while sparsity(config, widths)[of] < budget:
        group = rng.choice([group for group in widths if widths[group] > MULTIPLE])
        widths[group] = max(MULTIPLE, widths[group] - MULTIPLE)
    for group in rng.permutation(list(widths)):
        while widths[group] < full[group]:
            wider = min(full[group], widths[group] + MULTIPLE)
            if sparsity(config, {**widths, group: wider})[of] < budget:
                break
            widths[group] = wider
