"""Photographs decoded once: what is kept, what is added, and what a run that fails leaves."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, run_script
from PIL import Image

from lic import photographs
from lic.files import LicError
from lic.images import dead_leaves, digest, find_images, random_crops, read_images
from lic.photographs import load_images, open_photographs, raw_path, read_index


@pytest.fixture
def folder(tmp_path, photos):
    """A copy of the four photographs, which a test may change."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def add_photograph(folder, name, seed):
    Image.fromarray(dead_leaves(seed, 64)).save(folder / name)


def files_of(cache):
    return {path.name: path.read_bytes() for path in cache.iterdir()} if cache.exists() else {}


def same(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def test_the_images_are_those_of_the_files_and_stay_on_the_disk(folder, cache):
    expected = read_images(find_images(folder))
    for _ in range(2):  # decoded, then found
        images = open_photographs(folder, cache)
        assert same(images, expected) and images.digests == list(map(digest, expected))
        assert not any(image.flags.owndata for image in images)
    crops = random_crops(images, 8, 32, np.random.default_rng(0))
    assert all(any(np.shares_memory(crop, image) for image in images) for crop in crops)
    for one, other in zip(load_images(folder, 64, cache=cache), load_images(folder, 64)):
        assert same(one, other) and one.digests == other.digests


def test_a_folder_that_has_not_changed_is_not_decoded_again(folder, cache, monkeypatch):
    open_photographs(folder, cache)
    monkeypatch.setattr(photographs, "read_image", pytest.fail)
    assert len(open_photographs(folder, cache)) == 4


def test_only_what_is_new_is_decoded_and_what_is_gone_is_dropped(folder, cache, monkeypatch):
    before = open_photographs(folder, cache)
    pixels = [image.copy() for image in before]
    (folder / "0.png").unlink()
    add_photograph(folder, "1.png", 10)  # another picture
    os.utime(folder / "2.png", ns=(0, 0))  # the same, touched
    add_photograph(folder, "4.png", 11)
    decoded, real = [], photographs.read_image
    monkeypatch.setattr(
        photographs, "read_image", lambda p, n: decoded.append(p.name) or real(p, n)
    )
    assert same(open_photographs(folder, cache), read_images(find_images(folder)))
    assert decoded == ["1.png", "2.png", "4.png"]
    assert same(before, pixels)  # which a run that goes on still sees


def test_many_are_decoded_by_processes(folder, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(photographs, "FEW", 0)
    assert same(open_photographs(folder, cache), read_images(find_images(folder)))


def test_bad_photographs_are_all_named_or_left_out(folder, cache, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    Image.new("L", (64, 32)).save(folder / "low.png")
    with pytest.raises(LicError, match="bad.png.*low.png is 64x32, smaller than.*--skip-bad"):
        open_photographs(folder, cache, 64)
    capsys.readouterr()
    assert same(
        open_photographs(folder, cache, 64, skip_bad=True)[:3],
        open_photographs(folder, cache, 32, True)[:3],
    )
    assert "left out 2 of 6 images: cannot read" in capsys.readouterr().out
    assert (
        len(open_photographs(folder, cache, 32, skip_bad=True)) == 5
    )  # the crop is not of the cache
    with pytest.raises(LicError, match="no image below.*can be used"):
        open_photographs(folder, cache, 128, skip_bad=True)


def test_folders_of_the_same_name_have_files_of_their_own(folder, tmp_path, cache):
    other = tmp_path / "elsewhere" / "photos"
    other.mkdir(parents=True)
    add_photograph(other, "0.png", 20)
    assert len(open_photographs(folder, cache)) == 4 and len(open_photographs(other, cache)) == 1
    assert same(open_photographs(folder, cache), read_images(find_images(folder)))


def change_index(cache, **changes):
    (path,) = cache.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_pixels(cache):
    (path,) = cache.glob("*.raw")
    os.truncate(path, path.stat().st_size - 1)


def other_pixels(cache):
    (path,) = cache.glob("*.raw")
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda cache: change_index(cache, version=0), "of another version"),
        (lambda cache: change_index(cache, folder="/else"), "is of /else"),
        (lambda cache: change_index(cache, photographs={"0.png": [1]}), "is damaged"),
        (lambda cache: change_index(cache, photographs={}), "is damaged"),
        (lambda cache: next(cache.glob("*.json")).write_bytes(b"{"), "is damaged"),
        (lambda cache: next(cache.glob("*.raw")).unlink(), "of a longer file"),
        (cut_pixels, "of a longer file"),
        (other_pixels, "of another file"),
    ],
)
def test_a_cache_that_is_not_what_it_should_be_is_a_sentence(spoil, sentence, folder, cache):
    open_photographs(folder, cache)
    spoil(cache)
    before = files_of(cache)
    with pytest.raises(LicError, match=f"{sentence}.*; remove it and"):
        open_photographs(folder, cache)
    assert files_of(cache) == before
    for path in cache.iterdir():
        path.unlink()
    assert len(open_photographs(folder, cache)) == 4


