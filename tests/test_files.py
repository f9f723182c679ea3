"""The borders: images of every mode, checkpoints that are none, and one sentence for each error."""

import io
import platform
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from PIL import Image, features

from lic import files, program
from lic.codec.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from lic.codec.tables import build_tables
from lic.files import LicError, write_bytes
from lic.images import dead_leaves, find_images, random_crops, read_image, to_tensor
from lic.photographs import load_images


def save_image(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    assert read_image(save_image(tmp_path / "a.png", grey))[:, :, 1].tolist() == [
        [0, 100],
        [200, 255],
    ]


def test_alpha_is_composited_on_white_and_hides_its_colour(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = [10, 20, 30, 255]
    image = read_image(save_image(tmp_path / "a.png", rgba))
    assert image[0, 0].tolist() == [10, 20, 30] and image[1, 0].tolist() == [255, 255, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    path = save_image(tmp_path / "a.jpg", np.zeros((8, 16, 3), np.uint8), exif=exif)
    assert read_image(path).shape == (16, 8, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(dead_leaves(0, 32)).convert(
        "L" if mode == "LA" else "P" if mode == "PA" else "RGB"
    ).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and image.std() > 10


def test_16_bit_colour_is_scaled_not_clipped(tmp_path):
    """Written by hand: Pillow writes no 16-bit colour PNG."""
    pixels = np.array([[[0, 257 * 100, 65535], [257 * 200, 300, 0]]], ">u2")

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
    )
    (tmp_path / "a.png").write_bytes(data + chunk(b"IEND", b""))
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 100, 255], [200, 1, 0]]]


def test_palette_transparency_is_composited_on_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png").tolist() == [[[200, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 0, 250))]
    frames[0].save(
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    assert (read_image(tmp_path / f"a.{suffix}") == [250, 0, 0]).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_progressive_jpeg_in_every_colour_space(tmp_path, mode):
    original = Image.fromarray(dead_leaves(0, 64)).convert(mode)
    original.save(tmp_path / "a.jpg", progressive=True, quality=100, subsampling=0)
    difference = read_image(tmp_path / "a.jpg") - np.asarray(original.convert("RGB"), np.float64)
    assert np.abs(difference).mean() < 1.5


@pytest.mark.parametrize("value", [np.float32(0.5), np.int32(200), np.int32(70000)])
def test_images_without_a_known_white_are_refused(tmp_path, value):
    with pytest.raises(LicError, match="a.tif.*32-bit or floating-point"):
        read_image(save_image(tmp_path / "a.tif", np.full((4, 4), value)))


def test_grey_that_only_looks_like_16_bits_is_refused(tmp_path):
    white = np.full((4, 4), 65535, np.uint16)
    assert (read_image(save_image(tmp_path / "a.tif", white)) == 255).all()
    entry = struct.pack("<HHIH", 258, 3, 1, 16)  # bits a sample: one short, 16
    data = (tmp_path / "a.tif").read_bytes()
    assert data.count(entry) == 1
    (tmp_path / "b.tif").write_bytes(data.replace(entry, struct.pack("<HHIH", 258, 3, 1, 12)))
    with Image.open(tmp_path / "b.tif") as file:
        assert file.mode == "I;16"
    with pytest.raises(LicError, match="b.tif.*neither 8 nor 16 bits"):
        read_image(tmp_path / "b.tif")
    Image.fromarray(white).save(tmp_path / "c.png", transparency=65535)
    with pytest.raises(LicError, match="c.png.*with transparency"):
        read_image(tmp_path / "c.png")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_an_image_or_a_sentence(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(dead_leaves(0, 64)).save(buffer, format="AVIF")
    data, path, refused = buffer.getvalue(), tmp_path / "a.avif", 0
    for position in range(0, 300):  # the boxes before the pixels
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x15]) + data[position + 1 :])
        try:
            assert read_image(path).ndim == 3
        except LicError as error:
            refused += "a.avif" in str(error)
    assert refused > 100


