"""A pruned codec equals the dense one with those channels silenced, in x_hat and in bits."""

import numpy as np
import pytest
import torch
from helpers import WIDTHS, lively_codec, photo_like

from lic.codec.entropy import LOG_SCALE_MIN
from lic.codec.model import Codec, preset_config
from lic.codec.structure import channel_axes, groups, kmac_per_pixel, layer_sizes, parameters
from lic.shrink import pruning, search, statistics
from lic.shrink.pruning import importance, most_important, narrow
from lic.shrink.statistics import Moments, Statistics, gdn_products, observe
from lic.train.loss import mean_loss

GROUPS = groups()


def silenced(model, group, gone):
    """The dense codec with the channels `gone` of a group made to contribute nothing."""
    layer = model.get_submodule(GROUPS[group][0])
    layer.weight.transpose(0, channel_axes(layer)[0])[gone] = 0
    layer.bias[gone] = 0
    if group == "y":  # y is 0; its Gaussian must sit on 0 with the least scale, which costs nothing
        M = model.config["widths"]["y"]
        for rows, bias in ((gone, 0.0), (gone + M, LOG_SCALE_MIN)):
            model.h_s.conv3.weight[rows] = 0
            model.h_s.conv3.bias[rows] = bias
    return model


@pytest.mark.parametrize(
    "groups",
    [[group] for group in GROUPS] + [list(GROUPS)],
    ids=lambda g: g[0] if len(g) == 1 else "all",
)
def test_narrowed_equals_silenced(groups):
    with torch.no_grad():
        model = lively_codec().double()
        generator = torch.Generator().manual_seed(3)
        keep = {
            g: torch.randperm(WIDTHS[g], generator=generator)[: WIDTHS[g] // 2].sort().values
            for g in groups
        }
        narrowed = narrow(model, keep)
        for group in groups:
            gone = torch.tensor([c for c in range(WIDTHS[group]) if c not in keep[group]])
            silenced(model, group, gone)
        x, level = photo_like().double(), torch.tensor([1.3]).double()
        dense, cut = model(x, level), narrowed(x, level)
        z_bits = dense.z_bits.sum()
        if "z" in groups:  # the silenced z still pays for its zeros
            zeros = torch.zeros(1, WIDTHS["z"], 2, 3).double()
            gone = [c for c in range(WIDTHS["z"]) if c not in keep["z"]]
            z_bits = z_bits - model.prior_z.bits(zeros)[:, gone].sum()
    assert all(narrowed.config["widths"][group] == WIDTHS[group] // 2 for group in groups)
    torch.testing.assert_close(cut.x_hat, dense.x_hat, rtol=0, atol=2e-5)
    torch.testing.assert_close(cut.y_bits.sum(), dense.y_bits.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(cut.z_bits.sum(), z_bits, rtol=1e-5, atol=0)


def test_narrowing_to_all_channels_changes_nothing():
    model = lively_codec()
    same = narrow(model, {group: torch.arange(width) for group, width in WIDTHS.items()})
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values())
    )


def test_every_tensor_is_in_the_group_table():
    """Halving all groups halves every axis that is not RGB, a kernel or a rate level."""
    narrowed = narrow(
        lively_codec(), {group: torch.arange(width // 2) for group, width in WIDTHS.items()}
    )
    fresh = Codec({"widths": {g: w // 2 for g, w in WIDTHS.items()}, "lambdas": narrowed.lambdas})
    shapes = {name: t.shape for name, t in fresh.state_dict().items()}
    assert {name: t.shape for name, t in narrowed.state_dict().items()} == shapes
    for tensor in narrowed.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("measure", ["residual", "l1"])
def test_importance_finds_dead_channels(measure):
    model = lively_codec()
    with torch.no_grad():
        for group in GROUPS:
            silenced(model, group, torch.tensor([2, 5]))
    scores = importance(model, observe(model, photo_like()), measure)
    for group in GROUPS:
        assert scores[group].shape == (WIDTHS[group],)
        assert (
            scores[group][[2, 5]].max() <= (measure == "residual")
            and scores[group].median() > 1e-4 * scores[group].max()
        ), group
    assert most_important(torch.tensor([3.0, 0.0, 5.0, 4.0]), 2).tolist() == [2, 3]


def moments(v):
    """Of the channels over the positions of v (B, C, H, W)."""
    v = v.double().permute(1, 0, 2, 3).flatten(1)
    return Moments(v.mean(1), v @ v.T / v.shape[1])


@pytest.mark.parametrize("group", list(GROUPS))
def test_folding_a_channel_that_the_others_determine_changes_nothing(group, monkeypatch):
    """In each reader, away from the border (for a transposed one on the mean of 2x2 outputs),
    and in the group's GDN."""
    monkeypatch.setattr(statistics, "RIDGE", 0.0)
    torch.manual_seed(0)
    model, rest = lively_codec(), torch.tensor([c for c in range(WIDTHS[group]) if c != 3])
    _, normalised_by, used_by = GROUPS[group]
    v, u = torch.randn(2, 1, WIDTHS[group], 20, 20)
    v[:, 3] = 0.5 * v[:, 0] - 0.3 * v[:, 5] + 1.7
    u[:, 3] = torch.sqrt(0.4 * u[:, 1] ** 2 + 0.9)
    gdn = model.get_submodule(normalised_by) if normalised_by else None
    observed = Statistics(
        dict.fromkeys(used_by, moments(v)),
        {group: gdn_products(gdn, u[0].flatten(1))} if gdn else {},
    )
    with torch.no_grad():
        cut = narrow(model, {group: rest}, observed)
        for layer in used_by:
            expected, output = model.get_submodule(layer)(v), cut.get_submodule(layer)(v[:, rest])
            if isinstance(model.get_submodule(layer), torch.nn.ConvTranspose2d):
                expected, output = (
                    torch.nn.functional.avg_pool2d(o, 2) for o in (expected, output)
                )
            torch.testing.assert_close(
                output[:, :, 2:-2, 2:-2], expected[:, :, 2:-2, 2:-2], rtol=1e-4, atol=2e-3
            )
        if gdn:
            torch.testing.assert_close(
                cut.get_submodule(normalised_by)(u[:, rest]), gdn(u)[:, rest], rtol=1e-3, atol=1e-3
            )


def narrowed_gdn(model, group, keep, v):
    """The group's GDN and the one that is left of it, fitted to its input v (C, positions)."""
    _, name, used_by = GROUPS[group]
    gdn = model.get_submodule(name)
    inputs = dict.fromkeys(used_by, moments(v[None, :, :, None]))
    cut = narrow(model, {group: keep}, Statistics(inputs, {group: gdn_products(gdn, v)}))
    return gdn, cut.get_submodule(name)


def energy(gdn, v):
    """beta_i + sum_j gamma[i, j] v_j^2, (C, positions)."""
    return gdn.energy(v[None, :, :, None])[0, :, :, 0]


@pytest.mark.parametrize("group", ["g_a.2", "g_s.2"])
def test_what_is_left_of_a_gdn_is_the_optimum_of_least_squares(group):
    """No slope where a coefficient is positive, an upward one where it is 0."""
    torch.manual_seed(0)
    keep = torch.tensor([0, 1, 2, 4, 6])
    v = torch.randn(WIDTHS[group], 3000)
    v[3] *= 2  # goes
    v[1] = torch.exp(-v[3].square())  # stays, strong where that was weak: it would get minus signs
    with torch.no_grad():
        gdn, left = narrowed_gdn(lively_codec(), group, keep, v)
        expected, found = energy(gdn, v)[keep], energy(left, v[keep])
        weight = (v[keep] / expected).square()
        slope = (weight * (found - expected)) @ v[keep].square().T
        slope /= (weight * expected) @ v[keep].square().T
        gamma = left.coefficients()[1]
    zero = gamma < 1e-6
    assert zero.any() and not zero.all()
    assert slope[zero].min() > -1e-4
    assert slope[~zero].abs().max() < 1e-4


def test_quiet_positions_keep_their_energy_when_a_loud_channel_goes():
    """Channel 3 is loud at one position in fifty and silent elsewhere; channel 1 tells where."""
    torch.manual_seed(0)
    keep = torch.tensor([0, 1, 2, 4, 5])
    v = torch.randn(WIDTHS["g_s.2"], 5000)
    loud = torch.rand(5000) < 0.02
    v[3] *= torch.where(loud, 100.0, 0.01)
    v[1] *= torch.where(loud, 10.0, 1.0)
    v[6:] *= 0.1
    with torch.no_grad():
        gdn, left = narrowed_gdn(lively_codec(), "g_s.2", keep, v)
        ratio = energy(left, v[keep]) / energy(gdn, v)[keep]
    assert ratio[:, ~loud].log().abs().mean() < 0.1


def test_statistics_are_those_of_what_the_layers_receive():
    model, x, seen = (
        lively_codec(),
        photo_like().repeat(5, 1, 1, 1),
        {"g_s.conv2": [], "g_s.gdn1": []},
    )
    x[0] = 0.3
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0])
        )
        for name in seen
    ]
    observed = observe(model, x)
    for hook in hooks:
        hook.remove()
    half = {
        name: inputs[: len(inputs) // 2] for name, inputs in seen.items()
    }  # two passes: for the readers, then for the GDNs
    for expected, found in zip(moments(torch.cat(half["g_s.conv2"])), observed.inputs["g_s.conv2"]):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    v = torch.cat(half["g_s.gdn1"]).transpose(0, 1).flatten(1).double()
    gdn = model.g_s.gdn1
    beta, gamma = gdn.coefficients()
    weight = (v / (gamma.double() @ v.square() + beta[:, None])).square()
    q = torch.cat([v.square(), torch.ones_like(v[:1])])
    expected = torch.einsum("ip,jp,kp->ijk", weight, q, q)
    torch.testing.assert_close(observed.gdn_products["g_s.1"], expected, rtol=1e-5, atol=1e-8)


def test_positions_of_a_large_layer_are_sampled_from_every_column():
    columns = torch.arange(64.0).expand(2, 3, 100, 64)
    some = statistics.some_positions(columns)
    assert statistics.POSITIONS / 2 < some.shape[1] < 2 * statistics.POSITIONS
    assert set(some[0].tolist()) == set(range(64))
    assert some.untyped_storage().nbytes() < columns.numel()


def test_what_the_others_can_replace_goes_first():
    """A copy of another channel goes before one that is alone, though it varies more; dead
    channels go first of all."""
    model, x = lively_codec(), photo_like()
    with torch.no_grad():
        silenced(model, "g_s.1", torch.tensor([6]))
        layer, gdn = model.g_s.conv1, model.g_s.gdn1
        layer.weight[:, 2], layer.bias[2] = 3 * layer.weight[:, 1], 3 * layer.bias[1]
        gdn.gamma[:, 2] = gdn.gamma[2] = 0
        gdn.gamma[1], gdn.gamma[:, 1] = 0, 0
        gdn.beta[1] = gdn.beta[2] = 1
    ranks = pruning.residual(model, observe(model, x))["g_s.1"]
    assert ranks.sort().values.tolist() == list(range(WIDTHS["g_s.1"]))
    assert ranks[6] == 0 and ranks[[1, 2]].min() == 1


def test_folding_all_groups_at_once_brings_J_back():
    """One channel of each group is constant but not zero: dropped it is missed everywhere,
    folded hardly."""
    model, x = lively_codec(), photo_like()
    with torch.no_grad():
        for group, (made_by, _, _) in GROUPS.items():
            silenced(model, group, torch.tensor([1]))
            if group not in ("y", "z"):
                model.get_submodule(made_by).bias[1] = 2.0
        base = mean_loss(model, x)
        keep = {
            group: torch.tensor([c for c in range(width) if c != 1])
            for group, width in WIDTHS.items()
        }
        dropped, folded = (
            (mean_loss(narrow(model, keep, s), x) / base - 1).abs().mean()
            for s in (None, observe(model, x))
        )
    assert folded < 0.5 * dropped


def test_parameter_count_in_closed_form_is_the_models():
    for config in (preset_config("small"), lively_codec().config):
        assert parameters(config) == sum(p.numel() for p in Codec(config).parameters())


def test_mac_count_is_what_the_layers_execute():
    model, x = lively_codec(), photo_like()
    executed = {}

    def count(name):
        def hook(layer, inputs, output):
            positions = inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else output
            weight = getattr(layer, "weight", getattr(layer, "gamma", None))
            executed[name] = weight.numel() * positions.shape[2] * positions.shape[3]

        return model.get_submodule(name).register_forward_hook(hook)

    hooks = [count(name) for name, *_ in layer_sizes(WIDTHS)]
    model(x, torch.zeros(1))
    for hook in hooks:
        hook.remove()
    pixels = 1000 * x.shape[2] * x.shape[3]
    for part, networks in {
        "encoder": ("g_a", "h_a", "h_s"),
        "decoder": ("h_s", "g_s"),
        "total": ("g_", "h_"),
    }.items():
        total = sum(macs for name, macs in executed.items() if name.startswith(networks)) / pixels
        assert kmac_per_pixel(model.config)[part] == pytest.approx(total)


CONFIG = preset_config("small")
TABLE = {  # zeta rises twice as fast with each group
    group: {w: 2.0**i * (width - w) / width for w in range(8, width + 1, 8)}
    for i, (group, width) in enumerate(CONFIG["widths"].items())
}


def test_threshold_keeps_the_smallest_width_under_alpha():
    widths = search.threshold_widths(TABLE, 0.5)
    for group, row in TABLE.items():
        assert row[widths[group]] <= 0.5
        assert all(zeta > 0.5 for w, zeta in row.items() if w < widths[group])
    assert search.threshold_widths(TABLE, 0.0) == CONFIG["widths"]


def share_of(of):
    """The share of `of` that a plan removes from CONFIG; as "time" each channel counts one."""
    return lambda widths: search.sparsity(CONFIG, widths, lambda widths: sum(widths.values()))[of]


@pytest.mark.parametrize("of", ["params", "macs", "both", "time"])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.75])
def test_adaptive_search_and_uniform_reach_the_target(of, target):
    share = share_of(of)
    _, widths, S = search.adaptive_search(TABLE, share, target)
    assert S == share(widths)
    alphas = {zeta for row in TABLE.values() for zeta in row.values()}
    assert abs(S - target) == min(
        abs(share(search.threshold_widths(TABLE, a)) - target) for a in alphas
    )
    ratio, widths, S = search.uniform_widths(CONFIG["widths"], share, target)
    assert abs(S - target) < 0.03
    assert all(abs(w - ratio * CONFIG["widths"][g]) <= 8 for g, w in widths.items())


@pytest.mark.parametrize("of", ["params", "macs", "both", "time"])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.75])
def test_the_greedy_plan_costs_less_than_the_thresholds(of, target):
    def cost(plan):
        return sum(TABLE[group][width] for group, width in plan.items())

    share = share_of(of)
    _, by_threshold, reached = search.adaptive_search(TABLE, share, target)
    widths, S = search.greedy_search(TABLE, share, reached)  # the nearest; and one that reaches it
    assert S == share(widths) and abs(S - reached) < 0.1
    while S < reached:
        reached += 0.01
        widths, S = search.greedy_search(TABLE, share, reached)
    assert cost(widths) < cost(by_threshold)