@pytest.mark.parametrize("new", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_cache_as_it_was(error, new, folder, cache, monkeypatch):
    if new:
        open_photographs(folder, cache)
        add_photograph(folder, "4.png", 12)
    before = files_of(cache)

    def fail(_):
        raise error

    monkeypatch.setattr(photographs.os, "fsync", fail)
    with pytest.raises((LicError, KeyboardInterrupt)) as refusal:
        open_photographs(folder, cache)
    if isinstance(error, OSError):
        assert "No space left on device; choose another folder" in str(refusal.value)
    assert files_of(cache) == before
    monkeypatch.undo()
    assert same(open_photographs(folder, cache), read_images(find_images(folder)))


def test_a_disk_that_is_too_small_is_told_first(folder, cache, monkeypatch):
    monkeypatch.setattr(
        photographs.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1)
    )
    with pytest.raises(LicError, match="take about 0.0 GB.*--cache"):
        open_photographs(folder, cache)
    assert files_of(cache) == {}


def test_a_photograph_that_changes_while_it_is_read_is_named(folder, cache, monkeypatch):
    real = photographs.read_image

    def slow(path, max_pixels):
        image = real(path, max_pixels)
        if path.name == "1.png":
            add_photograph(folder, "1.png", 30)
        return image

    monkeypatch.setattr(photographs, "read_image", slow)
    with pytest.raises(LicError, match="1.png has changed while it was read"):
        open_photographs(folder, cache)
    monkeypatch.undo()
    assert same(open_photographs(folder, cache), read_images(find_images(folder)))


def test_a_leftover_of_a_killed_run_is_written_over(folder, cache):
    cache.mkdir()
    raw = raw_path(folder, cache)
    raw.write_bytes(b"half of the first photograph")
    open_photographs(folder, cache)
    with open(raw, "ab") as file:
        file.write(b"half of the next one")
    add_photograph(folder, "4.png", 13)
    assert same(open_photographs(folder, cache), read_images(find_images(folder)))
    assert raw.stat().st_size == 5 * 3 * 64 * 64


def test_two_runs_decode_a_folder_once(folder, cache):
    program = """if True:
        import sys, time
        from lic import photographs
        real = photographs.decode
        photographs.decode = lambda path: time.sleep(0.2) or real(path)
        print(len(photographs.open_photographs(*sys.argv[1:])))"""
    command = [sys.executable, "-c", program, folder, cache]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    texts = [run.communicate()[0] for run in runs]
    assert all(text.endswith("4\n") for text in texts)
    assert sum("decoding 4 images" in text for text in texts) == 1
    assert sorted(files_of(cache)) == sorted(
        [f"{raw_path(folder, cache).stem}.json", raw_path(folder, cache).name]
    )
    assert len(read_index(raw_path(folder, cache), folder)) == 4


def test_the_stages_share_one_cache(folder, cache, tmp_path, monkeypatch, capsys):
    arguments = ["--data", folder, "--cache", cache, "--crop", 64]
    dense = tmp_path / "dense.pt"
    training = ["--steps", 1, "--batch", 1]
    assert run_script(monkeypatch, "train.py", *arguments, *training, "--out", dense) == 0
    assert "decoding 4 images" in capsys.readouterr().out
    arguments += ["--checkpoint", dense]
    plan, control = tmp_path / "plan.json", tmp_path / "control.pt"
    search = ["--method", "uniform", "--delta", 0.2, "--crops", 1, "--out", plan]
    assert run_script(monkeypatch, "search.py", *arguments, *search) == 0
    prune = ["--control", *training, "--out", control]
    assert run_script(monkeypatch, "prune.py", *arguments, *prune) == 0
    assert "decoding" not in capsys.readouterr().out


def test_what_is_held_out_is_not_trained_on_wherever_it_lies(folder, tmp_path, cache, capsys):
    (folder / "held").mkdir()
    add_photograph(folder, "held/5.png", 30)
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "again.png").write_bytes((folder / "0.png").read_bytes())
    train, validation = load_images(folder, 32, folder / "held", cache)
    assert len(train) == 4 and len(validation) == 1
    assert not set(train.digests) & set(validation.digests)
    assert "1 images are held out, too, and not trained on" in capsys.readouterr().out
    train, validation = load_images(folder, 32, tmp_path / "copies", cache)
    assert len(train) == 4 and not set(train.digests) & set(validation.digests)
    train, validation = load_images(folder, 32, folder, cache)
    assert len(train) == len(validation) == 5
    assert "J will be of trained images" in capsys.readouterr().out


def test_photographs_beyond_the_coders_limit_can_be_trained_on(tmp_path):
    Image.new("1", (2**13 + 1, 2**12)).save(tmp_path / "large.png")
    with pytest.raises(LicError, match="more than the limit of 33554432"):
        read_images([tmp_path / "large.png"])
    _, entry, fault = photographs.decode(tmp_path / "large.png")
    assert fault is None and (entry.height, entry.width) == (2**12, 2**13 + 1)
