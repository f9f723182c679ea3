"""Nothing lost, nothing silently wrong: what is read, what is replaced, what goes on."""

import io
import json
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import ROOT, lively_codec, run_script
from PIL import Image, PngImagePlugin, TiffImagePlugin

from lic import files, program
from lic.codec.checkpoint import load_checkpoint, save_checkpoint
from lic.codec.tables import build_tables
from lic.files import LicError, claim_output, release_outputs, write_bytes
from lic.images import (
    Images,
    dead_leaves,
    find_images,
    read_image,
    read_images,
    split,
)
from lic.photographs import load_images
from lic.program import PatientLog
from lic.shrink.plan import KEYS, cut_fingerprint, load_plan, save_plan
from lic.train.stage import held_out_option
from lic.train.state import load_state, read_state, save_state

GOLDEN = ROOT / "tests" / "golden"


# reading pictures


def png(bits, colour_type, rows, width, chunks=()):
    """A PNG written by hand: rows are the bytes of each row, chunks go before the pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += b"".join(chunk(kind, content) for kind, content in chunks)
    return data + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "bits, row, width", [(1, b"\x50", 4), (2, b"\x1b", 4), (4, b"\x05\xaf", 4)]
)
def test_a_transparent_grey_of_few_bits_is_found(bits, row, width, tmp_path):
    """Pillow scales the pixels to 8 bits, not the transparent colour: here the second pixel's."""
    values = np.unpackbits(np.frombuffer(row, np.uint8)).reshape(-1, bits)[:width]
    values = values @ (2 ** np.arange(bits)[::-1])
    key = int(values[1])
    (tmp_path / "a.png").write_bytes(
        png(bits, 0, [row], width, [(b"tRNS", struct.pack(">H", key))])
    )
    expected = np.where(values == key, 255, values * 255 // (2**bits - 1))
    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == expected.tolist()


def test_16_bit_colour_with_a_transparent_colour_is_refused(tmp_path):
    row = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    for key, refused in (((0x1234, 0x5678, 0x9ABC), True), (None, False)):
        chunks = [(b"tRNS", struct.pack(">3H", *key))] if key else []
        (tmp_path / "a.png").write_bytes(png(16, 2, [row], 1, chunks))
        if refused:
            with pytest.raises(LicError, match="a.png.*transparent colour"):
                read_image(tmp_path / "a.png")
        else:
            assert read_image(tmp_path / "a.png").tolist() == [[[0x12, 0x56, 0x9A]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGB", "RGBA", "CMYK"])
def test_tiffs_are_turned_right_in_every_mode(mode, orientation, tmp_path):
    """Given a path, Pillow maps plain TIFFs into memory in the size they have when turned."""
    if mode == "I;16":
        picture = Image.fromarray((np.arange(6, dtype=np.uint16) * 257 * 40).reshape(2, 3))
    else:
        values = (np.arange(6, dtype=np.uint8) * 40).reshape(2, 3)
        picture = Image.fromarray(values).convert("RGB").convert(mode)
    plain, turned = tmp_path / "plain.tif", tmp_path / "turned.tif"
    picture.save(plain)
    picture.save(turned, tiffinfo={274: orientation})
    upright = read_image(plain)
    transposed = upright.transpose(1, 0, 2)
    expected = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: transposed, 6: transposed[:, ::-1], 7: transposed[::-1, ::-1], 8: transposed[::-1],
    }  # fmt: skip
    assert np.array_equal(read_image(turned), expected[orientation])


@pytest.mark.parametrize(
    "tag, kind, value", [(274, 5, (6, 0)), (274, 2, b"six\0"), (282, 2, b"x\0")]
)
def test_metadata_that_make_no_sense_do_not_matter(tag, kind, value, tmp_path):
    """An orientation that is a fraction over 0 or a text, a resolution that is a text."""
    if kind == 2:
        entry = struct.pack("<HHI", tag, 2, len(value)) + value.ljust(4, b"\0")
        extra = b""
    else:
        entry, extra = struct.pack("<HHII", tag, kind, 1, 26), struct.pack("<II", *value)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0) + extra
    image = Image.fromarray(dead_leaves(0, 64)[:32])
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "a.jpg", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "plain.jpg"))