def test_the_greedy_search_takes_the_cheapest_cut_first_and_ends_at_the_narrowest():
    table = {group: {width: 0.0} for group, width in CONFIG["widths"].items()}
    table |= {"g_a.1": {64: 0.0, 32: 0.03}, "z": {64: 0.0, 56: 0.001}}  # much for 3 %, little
    share = share_of("macs")
    widths, S = search.greedy_search(table, share, 0.1)
    assert widths["g_a.1"] == 32 and widths["z"] == 64 and S == share(widths)
    widths, S = search.greedy_search(table, share, 1.0)
    assert widths["g_a.1"] == 32 and widths["z"] == 56 and S < 1


@pytest.mark.parametrize("of", ["params", "macs"])
def test_evolution_finds_a_better_plan_that_costs_no_more(of):
    """The threshold plan does not know that here the groups' rises multiply; the fitness does."""

    def rise(widths):
        return np.prod([1 + TABLE[group][width] for group, width in widths.items()]) - 1

    share = share_of(of)
    _, start, S = search.adaptive_search(TABLE, share, 0.5)
    for seed in range(3):
        widths = search.evolve(
            rise, share, start, CONFIG["widths"], 200, np.random.default_rng(seed)
        )
        assert rise(widths) < 0.95 * rise(start)
        assert share(widths) >= S
        assert all(8 <= w <= CONFIG["widths"][g] and w % 8 == 0 for g, w in widths.items())


