"""The answers in docs/exercises/ apply to the code as it is, can be undone and do what they say."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, lively_codec, run_script
from PIL import Image

from lic.codec.checkpoint import save_checkpoint
from lic.codec.model import Codec, preset_config
from lic.codec.tables import build_tables

EXERCISES = ROOT / "docs" / "exercises"
TRAIN = ["train.py", "--crop", "64", "--batch", "2", "--steps", "3", "--out", "dense.pt"]
PARAMETERS = 444_683  # of the preset tiny, unchanged
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git applies the answers")


def run(folder, *command):
    """What a command prints, run in a folder that belongs to no repository."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_code(folder):
    shutil.copytree(ROOT / "lic", folder / "lic", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    shutil.copytree(EXERCISES, folder / "docs" / "exercises")


def sources(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.py")}


def trained(folder, photos, *answers):
    """Apply the answers to a copy of the code and train: what train.py printed, and the weights."""
    copy_of_the_code(folder)
    run(folder, "git", "apply", *(EXERCISES / f"{name}.diff" for name in answers))
    text = run(folder, sys.executable, *TRAIN, "--data", photos)
    state = torch.load(folder / "dense.pt", weights_only=True)["state_dict"]
    return text, state


def number_of_parameters(text):
    return int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))


def test_every_answer_applies_is_undone_and_stands_on_the_page(tmp_path):
    copy_of_the_code(tmp_path)
    before, page = sources(tmp_path), (EXERCISES / "README.md").read_text(encoding="utf-8")
    answers = sorted(EXERCISES.glob("*.diff"))
    assert len(answers) == 7
    for answer in answers:
        assert f"docs/exercises/{answer.name}" in page, answer.name
        run(tmp_path, "git", "apply", answer)
        assert sources(tmp_path) != before, answer.name
        run(tmp_path, "git", "apply", "-R", answer)
        assert sources(tmp_path) == before, answer.name


def test_without_a_hyperprior_there_are_no_hyper_networks_and_no_bits_of_z(tmp_path, photos):
    text, state = trained(tmp_path, photos, "no_hyperprior", "no_hyperprior_files")
    assert number_of_parameters(text) == 193_027
    assert "bpp_z 0.0000" in text and "bpp_y 0.0000" not in text
    assert {name.split(".")[0] for name in state} == {
        "g_a", "g_s", "prior_y", "log_gain", "log_inverse_gain"
    }  # fmt: skip
    assert sum(tensor.numel() for tensor in state.values()) == 193_027
    for row in run(tmp_path, sys.executable, "docs/exercises/rates.py", "dense.pt").splitlines()[
        1:
    ]:
        _, J, z, y, odd, even, _ = map(float, row.split())
        assert z == 0 and 0 < y < J and odd + even == pytest.approx(y, abs=2e-4)
    # a file has the bits that the prior says and holds the picture that g_s makes
    run(
        tmp_path,
        sys.executable,
        "-c",
        """if True:
        import numpy as np
        import torch
        from lic.codec.bitstream import load_coder, padded
        from lic.images import dead_leaves

        coder, image = load_coder("dense.pt"), dead_leaves(0, 96)[:90, :70]
        for level in range(4):
            with torch.no_grad():
                out = coder.model(padded(image), torch.tensor([float(level)]))
            data = coder.encode(image, level)
            ideal = out.y_bits.sum().item()
            assert ideal < 8 * len(data) < 1.05 * ideal + 8 * 47 + 64, (ideal, len(data))
            expected = out.x_hat[0, :, :90, :70].permute(1, 2, 0).clamp(0, 1) * 255
            assert np.abs(coder.decode(data) - expected.numpy()).max() < 0.6
        """,
    )


def test_zero_means_leaves_the_means_of_h_s_untrained(tmp_path, photos):
    text, state = trained(tmp_path, photos, "zero_means")
    assert number_of_parameters(text) == PARAMETERS
    torch.manual_seed(0)
    start = Codec(preset_config("tiny")).state_dict()
    for name in ("h_s.conv3.weight", "h_s.conv3.bias"):
        means, scales = (state[name] - start[name]).chunk(2)
        assert (means == 0).all() and (scales != 0).any(), name


