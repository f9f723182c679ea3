"""The search: how many channels each group may keep.

J = R + lmbda * 255^2 * MSE with real rounding, on calibration crops. Following Fig. 1 of Hossain
and Zhu, arXiv:2506.01229:

1. zeta_g(w): relative rise of J, averaged over the levels, when only group g is narrowed to w.
2. Given alpha, every group keeps the smallest w with zeta_g(w) <= alpha.
3. Adaptive search: bisection over the values that alpha can usefully take until S is as near to
   S_target as it gets, S the share of the parameters (or multiply-accumulates, or time) removed.

A threshold asks what narrowing a group costs and not what it saves. `greedy_search`, the default of
search.py, asks for both, of the same sensitivities. Both methods add up the rises of single groups;
`evolve` goes on from the greedy plan and measures whole plans. The control is `uniform_widths`, one
ratio for all.

A plan is {group: width}; groups that it does not name stay as they are. Two arguments below judge
one: `rise` gives the relative rise of J, averaged over the levels, when its groups are narrowed
together; `share` gives S.
"""

import math

from lic.codec import structure

MULTIPLE = 8  # widths that vector units like; odd ones can be slower than what they replace
RATIOS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
POPULATION = 8  # plans that evolve crosses


def round_width(width):
    """The nearest multiple that is not 0."""
    return max(MULTIPLE, MULTIPLE * round(width / MULTIPLE))


def sparsity(config, widths, cost=None):
    """Share removed by a plan: {"params": S, "macs": S, "both": S}.

    both: the smaller of the two. cost: a function of all widths, whose share is added as "time".
    """
    widths = config["widths"] | widths
    narrowed = config | {"widths": widths}
    params = 1 - structure.parameters(narrowed) / structure.parameters(config)
    before, after = structure.kmac_per_pixel(config), structure.kmac_per_pixel(narrowed)
    macs = 1 - after["total"] / before["total"]
    removed = {"params": params, "macs": macs, "both": min(params, macs)}
    if cost:
        removed["time"] = 1 - cost(widths) / cost(config["widths"])
    return removed


def sensitivities(config, rise):
    """zeta of each group and candidate width, {group: {width: zeta}}; prints it group by group."""
    table = {}
    for group, full in config["widths"].items():
        table[group] = {full: 0.0}
        candidates = {round_width(ratio * full) for ratio in RATIOS}
        for width in sorted(candidates, reverse=True):
            if width < full:
                table[group][width] = rise({group: width})
        row = "".join(f"{width:5}:{100 * zeta:+8.2f}%" for width, zeta in table[group].items())
        print(f"{group:6}{row}")
    return table


def threshold_widths(table, alpha):
    """Smallest width of each group with zeta <= alpha, or its full width if there is none.

    A negative alpha keeps all but the channels that are better gone.
    """
    widths = {}
    for group, row in table.items():
        tolerable = [width for width, zeta in row.items() if zeta <= alpha]
        widths[group] = min(tolerable, default=max(row))
    return widths


def adaptive_search(table, share, target):
    """Alpha, widths and sparsity of the threshold plan nearest to the target sparsity.

    S rises with alpha and changes at the sensitivities alone: alpha moves among those by bisection.
    """
    alphas = sorted({zeta for row in table.values() for zeta in row.values()})

    def plan(alpha):
        widths = threshold_widths(table, alpha)
        return alpha, widths, share(widths)

    low, high = 0, len(alphas) - 1  # the first alpha that reaches the target is among these
    while low < high:
        middle = (low + high) // 2
        _, _, S = plan(alphas[middle])
        if S < target:
            low = middle + 1
        else:
            high = middle
    neighbours = [plan(alpha) for alpha in alphas[max(0, low - 1) : low + 1]]
    return min(neighbours, key=lambda found: abs(found[2] - target))