def test_evolution_keeps_widths_that_are_no_multiples_within_bounds():
    start = {group: min(width, 16) for group, width in WIDTHS.items()}
    config = {"widths": WIDTHS, "lambdas": [1.0]}
    tried = []
    search.evolve(
        lambda widths: tried.append(dict(widths)) or 0.0,
        lambda widths: search.sparsity(config, widths)["params"],
        start,
        WIDTHS,
        100,
        np.random.default_rng(0),
    )
    assert len(tried) > 20 and all(
        8 <= w <= WIDTHS[g] for widths in tried for g, w in widths.items()
    )


def test_sensitivity_is_zero_where_nothing_reads_a_group_and_only_there():
    model = lively_codec()
    with torch.no_grad():
        model.h_s.conv3.weight.zero_()  # nothing of h_s.2 is read
    x = photo_like()
    scores, J = importance(model, observe(model, x)), mean_loss(model, x)

    def rise(widths):
        keep = {group: most_important(scores[group], width) for group, width in widths.items()}
        return (mean_loss(narrow(model, keep), x) / J - 1).mean().item()

    table = search.sensitivities(model.config, rise)
    assert table["h_s.2"][8] == pytest.approx(0, abs=1e-4)
    assert abs(table["g_s.3"][8]) > 0.01