def test_long_texts_do_not_make_a_picture_unreadable(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 2_000_000, zip=True)
    Image.fromarray(dead_leaves(0, 64)).save(tmp_path / "a.png", pnginfo=texts)
    assert np.array_equal(read_image(tmp_path / "a.png"), dead_leaves(0, 64))


def test_what_pillow_does_not_know_is_told_apart_from_what_is_not_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(LicError, match=r"a.heic as an image: .*\(HEIC, raw\); convert it"):
        read_image(tmp_path / "a.heic")
    with pytest.raises(LicError, match="none.png as an image: No such file or directory$"):
        read_image(tmp_path / "none.png")


def test_the_preview_of_a_raw_file_is_not_taken_for_the_picture(tmp_path):
    image = Image.fromarray(dead_leaves(0, 64))
    image.save(tmp_path / "raw.tif", tiffinfo={254: 1})
    with pytest.raises(LicError, match="its first picture is a preview"):
        read_image(tmp_path / "raw.tif")
    odd = TiffImagePlugin.ImageFileDirectory_v2()
    odd.tagtype[254], odd[254] = 12, 0.0  # a float where an integer belongs
    for name, tags in (("plain.tif", {254: 0}), ("odd.tif", odd)):
        image.save(tmp_path / name, tiffinfo=tags)
        assert np.array_equal(read_image(tmp_path / name), np.asarray(image))