def test_16_bit_pgm_is_scaled(tmp_path):
    (tmp_path / "a.pgm").write_bytes(
        b"P5 2 1 65535\n" + np.array([257 * 100, 65535], ">u2").tobytes()
    )
    assert read_image(tmp_path / "a.pgm")[0, :, 0].tolist() == [100, 255]


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_truncated_and_foreign_images_are_named_at_every_cut(tmp_path, kind):
    """No cut raises anything but the codec's own error, and none that loses pixels gives an
    image."""
    buffer = io.BytesIO()
    Image.fromarray(dead_leaves(0, 64)).save(buffer, format=kind)
    data, path = buffer.getvalue(), tmp_path / "cut.img"
    for cut in range(0, len(data) - len(data) // 4, max(1, len(data) // 97)):
        path.write_bytes(data[:cut])
        with pytest.raises(LicError, match="cut.img"):
            read_image(path)
    path.write_bytes(b"hello, this is text")
    with pytest.raises(LicError, match="cut.img"):
        read_image(path)


def test_folders_are_searched_recursively_and_must_hold_images(tmp_path, photos):
    assert [path.name for path in find_images(photos)] == ["0.png", "1.png", "2.png", "3.png"]
    with pytest.raises(LicError, match="no images below"):
        find_images(tmp_path)
    with pytest.raises(LicError, match="not a folder"):
        find_images(tmp_path / "missing")
    with pytest.raises(LicError, match="64x64, smaller than the crop of 128"):
        load_images(photos, 128)


def test_files_that_are_no_images_and_the_case_of_names_do_not_matter(tmp_path):
    """Every 16th image is held out: the order must be the same everywhere."""
    for name in ("b.png", "B.PNG", "a/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_image(tmp_path / name, np.zeros((4, 4), np.uint8))
    (tmp_path / "._b.png").write_bytes(b"of macOS")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == [
        "B.PNG",
        "a/c.png",
        "b.png",
    ]


@pytest.mark.parametrize(
    "option, value, what",
    [
        ("--steps", "abc", "a whole number from 0 to 2^63 - 1"),
        ("--batch", 0, "a whole number from 1 to 2^31 - 1"),
        ("--batch", 2**31, "a whole number from 1 to 2^31 - 1"),
        ("--lr", "nan", "a positive finite number"),
    ],
)
def test_a_bad_number_is_told_what_it_should_be(option, value, what, monkeypatch, capsys):
    assert run_script(monkeypatch, "train.py", option, value) == 2
    assert f"{option}: '{value}' is not {what}" in capsys.readouterr().err


def test_crops_are_pieces_of_the_images_determined_by_the_generator():
    images = [dead_leaves(seed, 64) for seed in range(2)]
    a, b = (to_tensor(random_crops(images, 4, 32, np.random.default_rng(5))) for _ in range(2))
    assert (
        torch.equal(a, b)
        and a.shape == (4, 3, 32, 32)
        and a.is_contiguous(memory_format=torch.channels_last)
    )
    windows = np.lib.stride_tricks.sliding_window_view(
        np.stack(images), (32, 32), axis=(1, 2)
    )  # (2, 33, 33, 3, 32, 32)
    for crop in a:
        crop = (crop * 255).round().to(torch.uint8).numpy()
        assert any((windows == c).all((3, 4, 5)).any() for c in (crop, crop[:, :, ::-1]))


def test_held_out_images_are_not_trained_on(photos):
    train, validation = load_images(photos, 64)
    assert len(train) == 3 and len(validation) == 1
    assert not any(np.array_equal(validation[0], image) for image in train)


@pytest.fixture()
def checkpoint(tmp_path, model):
    path = tmp_path / "a.pt"
    save_checkpoint(
        path, model, build_tables(model), "train", {"data": "somewhere/photos/", "lr": 0.1}, 7
    )
    return path


def test_a_checkpoint_alone_rebuilds_its_codec(checkpoint, model):
    loaded, meta = load_checkpoint(checkpoint)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    assert meta["lineage"] == [
        {"stage": "train", "arguments": {"lr": 0.1}, "steps": 7, "data": "photos", "parent": None}
    ]
    assert all(np.array_equal(a, b) for a, b in zip(meta["tables"]["z"], build_tables(model)["z"]))


def test_halve_halves_the_bytes_and_gives_a_codec_of_its_own(checkpoint, model, tmp_path):
    half = tmp_path / "half.pt"
    command = [sys.executable, "-m", "lic", "halve", str(checkpoint), str(half)]
    assert b"bytes" in subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    loaded, meta = load_checkpoint(half)
    assert meta["bytes"] < 0.7 * checkpoint.stat().st_size  # the tables stay as they are
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    tables = build_tables(loaded)
    assert all(
        np.array_equal(a, b) for kind in "yz" for a, b in zip(meta["tables"][kind], tables[kind])
    )
    before = load_checkpoint(checkpoint)[1]
    assert (
        meta["lineage"][-1]["parent"] == before["fingerprint"] != meta["fingerprint"]
        and meta["stage"] == before["stage"]
    )
    assert meta["lineage"][-1]["data"] is None  # no images had a part in it


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    data = checkpoint.read_bytes()
    bad = tmp_path / "bad.pt"
    for content in (b"", b"hello", data[: len(data) // 2], data[:-1]):
        bad.write_bytes(content)
        with pytest.raises(LicError, match="bad.pt"):
            load_checkpoint(bad)
    torch.save({"weights": torch.zeros(3)}, bad)
    with pytest.raises(LicError, match="not a lic checkpoint"):
        load_checkpoint(bad)
    with pytest.raises(LicError, match="cannot read"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(LicError, match="stage 'train'"):
        load_checkpoint(checkpoint, stages=("quantize",))


@pytest.mark.parametrize("kind, field, value", [
    ("z", "counts", None), ("y", None, None), ("z", "sizes", torch.zeros(18, dtype=torch.int32)),
    ("z", "offsets", torch.zeros(17, dtype=torch.int32)), ("y", "counts", "one less"),
], ids=str)  # fmt: skip
def test_tables_that_the_coder_cannot_use_are_refused(kind, field, value, checkpoint):
    """Even where the fingerprint is made right again."""
    contents = torch.load(checkpoint)
    tables = contents["tables"]
    if value is None:
        tables[kind].pop(field) if field else tables.pop(kind)
    elif field == "counts":
        tables[kind][field][5] -= 1  # a table's counts no longer add up to 2^24
    else:
        tables[kind][field] = value
    parts = [contents[key] for key in ("config", "quantization", "state_dict", "tables")]
    contents["fingerprint"] = fingerprint(*parts)
    torch.save(contents, checkpoint)
    with pytest.raises(LicError, match="damaged|does not have the layers"):
        load_checkpoint(checkpoint)


def test_a_flipped_bit_in_a_tensor_is_noticed(checkpoint, model):
    data = bytearray(checkpoint.read_bytes())
    weight = model.g_a.conv1.weight.detach().contiguous().numpy().tobytes()
    position = data.find(weight[:64])
    assert position > 0
    data[position + 5] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(LicError, match="damaged"):
        load_checkpoint(checkpoint)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(LicError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train.py", "--data", "{tmp}/missing"], "missing is not a folder"),
        (["train.py", "--data", "{tmp}/empty"], "no images below"),
        (
            ["train.py", "--data", "{photos}", "--crop", "128"],
            "0.png is 64x64, smaller than the crop of 128",
        ),
        (["train.py", "--lambdas", "0.1", "0.01"], "rising order"),
        (["train.py", "--data", "{photos}", "--crop", "60"], "multiple of 64"),
        (
            ["train.py", "--data", "{photos}", "--crop", "64", "--out", "{tmp}/a.pt/x.pt"],
            "cannot write",
        ),
        (
            ["train.py", "--data", "{photos}", "--crop", "64", "--out", "{photos}/x.pt"],
            "is another file of this command",
        ),
        (
            ["train.py", "--data", "{photos}", "--crop", "64", "--out", "{tmp}/x.pt", "--resume"],
            "start without --resume",
        ),
        (["search.py", "--checkpoint", "{photos}/0.png"], "not a lic checkpoint"),
        (["search.py", "--target", "1.5"], "between 0 and 1"),
        (["search.py", "--checkpoint", "{tmp}/a.pt", "--crop", "100"], "multiple of 64"),
        (
            [
                "prune.py",
                "--checkpoint",
                "{tmp}/a.pt",
                "--plan",
                "{photos}/0.png",
                "--data",
                "{photos}",
                "--crop",
                "64",
                "--out",
                "{tmp}/p.pt",
            ],
            "not a plan",
        ),
        (["quantize.py", "--checkpoint", "{tmp}/missing.pt"], "cannot read"),
        (["evaluate.py", "{tmp}/a.pt", "--data", "{tmp}/missing"], "missing is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments, sentence, tmp_path, photos, monkeypatch, capsys, model
):
    save_checkpoint(tmp_path / "a.pt", model, build_tables(model), "train", {}, 0)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    if not any("--out" in a for a in arguments) and arguments[0] != "evaluate.py":
        suffix = "json" if arguments[0] == "search.py" else "pt"
        arguments = [*arguments, "--out", f"{{tmp}}/out.{suffix}"]
    status = run_script(monkeypatch, *(a.format(tmp=tmp_path, photos=photos) for a in arguments))
    error = capsys.readouterr().err
    assert status == 2 and sentence in error and error.count("\n") == 1
    left = [path for path in tmp_path.rglob("*") if not path.name.startswith("photographs-")]
    assert sorted(left) == before  # decoded photographs stay: a larger crop is not their fault


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """In a process that keeps it, a second block of 16 MiB costs no page faults; in one that
    does not, 4,096."""
    program = """if True:
        import resource, sys
        sys.path.insert(0, sys.argv[1])
        from lic.program import keep_freed_memory
        if sys.argv[2] == "keep":
            assert keep_freed_memory() is True
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = b"x" * 2**24
            del block
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    root = Path(__file__).parent.parent
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", program, root, word], capture_output=True, check=True
            ).stdout
        )
        for word in ("keep", "give")
    ]
    assert faults[0] < 100 and faults[1] > 1000


@pytest.mark.parametrize(
    "capability, times", [("AVX2", 1), ("AVX512", 0), ("DEFAULT", 0)]
)  # the last: also an ARM's
def test_amp_on_a_cpu_without_fast_bf16_is_warned_of_once(
    capability, times, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    program.warn_of_slow_bf16.cache_clear()
    golden = Path(__file__).parent / "golden"
    compress = [
        "lic/__main__.py",
        "compress",
        "--overwrite",
        golden / "pixel.png",
        tmp_path / "a.lic",
        "--quality",
        1,
        "--checkpoint",
        golden / "codec.pt",
    ]
    assert run_script(monkeypatch, *compress) == 0 and capsys.readouterr().err == ""
    assert (
        run_script(monkeypatch, *compress, "--amp")
        == run_script(monkeypatch, *compress, "--amp")
        == 0
    )
    assert capsys.readouterr().err.count("leave out --amp") == times