def test_the_better_of_both_cuts_is_taken():
    model, x = lively_codec(), photo_like()
    keep = {"g_s.1": torch.arange(9)}
    for liked in (0, 1):
        values = [torch.tensor([2.0, 8.0]), torch.tensor([2.0, 8.0])]
        values[liked] = torch.tensor([1.0, 4.0])
        losses = iter(values)
        codec, J = pruning.best_cut(model, keep, x, lambda codec, x: next(losses))
        assert list(J.values()) == [pytest.approx(v.prod().item() ** 0.5) for v in values]
        folded = narrow(model, keep, observe(model, x) if liked else None)
        assert torch.equal(codec.g_s.conv2.weight, folded.g_s.conv2.weight)


def test_l1_is_the_norm_of_the_weights_that_make_a_channel():
    model = lively_codec()
    scores = importance(model, observe(model, photo_like()), "l1")
    for group, layer in (("g_a.2", model.g_a.conv2), ("g_s.1", model.g_s.conv1)):
        out_axis, _ = channel_axes(layer)
        expected = [layer.weight.select(out_axis, c).abs().sum() for c in range(WIDTHS[group])]
        torch.testing.assert_close(scores[group], torch.stack(expected).detach())


def test_residual_removes_in_each_round_what_costs_the_reader_least():
    """Against the definition: the covariance of what is left is inverted anew in each round."""
    model = lively_codec()
    statistics_ = observe(model, photo_like())
    ranks = importance(model, statistics_)
    for group, reader in (("g_a.2", "g_a.conv3"), ("g_s.1", "g_s.conv2"), ("z", "h_s.conv1")):
        covariance = statistics_.inputs[reader].covariance()
        ridge = 1e-6 * covariance.diagonal().mean() + 1e-12
        covariance = covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype)
        _, in_axis = channel_axes(model.get_submodule(reader))
        weight = model.get_submodule(reader).weight.detach().double()
        left, order = list(range(len(covariance))), []
        while left:
            P = torch.linalg.inv(covariance[left][:, left])
            cost = [weight.select(in_axis, c).square().sum() / P[k, k] for k, c in enumerate(left)]
            order.append(left.pop(int(torch.stack(cost).argmin())))
        assert ranks[group].argsort().tolist() == order


