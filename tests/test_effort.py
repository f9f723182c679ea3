"""The encoder that searches: never worse, only its own latents, and nothing new to decode."""

import json
import re

import numpy as np
import pytest
import torch
from golden.make import FOLDER
from helpers import lively_codec, photo_like, quantized_codec, run_script
from PIL import Image

import lic
from lic import measure
from lic.codec.bitstream import ImageCoder
from lic.codec.entropy import soft_limit
from lic.codec.gradients import round_ste
from lic.codec.tables import build_tables
from lic.files import LicError
from lic.images import dead_leaves
from lic.metrics import squared_error
from lic.train import effort, tiles
from lic.train.effort import annealed, lmbda_of, search, temperature
from lic.train.tiles import Window, tiles_of

SIZES = [(1, 1), (40, 70), (65, 128), (128, 192)]


@pytest.fixture(scope="module", params=["float", "quantized"])
def coder(request):
    model = lively_codec() if request.param == "float" else quantized_codec()
    return ImageCoder(model, build_tables(model), "00112233445566778899")


def picture(height, width):
    pixels = photo_like()[0, :, :height, :width].permute(1, 2, 0)
    return (255 * pixels).round().to(torch.uint8).numpy()


def loss(coder, image, data, level):
    bpp = 8 * len(data) / (image.shape[0] * image.shape[1])
    return bpp + lmbda_of(coder.model, level) * squared_error(image, coder.decode(data))


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("quality", [0, 1.5, 3])
def test_effort_never_makes_a_file_worse(coder, height, width, quality):
    image = picture(height, width)
    plain = coder.encode(image, quality)
    searched = effort.encode(coder, image, quality, effort=3)
    assert coder.decode(searched).shape == image.shape
    assert loss(coder, image, searched, quality) <= loss(coder, image, plain, quality)


def test_where_the_search_finds_nothing_better_the_plain_file_stays(coder, monkeypatch):
    def worse(coder, image, y, *others):
        return y + 3

    monkeypatch.setattr(effort, "search", worse)
    image = picture(64, 64)
    assert effort.encode(coder, image, 1) == coder.encode(image, 1)


def test_effort_gains_and_more_effort_gains_more():
    """Of the codec that is shipped, on a photograph."""
    codec, image = lic.load(), np.asarray(lic.images.read_image(FOLDER / "leaves.png"))[:128, :128]
    losses = [loss(codec, image, lic.encode(codec, image, 2, steps), 2) for steps in (0, 10, 60)]
    assert losses[1] < 0.995 * losses[0] and losses[2] < 0.99 * losses[1]