def test_the_limit_on_pixels_is_our_own(tmp_path, monkeypatch):
    Image.new("L", (300, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "a.png").shape == (100, 300, 3)
    with pytest.raises(LicError, match="a.png.*300x100 pixels, more than the limit of 29999"):
        read_image(tmp_path / "a.png", 29_999)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("error", [struct.error("x"), TypeError("x"), MemoryError(), KeyError("x")])
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def fail(*_):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(LicError, match="a.png"):
        read_image(tmp_path / "a.png")


# folders, and which photographs are held out


def test_ten_bad_pictures_are_named_in_one_run(tmp_path):
    for k in range(10):
        (tmp_path / f"bad{k}.png").write_bytes(b"no picture")
    with pytest.raises(LicError) as refusal:
        load_images(tmp_path, 64)
    assert all(f"bad{k}.png" in str(refusal.value) for k in range(10))


def test_hidden_folders_are_left_out_links_followed_once_and_the_rest_counted(tmp_path, capsys):
    for name in ("a/1.png", ".ipynb_checkpoints/1-checkpoint.png", ".Trash-0/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "a" / "note.heic").write_bytes(b"")
    (tmp_path / "a" / "back").symlink_to(tmp_path)  # a loop
    (tmp_path / "z").symlink_to(tmp_path / "b")
    found = find_images(tmp_path)
    assert [path.name for path in found] == ["1.png", "3.png"]
    assert f"left out below {tmp_path}: 1 .heic" in capsys.readouterr().out
    with pytest.raises(LicError, match="folder is empty"):
        find_images("")
    with pytest.raises(LicError, match="is not a folder"):
        find_images("x" * 300)


def test_a_photograph_is_on_one_side_for_ever():
    images = [dead_leaves(seed, 64) for seed in range(60)]
    train, validation = split(Images(images))
    assert len(train) + len(validation) == 60 and 1 <= len(validation) <= 12
    held = {image.tobytes() for image in validation}
    for subset in (images[::-1], images[7:], images[1::2] + images[:10]):
        some_train, some_validation = split(Images(subset))
        if any(image.tobytes() in held for image in subset):
            assert all(image.tobytes() in held for image in some_validation)
            assert not any(image.tobytes() in held for image in some_train)


def test_a_folder_of_ones_own_is_held_out(tmp_path):
    for name, seeds in (("train", range(5)), ("held", range(5, 7))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            Image.fromarray(dead_leaves(seed, 64)).save(tmp_path / name / f"{seed}.png")
    train, validation = load_images(tmp_path / "train", 64, tmp_path / "held")
    assert len(train) == 5 and len(validation) == 2
    assert np.array_equal(validation[0], read_images([tmp_path / "held" / "5.png"])[0])


# what may be written


@pytest.fixture(autouse=True)
def no_locks_left():
    yield
    release_outputs()


def test_nothing_is_replaced_that_was_not_asked_for(tmp_path):
    output = tmp_path / "a.pt"
    claim_output(output, ".pt")
    output.write_bytes(b"")
    claim_output(output, ".pt")  # an empty file is nothing
    output.write_bytes(b"finished")
    with pytest.raises(LicError, match="exists.*--overwrite"):
        claim_output(output, ".pt")
    claim_output(output, ".pt", overwrite=True)
    for name, why in (("a.png", "end the name in .pt"), ("folder.pt", "folder or a device")):
        (tmp_path / "folder.pt").mkdir(exist_ok=True)
        with pytest.raises(LicError, match=why):
            claim_output(tmp_path / name, ".pt", overwrite=True)
    with pytest.raises(LicError, match="another file of this command"):
        claim_output(output, ".pt", overwrite=True, inputs=[tmp_path / "." / "a.pt"])


def test_devices_and_pipes_are_left_alone(tmp_path):
    (tmp_path / "null.json").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("null.json", "pipe.json"):
        with pytest.raises(LicError, match="folder or a device"):
            claim_output(tmp_path / name, ".json", overwrite=True)
    assert os.path.islink(tmp_path / "null.json")


def test_a_link_stands_for_what_it_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real.json").write_bytes(b"")
    (tmp_path / "link.json").symlink_to(tmp_path / "deep" / "real.json")
    claim_output(tmp_path / "link.json", ".json")
    write_bytes(tmp_path / "link.json", b"{}")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "deep" / "real.json").read_bytes() == b"{}"


def test_two_runs_do_not_share_an_output(tmp_path):
    program = """if True:
        import sys
        from lic.files import claim_output
        claim_output(sys.argv[1], ".pt")
        print("holds", flush=True)
        sys.stdin.read()"""
    command = [sys.executable, "-c", program, tmp_path / "a.pt"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(LicError, match="another run is writing"):
            claim_output(tmp_path / "a.pt", ".pt")
        other.kill()
        other.wait()
    claim_output(tmp_path / "a.pt", ".pt")  # a killed run holds nothing
    release_outputs()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["lic/__main__.py", "train.py"])
def test_a_finished_result_is_not_replaced(script, tmp_path, monkeypatch, capsys):
    photo, output = tmp_path / "photo.png", tmp_path / "a.lic"
    Image.fromarray(dead_leaves(0, 64)).save(photo)
    if script == "train.py":
        output = tmp_path / "a.pt"
        command = ["--steps", 1, "--batch", 1, "--crop", 64, "--out", output]
    else:
        command = ["compress", photo, output, "--checkpoint", GOLDEN / "codec.pt"]
    assert run_script(monkeypatch, script, *command) == 0
    before = output.read_bytes()
    assert run_script(monkeypatch, script, *command) == 2
    assert "--overwrite" in capsys.readouterr().err and output.read_bytes() == before
    assert run_script(monkeypatch, script, *command, "--overwrite") == 0
    if script != "train.py":  # the help's own example, the original in the place of the copy
        back = ["decompress", output, photo, "--checkpoint", GOLDEN / "codec.pt"]
        assert run_script(monkeypatch, script, *back) == 2
        assert np.array_equal(read_image(photo), dead_leaves(0, 64))


# what is printed


def tiny_training(out):
    arguments = ["--steps", "2", "--batch", "1", "--crop", "64", "--out", str(out)]
    return [sys.executable, "train.py", *arguments]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_log_that_cannot_be_written_costs_no_result(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            tiny_training(tmp_path / "full.pt"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 0 and done.stderr == b""
    assert load_checkpoint(tmp_path / "full.pt")[1]["stage"] == "train"


def test_a_closed_pipe_costs_no_result(tmp_path):
    with subprocess.Popen(
        tiny_training(tmp_path / "a.pt"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0 and process.stderr.read() == b""
    assert load_checkpoint(tmp_path / "a.pt")[1]["stage"] == "train"


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict", "cp1252"])
@pytest.mark.parametrize("name", ["日本", os.fsdecode(b"caf\xe9")])
def test_names_that_the_terminal_cannot_print(encoding, name, tmp_path):
    output = tmp_path / f"{name}.lic"
    command = [sys.executable, "-m", "lic", "compress", GOLDEN / "pixel.png", output]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*command, "--checkpoint", GOLDEN / "codec.pt"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0 and done.stderr == b"" and output.stat().st_size > 47


# what is saved


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_stage_could_use_is_not_saved(value, tmp_path):
    model = lively_codec()
    tables = build_tables(model)
    with pytest.raises(LicError, match="J is not finite"):
        save_checkpoint(tmp_path / "a.pt", model, tables, "train", {}, 0, metrics={"J": [value]})
    with torch.no_grad():
        model.g_s.conv2.bias[0] = value
    with pytest.raises(LicError, match="g_s.conv2.bias is not finite"):
        save_checkpoint(tmp_path / "a.pt", model, tables, "train", {}, 0)
    with pytest.raises(LicError, match="a figure of the plan is not finite"):
        save_plan(tmp_path / "plan.json", {"J": [value]})
    assert list(tmp_path.iterdir()) == []


def a_plan():
    widths = lively_codec().config["widths"]
    keep = {group: list(range(width // 2)) for group, width in widths.items()}
    plan = dict.fromkeys(KEYS)
    widths = {group: len(kept) for group, kept in keep.items()}
    return plan | {
        "crops": 2, "crop": 64, "baseline": "00", "keep": keep, "widths": widths,
        "lambdas": [0.1, 0.2], "sensitivity": {group: {"8": 0.5} for group in widths}
    }  # fmt: skip


@pytest.mark.parametrize("change", [
    {"keep": {"y": [0, 1, 2, 3, 4, 999]}}, {"keep": {"y": [-1, 1, 2, 3, 4, 5]}},
    {"keep": {"y": list("abcdef")}}, {"keep": {"y": [0, 1, 2, 3, 4, 4]}}, {"lambdas": []},
    {"lambdas": [0.2, 0.1]}, {"lambdas": [0.1, math.inf]}, {"lambdas": ["a"]}, {"keep": 5},
    {"baseline": None}, {"crop": "64"}, {"lambdas": [True, 2.0]}, {"widths": {"y": 6.0}},
    {"widths": {"y": 5}}, {"crop": 65}, {"lambdas": [0.1, 0.1]}, {"sensitivity": {"y": {}}},
    {"sensitivity": {"y": {"\u00b2": 0.5}}},
    {"sensitivity": {"y": {"8": math.nan}}}, {"sensitivity": {}}, {"sensitivity": {"y": 3}},
], ids=str)  # fmt: skip
def test_plans_are_checked_for_content(change, tmp_path):
    plan, widths = a_plan(), lively_codec().config["widths"]
    save_plan(tmp_path / "plan.json", plan)
    assert load_plan(tmp_path / "plan.json", "00", widths)["keep"] == plan["keep"]
    for key, value in change.items():
        plan[key] = plan[key] | value if value and isinstance(value, dict) else value
    (tmp_path / "plan.json").write_text(json.dumps({"format": "lic plan"} | plan))
    with pytest.raises(LicError, match="is not a plan|does not have"):
        load_plan(tmp_path / "plan.json", "00", widths)


def test_two_plans_are_one_cut_if_they_keep_the_same_channels():
    plan, other, same = a_plan(), a_plan(), a_plan()
    other["keep"]["y"][-1] += 1
    same["method"] = "uniform"
    assert cut_fingerprint(plan) == cut_fingerprint(same) != cut_fingerprint(other)


def test_what_is_json_but_no_plan_is_refused(tmp_path):
    save_plan(tmp_path / "plan.json", a_plan())
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace("lic plan", "a plan"))
    with pytest.raises(LicError, match="is not a plan"):
        load_plan(tmp_path / "plan.json")


class NoOptimizer:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_damaged_state_is_refused_and_another_setting_named_with_both_values(tmp_path):
    model, path = lively_codec(), tmp_path / "a.state"
    settings = {"steps": 9, "lr": 0.1, "images": "abc", "crop": 64}
    save_state(path, model, NoOptimizer(), 3, settings, {"lr": 0.1})
    assert load_state(path, model, NoOptimizer(), settings) == 3
    assert load_state(path, model, NoOptimizer(), settings | {"lr": 0.05}) == 3  # smaller
    with pytest.raises(LicError, match="crop was 64, is 128; lr|lr was 0.1, is 0.2; crop was 64"):
        load_state(path, model, NoOptimizer(), settings | {"lr": 0.2, "crop": 128})
    with pytest.raises(LicError, match="images was 'abc', is 'abd'"):
        load_state(path, model, NoOptimizer(), settings | {"images": "abd"})
    data = bytearray(path.read_bytes())
    weight = model.g_a.conv2.weight.detach().numpy().tobytes()[:64]
    position = data.find(weight)
    assert position > 0
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(LicError, match="damaged or something else"):
        read_state(path, "damaged or something else")


TRAINING = ["train.py", "--batch", 1, "--crop", 64, "--steps", 4, "--save-every", 1]


def stopped_run(out, photos, monkeypatch):
    """A run whose checkpoint could not be written: OUT.state is there, OUT is not."""
    assert run_script(monkeypatch, *TRAINING, "--data", photos, "--out", out) == 0
    whole = load_checkpoint(out)[1]["fingerprint"]
    out.unlink()
    return whole


def test_a_run_whose_checkpoint_was_not_written_is_not_begun_anew(
    tmp_path, photos, monkeypatch, capsys
):
    out = tmp_path / "a.pt"
    whole = stopped_run(out, photos, monkeypatch)
    assert run_script(monkeypatch, *TRAINING, "--data", photos, "--out", out) == 2
    assert "write it with --resume" in capsys.readouterr().err and not out.exists()
    cut_alone = [*TRAINING, "--data", photos, "--out", out, "--steps", 0]
    assert run_script(monkeypatch, *cut_alone) == 2 and not out.exists()  # nor replaced by no steps
    assert run_script(monkeypatch, "train.py", "--resume", "--out", out) == 0  # it knows the rest
    assert load_checkpoint(out)[1]["fingerprint"] == whole


def test_a_stopped_run_becomes_a_checkpoint_by_one_command(tmp_path, photos, monkeypatch):
    out = tmp_path / "a.pt"
    arguments = ["--data", photos, "--out", out]
    monkeypatch.setattr("lic.train.loop.learning_rate", lambda step, *_: 1e-3 if step < 2 else 1e30)
    assert run_script(monkeypatch, *TRAINING, *arguments) == 2  # the loss is no number any more
    monkeypatch.undo()
    done = read_state(f"{out}.state", "")["step"]
    assert 0 < done < 4 and not out.exists()
    assert run_script(monkeypatch, "train.py", "--resume", "--finish", "--out", out) == 0
    model, meta = load_checkpoint(out)
    saved = read_state(f"{out}.state", "")["model"]
    assert meta["lineage"][-1]["steps"] == done
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    again = ["train.py", "--resume", "--out", out, "--lr", 1e-4]  # and goes on with a smaller rate
    assert run_script(monkeypatch, *again) == 0
    assert load_checkpoint(out)[1]["lineage"][-1]["steps"] == 4


def test_other_photographs_are_no_resume(tmp_path, monkeypatch, capsys):
    """In a folder of the same name, of the same number and sizes."""
    for folder, seed in (("one", 0), ("two", 10)):
        (tmp_path / folder / "photos").mkdir(parents=True)
        for k in range(3):
            path = tmp_path / folder / "photos" / f"{k}.png"
            Image.fromarray(dead_leaves(seed + k, 64)).save(path)
    out = tmp_path / "a.pt"
    stopped_run(out, tmp_path / "one" / "photos", monkeypatch)
    resume = ["train.py", "--resume", "--out", out, "--data", tmp_path / "two" / "photos"]
    assert run_script(monkeypatch, *resume) == 2
    assert "images was" in capsys.readouterr().err


def test_forgetting_the_photographs_of_a_codec_is_refused(tmp_path, photos, monkeypatch, capsys):
    """Else it would be fine-tuned on synthetic discs, without a word."""
    out = tmp_path / "a.pt"
    assert run_script(monkeypatch, *TRAINING, "--data", photos, "--out", out) == 0
    text = capsys.readouterr().out
    assert f"images: 3 to train, 1 to validate ({photos})" in text
    assert f"next: python search.py --checkpoint {out} --data {photos}" in text
    for script, output in (("search.py", "p.json"), ("prune.py", "b.pt"), ("quantize.py", "q.pt")):
        arguments = ["--checkpoint", out, "--out", tmp_path / output, "--crop", 64]
        if script == "prune.py":
            arguments.append("--control")
        assert run_script(monkeypatch, script, *arguments) == 2
        assert "was trained on photographs" in capsys.readouterr().err
        assert not (tmp_path / output).exists()


def test_a_full_disk_says_what_to_do_next(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(LicError, match="No space left.*is kept.*--resume"):
        write_bytes(tmp_path / "a.pt", b"new")


def test_an_interrupt_before_the_first_step_is_one_word(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lic.train.stage.check_out", interrupt)
    assert run_script(monkeypatch, "train.py") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_log_is_only_that_of_the_program_while_it_runs():
    """`run` gives the streams back, whatever happens."""
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        program.run(lambda: (_ for _ in ()).throw(LicError("x")))
    assert (sys.stdout, sys.stderr) == before


def test_curves_that_share_little_are_compared_with_a_warning(capsys):
    import evaluate

    one = [(0.1 * 2**k, 30.0 + k) for k in range(4)]
    other = [(0.1 * 2**k, 32.9 + k) for k in range(4)]
    evaluate.show_bd_rates({"one.pt": one, "other.pt": other}, {})
    assert "share 32.90 to 33.00 dB only" in capsys.readouterr().out
    evaluate.show_bd_rates({"one.pt": one, "other.pt": one}, {})
    assert "share" not in capsys.readouterr().out


# what an adversary found


@pytest.mark.parametrize("bits, dtype", [(8, np.uint8), (16, np.uint16)])
def test_a_tiff_in_which_white_is_zero_is_inverted_once(bits, dtype, tmp_path):
    pixels = (np.arange(6).reshape(2, 3) * (40 if bits == 8 else 40 * 257)).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    entry = struct.pack("<HHIH", 262, 3, 1, 1)  # photometric interpretation: black is zero
    data = (tmp_path / "a.tif").read_bytes()
    assert data.count(entry) == 1
    (tmp_path / "b.tif").write_bytes(data.replace(entry, struct.pack("<HHIH", 262, 3, 1, 0)))
    plain, inverted = (read_image(tmp_path / name) for name in ("a.tif", "b.tif"))
    assert np.array_equal(inverted, 255 - plain) and plain.max() == 200


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(LicError, match="no ordinary file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(LicError, match="no ordinary file"):
        files.read_bytes(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"M", b"I1\n", b"G1", b"\x80\x02", b"PK\x03\x04"])
def test_whatever_torch_raises_names_the_file(content, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(LicError, match="w.pt is not a lic checkpoint"):
        load_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("arguments, sentence", [
    (["--finish"], "give --resume, too"), (["--validation", "elsewhere"], "needs --data"),
    (["--data", "a", "--synthetic"], "not allowed with"), (["--res"], "unrecognized arguments"),
    (["--seed", 2**64], "2^63"),
])  # fmt: skip
def test_options_that_cannot_go_together_are_refused(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    for script in ("train.py", "prune.py", "quantize.py"):
        output = tmp_path / "a.pt"
        assert run_script(monkeypatch, script, *arguments, "--out", output) == 2
        assert sentence in capsys.readouterr().err and not output.exists()


def test_the_validation_folder_may_be_named_again(tmp_path, photos, monkeypatch):
    out = tmp_path / "a.pt"
    command = [*TRAINING, "--data", photos, "--validation", photos, "--out", out]
    assert run_script(monkeypatch, *command) == 0
    again = ["train.py", "--resume", "--validation", photos, "--out", out, "--overwrite"]
    assert run_script(monkeypatch, *again) == 0


def test_a_state_belongs_to_its_stage_and_its_start(tmp_path, photos, monkeypatch, capsys):
    out = tmp_path / "a.pt"
    stopped_run(out, photos, monkeypatch)
    assert run_script(monkeypatch, "prune.py", "--resume", "--out", out) == 2
    assert "is a run of train.py, not of prune.py" in capsys.readouterr().err
    assert run_script(monkeypatch, "train.py", "--resume", "--out", out, "--preset", "small") == 2
    assert "preset was 'tiny', is 'small'" in capsys.readouterr().err


def test_to_finish_a_run_the_photographs_do_not_matter(tmp_path, photos, monkeypatch):
    out, folder = tmp_path / "a.pt", shutil.copytree(photos, tmp_path / "photos")
    whole = stopped_run(out, folder, monkeypatch)
    Image.fromarray(dead_leaves(50, 64)).save(folder / "another.png")
    folder = folder.rename(tmp_path / "elsewhere")  # others, and under another name
    resume = ["train.py", "--resume", "--out", out, "--data", folder]
    assert run_script(monkeypatch, *resume) == 2
    assert run_script(monkeypatch, *resume, "--finish") == 0
    assert load_checkpoint(out)[1]["fingerprint"] == whole


def test_quantizing_is_finished_with_the_photographs_that_it_began_with(
    tmp_path, photos, monkeypatch, capsys
):
    """It rounds the weights by them when the steps are done."""
    out, folder = tmp_path / "q.pt", shutil.copytree(photos, tmp_path / "photos")
    quantize = ["quantize.py", "--checkpoint", GOLDEN / "codec.pt", "--data", folder, "--out", out]
    quantize += ["--batch", 1, "--crop", 64, "--steps", 1, "--calibration", 2]
    assert run_script(monkeypatch, *quantize) == 0
    out.unlink()
    Image.fromarray(dead_leaves(50, 64)).save(folder / "another.png")
    resume = ["quantize.py", "--resume", "--out", out]
    assert run_script(monkeypatch, *resume, "--finish") == 2
    assert "resume with the same photographs" in capsys.readouterr().err
    assert run_script(monkeypatch, *resume, "--calibration", 3) == 2
    assert "calibration was 2, is 3" in capsys.readouterr().err


def test_a_folder_of_the_same_photographs_may_have_another_name(tmp_path, photos, monkeypatch):
    out, folder = tmp_path / "a.pt", shutil.copytree(photos, tmp_path / "photos")
    whole = stopped_run(out, folder, monkeypatch)
    moved = folder.rename(tmp_path / "moved")
    resume = ["train.py", "--resume", "--out", out, "--data", moved]
    assert run_script(monkeypatch, *resume) == 0
    assert load_checkpoint(out)[1]["fingerprint"] == whole


def test_what_was_held_out_by_name_is_remembered(tmp_path, photos, monkeypatch, capsys):
    out = tmp_path / "a.pt"
    command = [*TRAINING, "--data", photos, "--validation", photos, "--out", out]
    assert run_script(monkeypatch, *command) == 0
    arguments = load_checkpoint(out)[1]["lineage"][-1]["arguments"]
    assert arguments["validation"] == photos.name and "cache" not in arguments
    evaluate = ["evaluate.py", out, "--data", photos, "--held-out"]
    assert run_script(monkeypatch, *evaluate) == 0
    assert f"was trained with --validation {photos.name}" in capsys.readouterr().err


def test_a_run_begun_anew_does_not_go_on_from_the_old_one(tmp_path, photos, monkeypatch):
    """Even if it is killed before its first save."""
    out = tmp_path / "a.pt"
    stopped_run(out, photos, monkeypatch)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lic.train.batches.random_crops", die)
    anew = [*TRAINING, "--data", photos, "--out", out, "--overwrite", "--seed", 5]
    assert run_script(monkeypatch, *anew) == 130
    monkeypatch.undo()
    assert run_script(monkeypatch, "train.py", "--resume", "--out", out) == 2


def test_resuming_without_steps_does_not_replace_a_trained_codec(tmp_path, photos, monkeypatch):
    out = tmp_path / "q.pt"
    quantize = ["quantize.py", "--checkpoint", GOLDEN / "codec.pt", "--data", photos, "--out", out]
    quantize += ["--batch", 1, "--crop", 64, "--steps", 1, "--calibration", 2]
    assert run_script(monkeypatch, *quantize) == 0
    before = out.read_bytes()
    assert run_script(monkeypatch, "quantize.py", "--resume", "--steps", 0, "--out", out) == 2
    assert out.read_bytes() == before


def test_inputs_of_evaluate_are_not_replaced(tmp_path, photos, monkeypatch, capsys):
    published = tmp_path / "published.json"
    published.write_text(json.dumps({"curves": {"a": {"bpp": [1, 2], "psnr": [30, 40]}}}))
    evaluate = ["evaluate.py", GOLDEN / "codec.pt", "--overwrite", "--data", photos]
    for more in (
        ["--published", published, "--json", published],
        ["--plot", photos / "0.png"],
    ):
        assert run_script(monkeypatch, *evaluate, *more) == 2
        assert "is another file of this command" in capsys.readouterr().err


def test_another_name_of_an_input_is_not_written(tmp_path, photos):
    """As Photo.png is of photo.png on a disk that does not tell them apart."""
    image, other = tmp_path / "0.png", tmp_path / "other.png"
    shutil.copy(photos / "0.png", image)
    os.link(image, other)
    with pytest.raises(LicError, match="is another file of this command"):
        claim_output(other, ".png", overwrite=True, inputs=[image])


HUGE_RATE = '{"curves": {"a": {"bpp": [1%s], "psnr": [30]}}}' % ("0" * 400)


@pytest.mark.parametrize("content", ["[" * 10**5, HUGE_RATE])
def test_published_curves_that_cannot_be_read_are_refused(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "curves.json").write_text(content)
    evaluate = ["evaluate.py", GOLDEN / "codec.pt", "--published", tmp_path / "curves.json"]
    assert run_script(monkeypatch, *evaluate) == 2
    assert "curves.json holds no curves" in capsys.readouterr().err


def test_a_closed_log_is_no_error():
    stream = io.TextIOWrapper(io.BytesIO())
    log = PatientLog(stream)
    stream.close()
    assert log.write("a") == 1 and log.broken


def test_a_log_in_a_file_is_written_a_line_at_a_time(tmp_path):
    with open(tmp_path / "log", "w") as stream:
        log = PatientLog(stream)
        log.write("a\n")
        assert (tmp_path / "log").read_text() == "a\n"


def test_closed_streams_cost_no_result_and_leave_no_lock(tmp_path):
    command = shlex.join(map(str, tiny_training(tmp_path / "a.pt")))
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], cwd=ROOT)
    assert done.returncode == 0 and load_checkpoint(tmp_path / "a.pt")[1]["stage"] == "train"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.pt.state"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_at_any_time_leaves_no_lock(name, tmp_path):
    program = f"""if True:
        import os, signal
        from lic.files import claim_output
        from lic.program import run
        def main():
            claim_output({str(tmp_path / "a.pt")!r}, ".pt")
            os.kill(os.getpid(), signal.{name})
        run(main)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == 128 + getattr(signal, name) and list(tmp_path.iterdir()) == []


def test_an_interrupt_while_modules_load_is_one_word():
    program = "import lic.interrupt\nraise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert done.stderr == b"interrupted\n"


def test_a_name_that_is_too_long_is_a_sentence(tmp_path):
    with pytest.raises(LicError, match="too long"):
        claim_output(tmp_path / ("x" * 300 + ".pt"), ".pt")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_a_lack_of_memory_is_a_sentence(error, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("lic.codec.bitstream.ImageCoder.encode", fail)
    command = ["compress", GOLDEN / "leaves.png", tmp_path / "a.lic"]
    assert run_script(monkeypatch, "lic/__main__.py", *command) == 2
    assert "not enough memory for 70x90 pixels" in capsys.readouterr().err


def test_compiling_without_a_compiler_is_a_sentence(tmp_path, monkeypatch, capsys):
    def fail(model, mode):
        def forward(*_):
            raise RuntimeError("no working C++ compiler\nand a long story")

        return forward

    monkeypatch.setattr(torch, "compile", fail)
    arguments = [*TRAINING, "--compile", "--out", tmp_path / "a.pt"]
    assert run_script(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "--compile does not work here (no working C++ compiler); give --no-compile" in error


@pytest.mark.parametrize("key", ["stage", "metrics", "lineage"])
def test_a_checkpoint_without_its_history_is_damaged(key, tmp_path):
    checkpoint = torch.load(GOLDEN / "codec.pt", weights_only=True)
    if key == "lineage":
        del checkpoint["lineage"][0]["steps"]
    else:
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(LicError, match="a.pt is damaged"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("options, expected", [
    ({}, ""), ({"data": "a b"}, " --data 'a b' --held-out"),
    ({"data": "photos", "validation": "held"}, " --data held"),
], ids=str)  # fmt: skip
def test_a_stage_says_how_to_measure_on_what_it_held_out(options, expected):
    args = Namespace(**{"data": None, "validation": None} | options)
    assert held_out_option(args) == expected
