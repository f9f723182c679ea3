"""The cost that `search.py --of time` counts."""

import numpy as np
import pytest
import torch
from helpers import WIDTHS

from lic.codec import structure
from lic.shrink import timing

CONFIG = {"widths": WIDTHS, "lambdas": [0.01]}


def test_a_fit_finds_what_made_the_times_and_is_never_negative():
    rng = np.random.default_rng(0)
    work = np.column_stack([rng.uniform(1, 9, (6, 2)), np.ones(6)])
    for truth in ([2.0, 0.5, 0.1], [0.0, 3.0, 0.0], [0.0, 0.0, 4.0]):
        np.testing.assert_allclose(timing.nonnegative_fit(work, work @ truth), truth, atol=1e-9)
    fitted = timing.nonnegative_fit(work, work @ [2.0, -0.2, 0.1])
    assert (fitted >= 0).all() and fitted[0] > 1
    assert not timing.nonnegative_fit(work, -np.ones(6)).any()


def test_work_is_counted_as_in_structure():
    work = timing.layer_work(WIDTHS)
    sizes = structure.layer_sizes(WIDTHS)
    assert work.keys() == {name for name, *_ in sizes}
    pixels = timing.HEIGHT * timing.WIDTH
    total = sum(macs for macs, _ in work.values())
    assert total == pytest.approx(structure.kmac_per_pixel(CONFIG)["total"] * pixels / 1000)
    # read: 3 channels a pixel; made: those of g_a.1 on a quarter of the positions
    assert work["g_a.conv1"][1] == pytest.approx((3 + WIDTHS["g_a.1"] / 4) * pixels / 1e6)
    assert work["g_s.gdn3"][1] == pytest.approx(2 * WIDTHS["g_s.3"] / 4 * pixels / 1e6)


def test_decodings_weigh_the_networks():
    ones = {name: [0.0, 0.0, 1.0] for name in timing.layer_work(WIDTHS)}
    layers = {network: sum(n.startswith(network) for n in ones) for network in ("g_a", "h_a")}
    layers |= {network: sum(n.startswith(network) for n in ones) for network in ("g_s", "h_s")}
    once = timing.milliseconds({"coefficients": ones, "decodings": 1}, WIDTHS)
    assert once == sum(layers.values()) + layers["h_s"]
    often = timing.milliseconds({"coefficients": ones, "decodings": 5}, WIDTHS)
    assert often - once == 4 * (layers["h_s"] + layers["g_s"])


def test_each_layer_is_timed(monkeypatch):
    """On a small picture: each takes some time, and a narrow codec takes less than a wide one."""
    monkeypatch.setattr(timing, "HEIGHT", 128)
    monkeypatch.setattr(timing, "WIDTH", 128)
    monkeypatch.setattr(timing, "ROUNDS", 4)
    config = {"widths": {group: 64 for group in WIDTHS}, "lambdas": [0.01]}
    made = timing.time_layers(config, decodings=2)
    assert made["coefficients"].keys() == timing.layer_work(WIDTHS).keys()
    assert made["threads"] == torch.get_num_threads() and made["processor"]
    assert all(sum(row) > 0 for row in made["coefficients"].values())
    narrow = {group: 8 for group in WIDTHS}
    assert timing.milliseconds(made, narrow) < timing.milliseconds(made, config["widths"])


def test_the_coefficients_are_those_of_the_median_round_after_the_warm_up(monkeypatch):
    """A layer takes 3 ms a million multiply-accumulates and 2 a million numbers; the warm-up is
    slow, and so are four of the nine rounds after it."""
    widths = {group: 64 for group in WIDTHS}
    rounds = []

    def taken(coder):
        rounds.append(coder)
        of_round = (len(rounds) - 1) // len(timing.TIMED_RATIOS)
        slow = 50 if of_round < timing.WARM_UP or of_round >= timing.ROUNDS - 4 else 1
        work = timing.layer_work(coder.model.config["widths"])
        return {name: slow * (3 * macs + 2 * moved) for name, (macs, moved) in work.items()}

    monkeypatch.setattr(timing, "time_of_each_layer", taken)
    made = timing.time_layers({"widths": widths, "lambdas": [0.01]})
    for name, (macs, moved) in timing.layer_work(widths).items():
        a, b, c = made["coefficients"][name]
        assert a * macs + b * moved + c == pytest.approx(3 * macs + 2 * moved, rel=1e-6), name
    coder = rounds[0]
    assert coder.model.quantization["weight_bits"] == 8
    assert coder.model.g_s.conv3.input_range and not coder.model.g_s.conv4.input_range


def test_times_are_milliseconds(monkeypatch):
    monkeypatch.setattr(timing, "HEIGHT", 64)
    monkeypatch.setattr(timing, "WIDTH", 64)
    coder = timing.random_coder({"widths": {group: 8 for group in WIDTHS}, "lambdas": [0.01]})
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 0.25 * next(ticks))
    taken = timing.time_of_each_layer(coder)
    assert taken["g_a.conv1"] == taken["h_s.conv3"] == 250.0