def test_both_is_the_smaller_share():
    S = search.sparsity(CONFIG, {"h_s.2": 8})
    assert S["both"] == min(S["params"], S["macs"]) < max(S["params"], S["macs"])


def test_sensitivities_are_measured_at_ten_percent_steps_of_each_group():
    asked = []
    table = search.sensitivities(CONFIG, lambda widths: asked.append(widths) or 0.5)
    assert all(len(widths) == 1 for widths in asked)
    for group, width in CONFIG["widths"].items():
        nearest = {max(8, 8 * round(k / 10 * width / 8)) for k in range(1, 10)}
        assert set(table[group]) == nearest | {width} and table[group][width] == 0


def test_the_greedy_search_ends_at_the_nearer_of_the_last_two_plans():
    table = {group: {width: 0.0} for group, width in CONFIG["widths"].items()}
    table["g_s.2"] = {64: 0.0, 32: 0.01}
    table["g_s.3"] = {64: 0.0, 8: 0.9}
    share = share_of("macs")
    first, second = share({"g_s.2": 32}), share({"g_s.2": 32, "g_s.3": 8})
    widths, S = search.greedy_search(table, share, first + 0.1 * (second - first))
    assert (widths["g_s.2"], widths["g_s.3"]) == (32, 64) and S == share(widths) == first
    widths, S = search.greedy_search(table, share, first + 0.9 * (second - first))
    assert (widths["g_s.2"], widths["g_s.3"]) == (32, 8) and S == share(widths) == second


def test_a_plan_is_fitted_so_that_nothing_can_be_widened():
    share, full = share_of("macs"), CONFIG["widths"]
    for start in (dict.fromkeys(full, 8), dict(full)):
        search.fit_share(start, share, full, 0.4, np.random.default_rng(0))
        assert share(start) >= 0.4
        for group, width in start.items():
            wider = min(full[group], width + 8)
            assert width == full[group] or share(start | {group: wider}) < 0.4


def test_evolution_measures_no_plan_twice():
    tried = []
    start = search.adaptive_search(TABLE, share_of("macs"), 0.5)[1]
    search.evolve(
        lambda widths: tried.append(tuple(widths.values())) or 0.1,
        share_of("macs"),
        start,
        CONFIG["widths"],
        60,
        np.random.default_rng(0),
    )
    assert len(tried) == len(set(tried)) > 20
