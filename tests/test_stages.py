"""The real scripts, tiny: in sequence by subprocess, killed and resumed, and each with bad
input."""

import json
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from PIL import Image

import evaluate
import prune
from lic.codec.bitstream import load_coder
from lic.codec.checkpoint import load_checkpoint
from lic.codec.eight_bits import WIDE, input_ranges
from lic.codec.model import Codec, preset_config
from lic.codec.structure import groups
from lic.files import LicError
from lic.images import dead_leaves, read_image
from lic.measure import ideal_bits, measure_classical
from lic.shrink.plan import load_plan
from lic.train.optimizer import Optimizer
from lic.train.state import load_state, read_state

GOLDEN = ROOT / "tests" / "golden"
TRAIN = ["--crop", "64", "--batch", "2"]


def command(name, *arguments):
    script = ["-m", "lic"] if name == "lic" else [str(ROOT / name)]
    return [sys.executable, *script, *map(str, arguments)]


def run_stage(name, *arguments, status=0):
    done = subprocess.run(command(name, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pipeline(photos, tmp_path_factory):
    """The five stages in sequence; returns their folder."""
    out = tmp_path_factory.mktemp("runs")
    data = ["--data", photos]
    run_stage("train.py", *data, *TRAIN, "--steps", 20, "--out", out / "dense.pt")
    run_stage(
        "search.py",
        *data,
        "--checkpoint",
        out / "dense.pt",
        "--crop",
        64,
        "--crops",
        2,
        "--target",
        0.4,
        "--delta",
        0.1,
        "--out",
        out / "plan.json",
    )
    run_stage(
        "prune.py",
        *data,
        *TRAIN,
        "--checkpoint",
        out / "dense.pt",
        "--plan",
        out / "plan.json",
        "--steps",
        4,
        "--out",
        out / "pruned.pt",
    )
    run_stage(
        "quantize.py",
        *data,
        *TRAIN,
        "--checkpoint",
        out / "pruned.pt",
        "--steps",
        4,
        "--out",
        out / "quantized.pt",
    )
    table = run_stage(
        "evaluate.py",
        out / "dense.pt",
        out / "pruned.pt",
        out / "quantized.pt",
        *data,
        "--json",
        out / "e.json",
    )
    (out / "table.txt").write_text(table)
    return out


def test_evaluation_has_every_figure_and_they_are_consistent(pipeline):
    result = json.loads((pipeline / "e.json").read_text())
    assert result["images"] == 4 and result["pixels"] == 4 * 64 * 64
    assert [c["stage"] for c in result["checkpoints"]] == ["train", "prune", "quantize"]
    dense, pruned, quantized = result["checkpoints"]
    assert dense["parameters"] > pruned["parameters"] == quantized["parameters"]
    assert dense["bytes"] > pruned["bytes"] > quantized["bytes"]
    assert dense["kmac_per_pixel"]["decoder"] > pruned["kmac_per_pixel"]["decoder"]
    for checkpoint in result["checkpoints"]:
        assert len(checkpoint["levels"]) == 4
        for row in checkpoint["levels"]:
            header = 8 * 47 / 64**2
            assert row["ideal_bpp"] < row["bpp"] < 1.05 * row["ideal_bpp"] + header + 0.1
            assert 0 < row["ms_ssim"] < 1 and 5 < row["psnr"] < 40
            assert row["encode_seconds"] > 0 and row["decode_seconds"] > 0
            assert (
                0 < row["alive_y"] <= checkpoint["channels"]["y"]
                and 0 <= row["alive_z"] <= checkpoint["channels"]["z"]
            )
    for rows in result["classical"].values():
        assert [row["bpp"] for row in rows] == sorted(row["bpp"] for row in rows)
    table = (pipeline / "table.txt").read_text()
    assert "\nPSNR BD-rate of each" in table and "\nMS-SSIM BD-rate of each" in table


def test_lineage_tells_the_whole_story(pipeline):
    _, meta = load_checkpoint(pipeline / "quantized.pt")
    assert [entry["stage"] for entry in meta["lineage"]] == ["train", "prune", "quantize"]
    assert meta["lineage"][1]["parent"] == load_checkpoint(pipeline / "dense.pt")[1]["fingerprint"]
    assert "J" in json.loads((pipeline / "plan.json").read_text())


def test_scales_are_trained(pipeline, photos, monkeypatch):
    arguments = [
        "--checkpoint",
        pipeline / "pruned.pt",
        "--data",
        photos,
        *TRAIN,
        "--steps",
        0,
        "--out",
        pipeline / "calibrated.pt",
    ]
    assert run_script(monkeypatch, "quantize.py", *arguments) == 0
    calibrated, tuned = (
        load_checkpoint(pipeline / name)[0] for name in ("calibrated.pt", "quantized.pt")
    )
    changed = 0
    for name in input_ranges():
        before, after = calibrated.get_submodule(name), tuned.get_submodule(name)
        assert torch.equal(before.input_scale, after.input_scale) == (
            after.input_range in (None, WIDE)
        ), name
        changed += not torch.equal(before.weight_scale, after.weight_scale)
    assert (
        changed > len(input_ranges()) // 2
    )  # not all: with the rate so small at the end, a row may round to what it was


def test_plan_and_pruned_checkpoint_have_the_same_widths(pipeline):
    plan = json.loads((pipeline / "plan.json").read_text())
    model, _ = load_checkpoint(pipeline / "pruned.pt")
    assert model.config["widths"] == plan["widths"]
    assert abs(plan["sparsity"]["both"] - 0.4) <= 0.1


def test_a_plan_for_another_checkpoint_is_refused(pipeline, photos):
    error = run_stage(
        "prune.py",
        "--checkpoint",
        pipeline / "pruned.pt",
        "--plan",
        pipeline / "plan.json",
        "--data",
        photos,
        *TRAIN,
        "--out",
        pipeline / "x.pt",
        status=2,
    )
    assert "was made for checkpoint" in error and not (pipeline / "x.pt").exists()


def test_pruning_sees_the_crops_of_the_search_though_it_could_use_more_images(
    tmp_path, monkeypatch
):
    """Small images, which the search left out, are no calibration crops of prune.py either."""
    for seed in range(24):
        image = dead_leaves(seed, 64 if seed % 2 else 128)
        Image.fromarray(image).save(tmp_path / f"{seed:02}.png")
    images = ["--checkpoint", GOLDEN / "codec.pt", "--data", tmp_path, "--skip-bad"]
    out = tmp_path.parent / f"{tmp_path.name} cut"
    search = ["search.py", *images, "--method", "uniform", "--crop", 128, "--crops", 4]
    search += ["--target", 0.3, "--delta", 0.2, "--out", out / "plan.json"]
    assert run_script(monkeypatch, *search) == 0
    prune = ["prune.py", *images, "--plan", out / "plan.json", "--crop", 64, "--steps", 0]
    assert run_script(monkeypatch, *prune, "--out", out / "cut.pt") == 0
    plan = json.loads((out / "plan.json").read_text())
    _, meta = load_checkpoint(out / "cut.pt")
    J_cut = meta["metrics"]["plan"]["J_cut"]
    assert J_cut["folded"] == pytest.approx(np.exp(np.log(plan["J_folded"]).mean()))


def test_pruning_with_images_smaller_than_the_searchs_crops_is_refused(
    tmp_path, monkeypatch, capsys
):
    for side in (64, 128):
        (tmp_path / f"{side}").mkdir()
        for seed in range(4):
            image = Image.fromarray(dead_leaves(seed, side))
            image.save(tmp_path / f"{side}" / f"{seed}.png")
    codec, plan = ["--checkpoint", GOLDEN / "codec.pt"], tmp_path / "plan.json"
    search = [*codec, "--data", tmp_path / "128", "--crop", 128, "--method", "uniform"]
    assert run_script(monkeypatch, "search.py", *search, "--delta", 0.5, "--out", plan) == 0
    prune = [*codec, "--data", tmp_path / "64", "--crop", 64, "--steps", 0, "--plan", plan]
    assert run_script(monkeypatch, "prune.py", *prune, "--out", tmp_path / "cut.pt") == 2
    assert "no training image holds the plan's crops of 128" in capsys.readouterr().err


def test_the_next_command_holds_out_the_same_images(tmp_path, photos, monkeypatch, capsys):
    images = ["--data", photos, "--validation", photos]
    training = ["--steps", 1, "--batch", 1, "--crop", 64, "--out", tmp_path / "dense.pt"]
    assert run_script(monkeypatch, "train.py", *images, *training) == 0
    following = capsys.readouterr().out.splitlines()[-1]
    assert f"search.py --checkpoint {tmp_path}/dense.pt --data {photos}" in following
    assert following.endswith(f"--validation {photos}")
    search = ["--method", "uniform", "--crops", 1, "--crop", 64, "--delta", 0.5]
    search += ["--checkpoint", tmp_path / "dense.pt", "--out", tmp_path / "plan.json"]
    assert run_script(monkeypatch, "search.py", *images, *search) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--validation {photos}")


def test_the_next_command_can_be_pasted(tmp_path, photos, monkeypatch, capsys):
    folder = shutil.copytree(photos, tmp_path / "my photos")
    (folder / "broken.png").write_bytes(b"no picture")
    out, plan = tmp_path / "my runs" / "dense.pt", tmp_path / "my plan.json"
    images = ["--data", folder, "--skip-bad", "--cache", tmp_path / "my cache"]
    training = ["--steps", 1, "--batch", 1, "--crop", 64, "--out", out]
    assert run_script(monkeypatch, "train.py", *images, *training) == 0
    following = shlex.split(capsys.readouterr().out.splitlines()[-1].split("next: python ")[1])
    assert following[0] == "search.py" and "--skip-bad" in following
    more = ["--method", "uniform", "--crops", 1, "--crop", 64, "--delta", 0.5, "--out", plan]
    assert run_script(monkeypatch, *following, *more) == 0
    text = capsys.readouterr().out
    assert "decoding 1 images" in text  # the broken one alone is tried again
    following = shlex.split(text.splitlines()[-1].split("next: python ")[1])
    assert following[0] == "prune.py" and following[following.index("--plan") + 1] == str(plan)


def test_an_evolution_that_is_stopped_leaves_the_plan_it_began_with(
    pipeline, photos, monkeypatch, capsys
):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lic.shrink.search.evolve", stopped)
    out = pipeline / "stopped.json"
    arguments = ["--checkpoint", pipeline / "dense.pt", "--data", photos, "--crop", 64]
    arguments += ["--crops", 2, "--target", 0.4, "--delta", 0.1, "--method", "evolve"]
    arguments += ["--sensitivities", pipeline / "plan.json", "--out", out]
    assert run_script(monkeypatch, "search.py", *arguments) == 130
    plan = load_plan(out)
    assert plan["method"] == "greedy"
    assert plan["sensitivity"] == load_plan(pipeline / "plan.json")["sensitivity"]


@pytest.mark.parametrize("method", ["threshold", "greedy", "evolve", "uniform"])
def test_untouched_groups_are_not_narrowed(method, pipeline, photos, monkeypatch):
    out = pipeline / f"untouched_{method}.json"
    arguments = ["--checkpoint", pipeline / "dense.pt", "--data", photos, "--crop", 64]
    arguments += ["--crops", 2, "--target", 0.4, "--delta", 0.1, "--method", method]
    arguments += ["--sensitivities", pipeline / "plan.json", "--tries", 5, "--out", out]
    assert run_script(monkeypatch, "search.py", *arguments, "--untouched", "y", "g_s.2") == 0
    plan, before = load_plan(out), load_plan(pipeline / "plan.json")
    full = {group: max(map(int, row)) for group, row in before["sensitivity"].items()}
    assert plan["widths"]["y"] == full["y"] and plan["widths"]["g_s.2"] == full["g_s.2"]
    assert plan["sparsity"]["both"] > 0.3
    assert plan["untouched"] == ["y", "g_s.2"]
    if method != "uniform":  # all are measured, and in the plan
        assert plan["sensitivity"] == before["sensitivity"]


def test_a_search_needs_a_group_to_narrow(pipeline, photos, monkeypatch, capsys):
    arguments = ["--checkpoint", pipeline / "dense.pt", "--data", photos, "--crop", 64]
    arguments += ["--crops", 2, "--out", pipeline / "none.json", "--untouched"]
    assert run_script(monkeypatch, "search.py", *arguments, *groups()) == 2
    assert "nothing is left to narrow" in capsys.readouterr().err
    arguments += [group for group in groups() if group != "g_s.3"]  # one
    arguments += ["--sensitivities", pipeline / "plan.json", "--method", "evolve", "--tries", 3]
    arguments += ["--target", 0.1, "--delta", 0.1]
    assert run_script(monkeypatch, "search.py", *arguments) == 0


def test_a_quantized_checkpoint_is_not_pruned_again(pipeline, photos, monkeypatch, capsys):
    for script in ("search.py", "prune.py", "quantize.py"):
        assert (
            run_script(
                monkeypatch,
                script,
                "--checkpoint",
                pipeline / "quantized.pt",
                "--out",
                pipeline / ("x.json" if script == "search.py" else "x.pt"),
            )
            == 2
        )
        assert "stage 'quantize'" in capsys.readouterr().err


def test_a_target_that_no_plan_reaches_is_refused(pipeline, photos, monkeypatch, capsys):
    status = run_script(
        monkeypatch,
        "search.py",
        "--checkpoint",
        pipeline / "dense.pt",
        "--data",
        photos,
        "--crop",
        64,
        "--method",
        "uniform",
        "--target",
        0.99,
        "--out",
        pipeline / "no.json",
    )
    assert status == 2 and "no plan removes 99.0%" in capsys.readouterr().err
    assert not (pipeline / "no.json").exists()


def test_what_was_measured_outlives_a_target_that_was_missed(pipeline, photos, monkeypatch, capsys):
    search = [
        "search.py",
        "--checkpoint",
        pipeline / "dense.pt",
        "--data",
        photos,
        "--crop",
        64,
        "--crops",
        2,
        "--delta",
        0.001,
    ]
    out = pipeline / "missed.json"
    assert (
        run_script(
            monkeypatch,
            *search,
            "--target",
            0.99,
            "--sensitivities",
            pipeline / "plan.json",
            "--out",
            out,
        )
        == 2
    )
    assert f"--sensitivities {out}.nearest saves" in capsys.readouterr().err and not out.exists()
    nearest, first = load_plan(f"{out}.nearest"), load_plan(pipeline / "plan.json")
    assert (
        nearest["sensitivity"] == first["sensitivity"]
        and nearest["sparsity"]["params"] > first["sparsity"]["params"]
    )


@pytest.mark.parametrize("key", ["lambdas", "alpha", "sensitivity", "widths"])
def test_a_plan_in_which_something_is_missing_is_refused(key, pipeline):
    plan = json.loads((pipeline / "plan.json").read_text())
    del plan[key]
    (pipeline / "lacks.json").write_text(json.dumps(plan))
    with pytest.raises(LicError, match="is not a plan"):
        load_plan(pipeline / "lacks.json")


def test_evolution_starts_from_the_greedy_plan_of_given_sensitivities(
    pipeline, photos, monkeypatch, capsys
):
    search = ["--checkpoint", pipeline / "dense.pt", "--data", photos, "--crop", 64, "--crops", 2]
    search += ["--target", 0.4, "--delta", 0.1, "--sensitivities", pipeline / "plan.json"]
    plans = {}
    for method in ("greedy", "evolve"):
        out = pipeline / f"{method}.json"
        arguments = [*search, "--method", method, "--tries", 3]
        assert run_script(monkeypatch, "search.py", *arguments, "--out", out) == 0
        plans[method] = json.loads(out.read_text())
    first, plan = plans["greedy"], plans["evolve"]
    assert (first["method"], plan["method"]) == ("greedy", "evolve")
    measured = json.loads((pipeline / "plan.json").read_text())["sensitivity"]
    assert plan["sensitivity"] == first["sensitivity"] == measured
    assert plan["sparsity"]["params"] >= first["sparsity"]["params"]
    rise = [np.mean(np.divide(p["J_folded"], p["J"])) for p in (first, plan)]
    assert rise[1] <= rise[0] + 1e-6
    capsys.readouterr()
    for change, refusal in (
        (["--importance", "l1"], "measured with --importance residual, not l1"),
        (["--amp"], "measured with --amp False, not True"),
        (["--crops", 1], "measured with --crops 2, not 1"),
        (["--data", photos / "sub"], "measured on other images"),
    ):
        again = [*search, *change, "--out", pipeline / "no.json"]
        assert run_script(monkeypatch, "search.py", *again) == 2
        assert refusal in capsys.readouterr().err and not (pipeline / "no.json").exists()


def test_the_widths_of_a_plan_can_be_trained_from_scratch(pipeline, photos, monkeypatch):
    arguments = [
        "--plan",
        pipeline / "plan.json",
        "--data",
        photos,
        *TRAIN,
        "--steps",
        1,
        "--out",
        pipeline / "scratch.pt",
    ]
    assert run_script(monkeypatch, "train.py", *arguments) == 0
    assert (
        load_checkpoint(pipeline / "scratch.pt")[0].config
        == load_checkpoint(pipeline / "pruned.pt")[0].config
    )


def test_training_goes_on_from_a_checkpoint(pipeline, photos, monkeypatch, capsys):
    arguments = [
        "--checkpoint",
        pipeline / "dense.pt",
        "--data",
        photos,
        *TRAIN,
        "--out",
        pipeline / "longer.pt",
    ]
    assert run_script(monkeypatch, "train.py", *arguments, "--steps", 0) == 0
    base, longer = (load_checkpoint(pipeline / name)[1] for name in ("dense.pt", "longer.pt"))
    assert longer["fingerprint"] == base["fingerprint"]
    assert [entry["parent"] for entry in longer["lineage"]] == [None, base["fingerprint"]]
    assert run_script(monkeypatch, "train.py", *arguments, "--steps", 1) == 2
    assert run_script(monkeypatch, "train.py", *arguments, "--steps", 1, "--overwrite") == 0
    assert load_checkpoint(pipeline / "longer.pt")[1]["fingerprint"] != base["fingerprint"]
    again = [
        "--checkpoint",
        pipeline / "pruned.pt",
        "--data",
        photos,
        *TRAIN,
        "--steps",
        1,
        "--out",
        pipeline / "narrow.pt",
    ]
    assert run_script(monkeypatch, "train.py", *again) == 0
    (_, narrow), (_, pruned) = (
        load_checkpoint(pipeline / "narrow.pt"),
        load_checkpoint(pipeline / "pruned.pt"),
    )
    assert (
        narrow["stage"] == "prune"
        and narrow["config"] == pruned["config"]
        and narrow["fingerprint"] != pruned["fingerprint"]
    )
    capsys.readouterr()
    assert run_script(monkeypatch, "train.py", *arguments, "--lambdas", 0.1) == 2
    assert "brings its own" in capsys.readouterr().err


def test_the_ablation_has_a_row_a_layer_and_begins_at_zero(pipeline, photos, monkeypatch, capsys):
    arguments = [
        "--photos",
        photos,
        "--crop",
        64,
        "--calibration",
        2,
        "--float",
        pipeline / "pruned.pt",
        "--quantized",
        pipeline / "quantized.pt",
    ]
    assert run_script(monkeypatch, "tools/ablation.py", *arguments) == 0
    text = capsys.readouterr().out
    rows = [
        line.split()[0]
        for line in text.splitlines()
        if line[:4] in ("g_a.", "h_a.", "h_s.", "g_s.")
    ]
    assert rows == list(input_ranges())
    assert text.count("\ninput of ") == 9 and "\nall inputs float" in text
    assert run_script(monkeypatch, "tools/ablation.py", *arguments, "--data", photos) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and (
        lines[1].endswith("+0.00 %") or "does not rise" in lines[1]
    )  # 20 steps may give no curve


def test_the_control_has_its_own_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune.py", "--control"])
    assert prune.parse_args().out == "runs/control.pt"
    monkeypatch.setattr(sys, "argv", ["prune.py", "--control", "--out", "a.pt"])
    assert prune.parse_args().out == "a.pt"
    monkeypatch.setattr(sys, "argv", ["prune.py"])
    assert prune.parse_args().out == "runs/pruned.pt"


def test_a_flat_picture_is_evaluated_and_gives_valid_json(pipeline, tmp_path, monkeypatch, capsys):
    # JPEG keeps it exactly: its PSNR is infinite
    Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "grey.png")
    Image.fromarray(dead_leaves(1, 64)).save(tmp_path / "leaves.png")
    output = pipeline / "flat.json"
    arguments = [pipeline / "dense.pt", "--data", tmp_path, "--json", output]
    assert run_script(monkeypatch, "evaluate.py", *arguments) == 0
    result = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert {"jpeg", "webp", "avif"} == result["classical"].keys()
    text = capsys.readouterr().out
    assert "grey.png is one colour" in text and "not comparable: jpeg" not in text


def test_each_bd_rate_is_by_its_own_figures(tmp_path, monkeypatch, capsys):
    """Half the bytes at equal PSNR; MS-SSIM is 3 dB better there, so a quarter at equal MS-SSIM."""

    def measured(path, images, amp, effort, *_):
        better = path.endswith("quantized.pt")
        levels = []
        for k in range(4):
            dB = 10 + 3 * k + 3 * better
            row = {"lmbda": k, "bpp": 2.0 ** (k - better), "psnr": 30.0 + 3 * k}
            row |= {"ms_ssim": 1 - 10 ** (-dB / 10), "encode_seconds": 1.0, "decode_seconds": 1.0}
            levels.append(row)
        result = {"path": path, "stage": "train", "effort": effort, "parameters": 1, "bytes": 1}
        result |= {"kmac_per_pixel": {"encoder": 1.0, "decoder": 1.0}, "channels": {}}
        return result | {"levels": levels}

    monkeypatch.setattr("lic.measure.measure_checkpoint", measured)
    monkeypatch.setattr("lic.measure.measure_classical", lambda *_: {})
    out, codecs = tmp_path / "e.json", [GOLDEN / "codec.pt", GOLDEN / "quantized.pt"]
    assert run_script(monkeypatch, "evaluate.py", *codecs, "--json", out) == 0
    _, second = json.loads(out.read_text())["checkpoints"]
    assert second["bd_rate_percent"] == pytest.approx(-50)
    assert second["ms_ssim_bd_rate_percent"] == pytest.approx(-75)
    by_psnr, by_ms_ssim = capsys.readouterr().out.split("\nMS-SSIM BD-rate of each")
    assert "-50.00 %" in by_psnr and "-75.00 %" in by_ms_ssim and "-75.00 %" not in by_psnr


def test_the_ideal_rate_of_a_large_picture_is_found_as_that_of_a_small_one(monkeypatch):
    coder, image = load_coder(GOLDEN / "codec.pt"), read_image(GOLDEN / "leaves.png")
    whole = ideal_bits(coder, image, 1)
    monkeypatch.setattr("lic.measure.WHOLE", 0)
    for one, other in zip(whole, ideal_bits(coder, image, 1)):
        assert one.shape == other.shape and other.sum() == pytest.approx(one.sum(), rel=0.01)


def test_checkpoints_of_the_same_name_are_told_apart(capsys):
    curve = [(0.1 * 2**k, 30.0 + k) for k in range(4)]
    evaluate.show_bd_rates({"a/dense.pt": curve, "runs/of/some/other/dense.pt": curve}, {})
    lines = capsys.readouterr().out.splitlines()[2:]
    assert lines[0].split() == ["a/dense.pt", "runs/of/some/other/dense.pt"]
    assert len({len(line) for line in lines}) == 1  # columns below their names
    evaluate.show_bd_rates({"a/dense.pt": curve, "a/pruned.pt": curve}, {})
    assert capsys.readouterr().out.splitlines()[2].split() == ["dense.pt", "pruned.pt"]


def test_classical_codecs_that_cannot_write_an_image_are_left_out(capsys):
    assert measure_classical([np.zeros((1, 70_000, 3), np.uint8)]) == {}
    assert capsys.readouterr().out.count("left out") == 3


def test_an_image_beyond_the_limit_is_named_before_anything_is_measured(
    pipeline, tmp_path, monkeypatch, capsys
):
    Image.new("L", (2**20, 1)).save(tmp_path / "long.png")  # 64 times as many when padded
    assert run_script(monkeypatch, "evaluate.py", pipeline / "dense.pt", "--data", tmp_path) == 2
    error = capsys.readouterr()
    assert "long.png" in error.err and error.out == ""


def test_only_what_training_held_out(pipeline, photos, monkeypatch, capsys):
    assert (
        run_script(
            monkeypatch, "evaluate.py", pipeline / "dense.pt", "--data", photos, "--held-out"
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("images: 1,")


def test_a_held_out_image_that_is_too_large_is_left_out(pipeline, photos, monkeypatch, capsys):
    monkeypatch.setattr("lic.files.MAX_PIXELS", 64 * 64 - 1)
    arguments = [pipeline / "dense.pt", "--data", photos, "--held-out"]
    assert run_script(monkeypatch, "evaluate.py", *arguments) == 2
    out, err = capsys.readouterr()
    assert out.count("left out, if held out") == 4
    assert "none of the images that are held out can be used" in err


def test_plot_without_matplotlib_is_a_sentence(pipeline, photos, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status = run_script(
        monkeypatch,
        "evaluate.py",
        pipeline / "dense.pt",
        "--data",
        photos,
        "--plot",
        pipeline / "p.png",
    )
    assert status == 2 and "needs matplotlib" in capsys.readouterr().err


def test_command_line_there_and_back(pipeline, photos, monkeypatch, capsys):
    stream, image = pipeline / "photo.lic", pipeline / "photo.png"
    checkpoint = ["--checkpoint", pipeline / "quantized.pt"]

    def run(*arguments, status=0):
        capsys.readouterr()
        assert run_script(monkeypatch, "lic/__main__.py", *arguments) == status
        return "".join(capsys.readouterr())

    run_stage("lic", "compress", photos / "0.png", stream, *checkpoint, "--quality", 2.5)
    assert "64x64 pixels, quality 2.5" in run("info", stream)
    run("decompress", stream, image, *checkpoint)
    assert Image.open(image).size == (64, 64) and read_image(image).std() > 1
    image.unlink()
    error = run("decompress", stream, image, "--checkpoint", pipeline / "dense.pt", status=1)
    assert "made by model" in error and error.count("\n") == 1 and not image.exists()
    stream.write_bytes(stream.read_bytes()[:-1])
    error = run("decompress", stream, image, *checkpoint, status=1)
    assert str(stream) in error and error.count("\n") == 1 and not image.exists()
    before = (photos / "1.png").read_bytes()
    error = run("compress", photos / "0.png", photos / "1.png", *checkpoint, status=2)
    assert "end the name in .lic" in error and (photos / "1.png").read_bytes() == before
    new = pipeline / "new.lic"
    error = run("compress", photos / "0.png", new, *checkpoint, "--quality", 4, status=2)
    assert "between 0 and 3" in error


def states_of(path):
    state = read_state(path, "")
    tensors = {f"model.{k}": v for k, v in state["model"].items()}
    tensors |= {f"momentum.{index}": v for index, v in enumerate(state["optimizer"]["momentum"])}
    for index, slots in state["optimizer"]["adam"]["state"].items():
        tensors |= {f"adam.{index}.{k}": v for k, v in slots.items()}
    return state["step"], tensors


@pytest.fixture(scope="module")
def never_stopped(photos, tmp_path_factory):
    """Arguments of a run of 60 steps, and the checkpoint that it wrote."""
    arguments = ["--data", photos, *TRAIN, "--steps", 60, "--save-every", 4]
    out = tmp_path_factory.mktemp("never_stopped") / "straight.pt"
    run_stage("train.py", *arguments, "--out", out)
    return arguments, out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_never_stopped_to_the_last_bit(tmp_path, never_stopped, how):
    arguments, straight = never_stopped
    broken = tmp_path / "broken.pt"
    with subprocess.Popen(
        command("train.py", *arguments, "--out", broken),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert any("saved" in line for line in process.stdout)
        process.send_signal(how)
        process.stdout.read()
    step, _ = states_of(f"{broken}.state")
    assert 0 < step < 60 and not broken.exists()
    run_stage("train.py", *arguments, "--out", broken, "--resume")
    (_, a), (_, b) = states_of(f"{straight}.state"), states_of(f"{broken}.state")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert load_checkpoint(straight)[1]["fingerprint"] == load_checkpoint(broken)[1]["fingerprint"]


def test_resuming_with_other_settings_is_refused(tmp_path, photos, pipeline):
    (tmp_path / "x.pt.state").write_bytes((pipeline / "dense.pt.state").read_bytes())
    error = run_stage(
        "train.py",
        "--data",
        photos,
        *TRAIN,
        "--steps",
        30,
        "--out",
        tmp_path / "x.pt",
        "--resume",
        status=2,
    )
    assert "is at step 20 of 20" in error


def test_a_state_that_is_a_checkpoint_is_refused(pipeline):
    model = Codec(preset_config("tiny")).to(memory_format=torch.channels_last)
    with pytest.raises(LicError, match="holds no training state"):
        load_state(pipeline / "dense.pt", model, Optimizer(model), {"steps": 1})


def test_training_stops_with_a_sentence_when_the_loss_is_not_finite(tmp_path, photos):
    error = run_stage(
        "train.py",
        "--data",
        photos,
        *TRAIN,
        "--steps",
        60,
        "--lr",
        "1e30",
        "--out",
        tmp_path / "x.pt",
        status=2,
    )
    assert "smaller --lr" in error and not (tmp_path / "x.pt").exists()


FLAGS = {
    "amp",
    "compile,",  # and --no-compile
    "resume",
    "control",
    "held-out",
    "record",
    "published",
    "json",
    "plot",
    "synthetic",
    "overwrite",
    "finish",
}  # off unless given


@pytest.mark.parametrize(
    "script", ["train.py", "search.py", "prune.py", "quantize.py", "evaluate.py"]
)
def test_help_tells_every_default(script, monkeypatch, capsys):
    assert run_script(monkeypatch, script, "--help") == 0
    text = capsys.readouterr().out
    text = " ".join(text[text.index("options:") :].split())
    for option in text.split(" --")[2:]:  # the first is --help's
        assert "default" in option or option.split()[0] in FLAGS, option