def greedy_search(table, share, target):
    """Widths and sparsity of a plan that removes about `target` by the cuts that cost least for it.

    From the full widths on, again and again, one group is narrowed: the cut, of any depth, with the
    least rise of J per share that it removes; what it removes beyond the target does not count. Of
    the last two plans, before the target and beyond it, the nearer one is taken. The rises of
    single groups are taken to add up. (Fox, "Discrete optimization via marginal analysis", 1966.)
    """
    widths, S = {group: max(row) for group, row in table.items()}, 0.0
    before = widths, S
    while S < target:
        prices = {}
        for group, row in table.items():
            for width in [w for w in row if w < widths[group]]:
                more = min(target, share(widths | {group: width})) - S
                if more > 0:
                    prices[group, width] = (row[width] - row[widths[group]]) / more
        if not prices:  # all groups are as narrow as the table goes
            break
        before = widths, S
        group, width = min(prices, key=prices.get)
        widths = widths | {group: width}
        S = share(widths)
    return min(before, (widths, S), key=lambda found: abs(found[1] - target))


def uniform_widths(full, share, target):
    """Ratio, widths and sparsity of the plan that narrows every group of `full` by the same ratio.

    full: {group: width before}, of the groups that may be narrowed.
    Groups round at staggered points, interleaved over the four networks: if all rounded to the
    nearest multiple, equally wide groups would jump together and the plans would leave gaps of a
    tenth in S.
    """
    count = len(full)
    # steps of about 5 through the groups: neighbours in the table round far apart
    step = next(step for step in (5, 7, 11, 13, 1) if math.gcd(step, count) == 1)
    stagger = [(step * i % count + 0.5) / count for i in range(count)]

    def widths_of(ratio):
        widths = {}
        for (group, width), round_at in zip(full.items(), stagger):
            narrowed = MULTIPLE * math.floor(ratio * width / MULTIPLE + round_at)
            widths[group] = min(width, max(MULTIPLE, narrowed))
        return widths

    best, least, low, high = None, math.inf, 0.0, 1.0
    for _ in range(50):
        ratio = (low + high) / 2
        widths = widths_of(ratio)
        S = share(widths)
        if abs(S - target) < least:
            best, least = (ratio, widths, S), abs(S - target)
        if S < target:
            high = ratio
        else:
            low = ratio
    return best


def evolve(rise, share, start, full, tries, rng):
    """Widths of the least rise found in `tries` tries of plans that remove as much as `start` does.

    Each try crosses two of the best plans group by group, moves two groups by one to three
    multiples, then narrows groups until as much is removed as by `start`, and widens them while it
    still is; a plan that was there before is not measured again.
    full: {group: width before}, of the groups that may be narrowed.

    After Real et al., "Regularized evolution for image classifier architecture search",
    arXiv:1802.01548, but with crossover, and the best are kept, none dies of age.
    """
    groups, required = list(start), share(start)
    population = [(rise(start), start)]
    seen = {tuple(start.values())}
    print(f"try 0: rise of J {population[0][0]:+.2%}")
    for number in range(1, tries + 1):
        _, a = population[rng.integers(len(population))]
        _, b = population[rng.integers(len(population))]
        child = {}
        for group in groups:
            parent = a if rng.random() < 0.5 else b
            child[group] = parent[group]
        for group in rng.choice(groups, min(2, len(groups)), replace=False):
            child[group] += MULTIPLE * int(rng.choice([-3, -2, -1, 1, 2, 3]))
        fit_share(child, share, full, required, rng)
        if tuple(child.values()) in seen:
            continue
        seen.add(tuple(child.values()))
        population.append((rise(child), child))
        population.sort(key=lambda member: member[0])
        population = population[:POPULATION]
        if population[0][1] is child:
            print(f"try {number}: rise of J {population[0][0]:+.2%}")
    return population[0][1]


def fit_share(widths, share, full, required, rng):
    """Change a plan, in place, so that it removes at least the share `required`.

    Random groups are narrowed until it does, then groups widened while it still does.
    """
    for group, width in widths.items():
        widths[group] = min(full[group], max(MULTIPLE, width))
    while share(widths) < required:
        group = rng.choice([group for group in widths if widths[group] > MULTIPLE])
        widths[group] = max(MULTIPLE, widths[group] - MULTIPLE)
    for group in rng.permutation(list(widths)):
        while widths[group] < full[group]:
            wider = min(full[group], widths[group] + MULTIPLE)
            if share(widths | {group: wider}) < required:
                break
            widths[group] = wider