def test_the_search_is_the_same_every_time_and_leaves_the_codec_as_it_was(coder):
    image, before = picture(64, 64), coder.encode(picture(64, 64), 1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = effort.encode(coder, image, 1, effort=2)
    assert torch.rand(1) == expected  # nobody else's noise is used up
    assert effort.encode(coder, image, 1, effort=2) == first
    assert coder.encode(image, 1) == before
    assert all(parameter.requires_grad for parameter in coder.model.g_s.parameters())


@pytest.mark.parametrize("tau", [0.5, 0.2])
def test_a_latent_goes_up_as_often_as_the_formula_says(tau):
    v = torch.full((100_000,), -2.7)  # 0.3 above -3
    share = (annealed(v, tau, torch.Generator().manual_seed(0)) > -2.5).double().mean().item()
    expected = 0.3 ** (1 / tau) / (0.3 ** (1 / tau) + 0.7 ** (1 / tau))
    assert abs(share - expected) < 0.005


def test_an_integer_stays_and_the_gradient_is_that_of_the_formula():
    noise = torch.Generator().manual_seed(0)
    integers = torch.arange(-3.0, 4)
    assert (annealed(integers, 0.5, noise) - integers).abs().max() < 0.01
    v = torch.tensor([0.4, -1.3], dtype=torch.float64, requires_grad=True)

    def seeded(v):
        return annealed(v, 0.5, torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(seeded, v)


def test_tau_is_held_and_then_falls():
    taus = [temperature(step / 100) for step in range(100)]
    assert taus[:36] == [0.5] * 36
    assert all(later < earlier for earlier, later in zip(taus[35:], taus[36:]))
    assert taus[-1] == pytest.approx(0.5 * np.exp(-2 * 0.64))


@pytest.mark.parametrize("rows, columns", [(4, 4), (48, 52), (188, 252), (4, 400)])
def test_tiles_cover_every_position_once(rows, columns):
    met = torch.zeros(rows, columns, dtype=torch.int)
    for tile in tiles_of(rows, columns):
        tile.of(met).add_(1)
        assert max(tile.bottom - tile.top, tile.right - tile.left) <= tiles.TILE
    assert (met == 1).all()


def test_a_window_keeps_its_place():
    grid = torch.arange(8 * 10).reshape(8, 10)
    tile = Window(2, 4, 7, 9)
    wide = tile.wider(3, 8, 10)
    assert wide == (0, 7, 4, 10)
    assert torch.equal(tile.inside(wide).of(wide.of(grid)), tile.of(grid))
    image = np.arange(32 * 40 * 3).reshape(32, 40, 3)
    assert np.array_equal(tile.pixels_of(image, 4), image[8:16, 28:36])


def test_a_tile_changes_its_own_latents_and_no_others(coder, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4)
    tile = tiles_of(8, 12)[1]
    monkeypatch.setattr(effort, "tiles_of", lambda rows, columns: [tile])
    image = picture(128, 192)
    y, z = coder.latents(image, 1.0)
    new_y = search(coder, image, y, z, 1.0, 0.01, steps=1)
    changed = ((new_y - y).abs() > 1e-3).any(1)[0]  # but for the last bits of y - mean + mean
    assert changed[:4, 4:8].all() and changed.sum() == 16


def test_tiles_find_what_the_whole_picture_finds(monkeypatch):
    """A first step moves a latent by the sign of its gradient: a tile must see the same gradient
    of the distortion as the whole picture."""
    model = lively_codec()
    coder = ImageCoder(model, build_tables(model), "00112233445566778899")
    image = picture(128, 192)
    y, z = coder.latents(image, 1.0)
    monkeypatch.setattr(effort, "annealed", lambda v, tau, noise: round_ste(v))  # as the margins
    whole_y = search(coder, image, y, z, 1.0, 100.0, steps=1)
    monkeypatch.setattr(tiles, "TILE", 4)
    tiles_y = search(coder, image, y, z, 1.0, 100.0, steps=1)
    agree = (torch.sign(tiles_y - y) == torch.sign(whole_y - y)).double().mean()
    assert agree > 0.99


def test_between_two_levels_lambda_is_their_geometric_mean(coder):
    lambdas = coder.model.lambdas
    assert lmbda_of(coder.model, 2) == pytest.approx(lambdas[2])
    assert lmbda_of(coder.model, 1.5) == pytest.approx((lambdas[1] * lambdas[2]) ** 0.5)


def test_the_command_says_how_it_goes_and_what_came_of_it(tmp_path, monkeypatch, capsys):
    output = tmp_path / "a.lic"
    command = ["lic/__main__.py", "compress", FOLDER / "leaves.png", output, "--effort", 2]
    assert run_script(monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    assert "step 2/2  J " in printed and "plain     J " in printed and "searched  J " in printed
    assert lic.load().decode(output.read_bytes()).shape[2] == 3


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(effort, "train_latents", interrupted)
    command = ["lic/__main__.py", "compress", FOLDER / "leaves.png", tmp_path / "a.lic"]
    command += ["--checkpoint", FOLDER / "codec.pt", "--effort", 2]
    assert run_script(monkeypatch, *command) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_an_evaluation_that_stopped_goes_on_from_its_record(tmp_path, monkeypatch):
    checkpoint, record, photos = FOLDER / "quantized.pt", tmp_path / "r.json", tmp_path / "photos"
    photos.mkdir()
    for name in ("leaves.png", "noise.png"):
        (photos / name).write_bytes((FOLDER / name).read_bytes())
    measured = []

    def counted(coder, image, level, effort):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append((level, effort))
        return {"bpp": 1.0 + level + len(measured) / 10, "psnr": 30.0 + level, "ms_ssim": 0.9,
                "encode_seconds": 1.0, "decode_seconds": 1.0}  # fmt: skip

    monkeypatch.setattr(measure, "measure_image", counted)
    command = ["evaluate.py", checkpoint, "--data", photos, "--effort", 0, 1, "--record", record]
    statuses = []
    while not statuses or statuses[-1] == 130:
        measured.clear()
        statuses.append(run_script(monkeypatch, *command))
    assert statuses == [130, 130, 0] and len(measured) == 2
    assert len(json.loads(record.read_text())["measured"]) == 2 * 3 * 2  # images, levels, efforts
    record_bytes = record.read_bytes()
    for other in ("[1]", "{}", '{"curves": {}}', '{"measured": {"a": {"bpp": "x"}}}', "{", "3"):
        record.write_text(other)
        with pytest.raises(LicError, match="no record"):
            measure.Record(record)
        assert record.read_text() == other
    record.write_bytes(record_bytes)
    assert run_script(monkeypatch, *command, "--json", record, "--overwrite") == 2
    assert record.read_bytes() == record_bytes


@pytest.mark.parametrize("wrong", [-1, 1.5, "3", True])
def test_an_effort_that_is_no_number_of_steps_is_refused(coder, wrong):
    with pytest.raises(LicError, match="not a whole number"):
        lic.encode(coder, picture(64, 64), 1, effort=wrong)


def test_an_effort_may_be_any_whole_number(coder):
    image = picture(64, 64)
    assert lic.encode(coder, image, 1, effort=np.int64(2)) == lic.encode(coder, image, 1, effort=2)


def test_the_tool_prints_a_row_a_variant(tmp_path, monkeypatch, capsys):
    Image.fromarray(dead_leaves(0)).save(tmp_path / "a.png")
    command = ["tools/effort.py", "--checkpoint", FOLDER / "quantized.pt", tmp_path]
    names = ["10 steps", "atanh, as in the paper", "SOFTNESS 0.7"]
    both = []
    for precision in ([], ["--amp"]):
        options = ["--levels", 0, 2, "--only", *names, *precision]
        assert run_script(monkeypatch, *command, *options) == 0
        rows = capsys.readouterr().out.splitlines()[2:]
        assert len(rows) == 3
        changes = [float(cell) for row in rows for cell in re.findall(r"([+-][0-9.]+)%", row)]
        assert len(set(changes)) == 6 and max(changes) < 0
        both.append(changes)
    np.testing.assert_allclose(*both, atol=0.5)


def test_the_search_knows_mean_and_scale_as_the_coder_does(coder):
    y, z = coder.latents(picture(64, 64), 1.0)
    mean, log_scale = effort.coded_with(coder, z)
    expected, index = coder.entropy_parameters(z[0].round().int().numpy())
    assert torch.equal(mean, expected.float())
    assert coder.model.prior_y.scale_index(log_scale).flatten().tolist() == index.tolist()


def test_the_search_trains_for_the_lmbda_of_its_level(coder, monkeypatch):
    seen = []

    def spy(model, part, inverse_gain, lmbda, steps, noise, report):
        seen.append((lmbda, steps, part.x.shape[2:]))
        return part.v

    monkeypatch.setattr(effort, "train_latents", spy)
    effort.encode(coder, picture(40, 70), 2, effort=7)
    # of a picture that is padded its own pixels alone
    assert seen == [(pytest.approx(coder.model.lambdas[2]), 7, (40, 70))]


def test_J_of_a_step_is_its_formula(coder):
    """With v drawn to the integers, bits softly limited, and the error of the picture's pixels."""
    model = coder.model
    image, level = picture(64, 64), 1.0
    y, z = coder.latents(image, level)
    mean, log_scale = effort.coded_with(coder, z)
    log_scale = log_scale - 3  # so that some bits are beyond the limit
    own = torch.ones(y.shape[2:], dtype=torch.bool)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    part = effort.Part(x, y - mean, mean, log_scale, own)
    _, inverse_gain = model.gains(torch.tensor([level]))
    seen = []
    noise = torch.Generator().manual_seed(3)
    effort.train_latents(
        model, part, inverse_gain, 0.01, 1, noise, lambda v, **figures: seen.append(figures)
    )
    v_hat = annealed(y - mean, temperature(0), torch.Generator().manual_seed(3))
    with torch.no_grad():
        y_hat = v_hat + mean
        bits = soft_limit(model.prior_y.bits(y_hat, mean, log_scale))
        assert bits.max() > 24
        mse = (model.g_s(y_hat * inverse_gain) + 0.5 - x).square().mean()
        expected = bits.sum() / 64**2 + 0.01 * 255**2 * mse
    assert seen[0]["J"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert seen[0]["bpp_y"].item() == pytest.approx(bits.sum().item() / 64**2, rel=1e-4)
    assert seen[0]["psnr"].item() == pytest.approx(-10 * np.log10(mse.item()), abs=1e-3)