def test_with_leaky_relu_no_gdn_is_left(tmp_path, photos):
    text, state = trained(tmp_path, photos, "relu")
    assert number_of_parameters(text) == PARAMETERS - 6 * (32 * 32 + 32)
    assert not [name for name in state if "gdn" in name]
    assert sum(tensor.numel() for tensor in state.values()) == number_of_parameters(text)


def test_straight_through_training_counts_the_rate_without_noise(tmp_path, photos):
    text, _ = trained(tmp_path, photos, "straight_through")
    assert number_of_parameters(text) == PARAMETERS
    run(
        tmp_path,
        sys.executable,
        "-c",
        """if True:
        import torch
        from lic.codec.checkpoint import load_checkpoint

        model, _ = load_checkpoint("dense.pt")
        x, level = torch.rand(1, 3, 64, 64), torch.tensor([1.0])
        evaluated, once, again = model(x, level), model.train()(x, level), model(x, level)
        for rate in (1, 2):  # of y and of z
            assert torch.equal(once[rate], again[rate])
            torch.testing.assert_close(once[rate], evaluated[rate])
        once.y_bits.sum().backward()
        assert model.g_a.conv1.weight.grad.abs().sum() > 0
        """,
    )


def test_the_context_is_of_anchors_and_for_the_others(tmp_path, photos):
    text, state = trained(tmp_path, photos, "checkerboard")
    added = 30 * 48**2 + 6 * 48
    assert number_of_parameters(text) == PARAMETERS + added
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS + added
    run(
        tmp_path,
        sys.executable,
        "-c",
        """if True:
        import torch
        from lic.codec.checkpoint import load_checkpoint

        model, _ = load_checkpoint("dense.pt")
        seen, bits = {}, model.prior_y.bits

        def counted(y, mean, log_scale):
            seen["y"], seen["mean"] = y, mean
            return bits(y, mean, log_scale)

        model.prior_y.bits = counted
        model.h_s.register_forward_hook(lambda _, v, out: seen.update(h_s=out.chunk(2, 1)[0]))
        model.context.register_forward_hook(lambda _, v, out: seen.update(context=v[0]))
        with torch.no_grad():
            model(torch.rand(1, 3, 128, 128), torch.tensor([1.0]))
        others = torch.tensor([[True, False], [False, True]]).repeat(4, 4)
        anchors = ~others
        assert (seen["context"][..., others] == 0).all()
        assert torch.equal(seen["context"][..., anchors], seen["y"][..., anchors])
        assert torch.equal(seen["mean"][..., anchors], seen["h_s"][..., anchors])
        assert (seen["mean"][..., others] != seen["h_s"][..., others]).all()
        """,
    )


def test_a_linear_context_saves_what_neighbours_know(tmp_path, monkeypatch, capsys):
    """Of a codec whose y are smooth, and whose h_s says nothing of them, a lot."""
    model = lively_codec()
    with torch.no_grad():
        for parameter in model.h_s.parameters():
            parameter.zero_()
    checkpoint, photos = tmp_path / "smooth.pt", tmp_path / "photos"
    save_checkpoint(checkpoint, model, build_tables(model), "train", {}, 0)
    photos.mkdir()
    ramp = np.linspace(0, 255, 256)[:, None, None]
    for number, colour in enumerate(((1, 0.5, 0.2), (0.3, 1, 0.6), (0.7, 0.1, 1), (0.4, 0.4, 0.9))):
        smooth = np.broadcast_to(ramp * colour, (256, 256, 3)).astype(np.uint8)
        Image.fromarray(smooth).save(photos / f"{number}.png")
    assert run_script(monkeypatch, "docs/exercises/linear_context.py", checkpoint, photos) == 0
    saved = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(saved) == len(model.lambdas)
    assert all(float(share.rstrip("%")) > 10 for share in saved)


def test_without_errors_that_cancel_each_weight_takes_its_nearest_integer(tmp_path):
    copy_of_the_code(tmp_path)
    program = """if True:
        import torch
        from lic.shrink.rounding import round_rows
        W, x = 5 * torch.randn(3, 8), torch.randn(100, 2) @ torch.randn(2, 8)
        print(torch.equal(round_rows(W, x.T @ x), W.round()))"""
    assert run(tmp_path, sys.executable, "-c", program) == "False\n"
    run(tmp_path, "git", "apply", EXERCISES / "nearest.diff")
    assert run(tmp_path, sys.executable, "-c", program) == "True\n"
