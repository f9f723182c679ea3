"""Tables, the coder and the file format."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers import ROOT, lively_codec, needs_constriction, photo_like

from lic.codec import ans, bitstream
from lic.codec.ans import LibraryAns, PlainAns
from lic.codec.bitstream import ImageCoder, load_coder
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP
from lic.codec.header import SIZE, read_header
from lic.codec.model import Codec
from lic.codec.tables import TAIL, Tables, build_tables
from lic.files import BadStream, LicError
from lic.images import dead_leaves, read_image
from lic.metrics import psnr


def some_image(height, width):
    rng = np.random.default_rng([height, width])
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo():
    return (photo_like()[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def test_table_counts_are_positive_and_sum_to_2_to_24(image_coder):
    for tables in image_coder.tables.values():
        ends = np.cumsum(tables.sizes)
        assert (tables.counts > 0).all()
        assert all(row.sum() == 2**24 for row in np.split(tables.counts, ends[:-1]))
    assert len(image_coder.tables["y"].sizes) == 64


def test_tables_are_the_densities_they_were_built_from(model, image_coder):
    scale = np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * 30)
    tables = image_coder.tables["y"]
    start = tables.sizes[:30].sum()
    values = tables.offsets[30] + np.arange(tables.sizes[30] - 1)
    y = torch.from_numpy(values).double()
    p = torch.exp2(
        -model.prior_y.bits(y, torch.zeros_like(y), torch.full_like(y, np.log(scale)))
    ).numpy()
    np.testing.assert_allclose(tables.counts[start : start + len(values)] / 2**24, p, atol=2e-6)
    assert 1 - p.sum() < 2.1 * TAIL


TOY = Tables(
    counts=np.array([2**23, 2**22, 2**21, 2**21, 2**24 - 2, 1, 1], np.int32),
    sizes=np.array([4, 3], np.int32),
    offsets=np.array([-1, 5], np.int32),
)

GOLDEN_WORDS = ["0x47000000", "0x4"]


def test_golden_words():
    symbols = np.array([-1, 5, 0, 1, -1, 6, 0, -1], np.int32)
    index = np.array([0, 1, 0, 0, 0, 1, 0, 0], np.uint8)
    words, escapes = ans.encode(symbols, index, TOY)
    assert [hex(w) for w in words] == GOLDEN_WORDS and len(escapes) == 0
    assert np.array_equal(ans.decode(words, escapes, index, TOY), symbols)


@needs_constriction
@pytest.mark.parametrize("count", [0, 1, 3, 500])
def test_plain_and_library_coders_give_the_same_words_and_read_each_others(count):
    rng = np.random.default_rng(count)
    tables = [
        rng.multinomial(2**24 - size, rng.dirichlet(np.ones(size))) + 1 for size in (2, 5, 300)
    ]
    runs = [(rng.integers(len(counts), size=count), counts.astype(np.int32)) for counts in tables]
    words = []
    for coder_class in (PlainAns, LibraryAns):
        ans = coder_class()
        for entries, counts in runs:
            if count:
                ans.push(entries.astype(np.int32), counts)
        words.append(ans.words())
    assert np.array_equal(*words) and words[0].dtype == words[1].dtype == np.uint32
    for coder_class in (PlainAns, LibraryAns):
        ans = coder_class(words[0])
        for entries, counts in reversed(runs):
            assert ans.is_empty() == (count == 0)
            assert count == 0 or np.array_equal(ans.pop(count, counts), entries)
        assert ans.is_empty()
        with pytest.raises(ValueError):
            coder_class(np.array([5, 0], np.uint32))


def test_without_constriction_files_are_the_same_and_it_is_said_once(tmp_path):
    program = """if True:
        import sys
        sys.modules["constriction"] = None
        import numpy as np
        import lic
        from lic.images import read_image
        codec, image = lic.load("tests/golden/codec.pt"), read_image("tests/golden/leaves.png")
        data = open("tests/golden/codec_leaves_0.lic", "rb").read()
        pixels = np.load("tests/golden/decoded.npz")["codec_leaves_0.lic.pixels"]
        assert np.abs(codec.decode(data).astype(int) - pixels).max() <= 1
        open(sys.argv[1], "wb").write(codec.encode(image, 0))"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.lic"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("constriction is not installed") == 1
    codec = load_coder(ROOT / "tests" / "golden" / "codec.pt")
    assert (tmp_path / "a.lic").read_bytes() == codec.encode(
        read_image(ROOT / "tests" / "golden" / "leaves.png"), 0
    )


@needs_constriction
def test_damaged_words_are_the_same_garbage_to_both_coders():
    rng = np.random.default_rng(5)
    counts = (rng.multinomial(2**24 - 40, rng.dirichlet(np.ones(40))) + 1).astype(np.int32)
    for length in (1, 2, 3, 50):
        words = rng.integers(1, 2**32, length, dtype=np.uint32)
        plain, library = PlainAns(words), LibraryAns(words)
        assert np.array_equal(plain.pop(200, counts), library.pop(200, counts))
        assert plain.is_empty() == library.is_empty()


def test_far_outliers_are_escaped_not_clipped():
    symbols = np.array([-(2**30), 0, 2**30, 7, -1, 1, 4, 5], np.int32)
    index = np.array([0, 0, 0, 1, 0, 0, 1, 1], np.uint8)
    words, escapes = ans.encode(symbols, index, TOY)
    assert escapes.tolist() == [-(2**30), 2**30, 7, 4]
    assert np.array_equal(ans.decode(words, escapes, index, TOY), symbols)


def test_coded_size_is_within_one_percent_of_ideal(image_coder):
    rng = np.random.default_rng(0)
    index = rng.integers(0, 40, 100_000).astype(np.uint8)
    scale = np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * index)
    symbols = np.rint(rng.normal(size=100_000) * scale).astype(np.int32)
    words, escapes = ans.encode(symbols, index, image_coder.tables["y"])
    y = torch.from_numpy(symbols).double()
    ideal = (
        image_coder.model.prior_y.bits(y, torch.zeros_like(y), torch.from_numpy(np.log(scale)))
        .sum()
        .item()
    )
    assert ideal * 0.999 < 32 * (len(words) + len(escapes)) < ideal * 1.01


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (63, 65), (64, 64), (200, 130)])
@pytest.mark.parametrize("quality", [0, 1.5, 3])
def test_any_size_comes_back_in_its_size(image_coder, height, width, quality):
    data = image_coder.encode(some_image(height, width), quality)
    decoded = image_coder.decode(data)
    assert decoded.shape == (height, width, 3) and decoded.dtype == np.uint8


def test_the_limit_counts_padded_pixels_and_says_so_both_ways(image_coder):
    image = some_image(65, 64)  # 4,160 pixels, padded 8,192
    data = image_coder.encode(image, 1, max_pixels=8192)
    assert image_coder.decode(data, max_pixels=8192).shape == image.shape
    for action in (
        lambda: image_coder.encode(image, 1, 8191),
        lambda: image_coder.decode(data, 8191),
    ):
        with pytest.raises(
            LicError, match="64x65, padded 8192 pixels, more than the limit of 8191"
        ):
            action()


def test_decoded_image_is_the_models_x_hat_and_the_file_is_as_long_as_its_bits(model, image_coder):
    data = image_coder.encode(photo(), 2)
    decoded = image_coder.decode(data)
    with torch.inference_mode():
        out = model(torch.from_numpy(photo()).permute(2, 0, 1)[None] / 255, torch.tensor([2.0]))
    x_hat = (out.x_hat.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(decoded - x_hat).max() <= 1
    ideal = (out.y_bits.sum() + out.z_bits.sum()).item()
    assert abs(8 * (len(data) - SIZE) - ideal) < 0.02 * ideal + 128


def test_escapes_survive_the_file():
    """A model whose latents are thousands times wider than its tables still round-trips."""
    model = lively_codec()
    with torch.no_grad():
        model.h_s.conv3.weight.zero_()
        model.h_s.conv3.bias.zero_()
        model.log_gain.add_(5.0)
        model.log_inverse_gain.sub_(5.0)
        expected = model(photo_like(), torch.tensor([1.0])).x_hat
    image_coder = ImageCoder(model, build_tables(model), "0" * 16)
    data = image_coder.encode(photo(), 1)
    assert read_header(data)[0].lengths[3] > 100
    expected = (expected.clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()
    assert (
        np.abs(image_coder.decode(data) - expected).mean() < 2
    )  # photo() is photo_like() in 8 bits


def test_bf16_changes_neither_how_a_file_is_read_nor_the_picture_much(model, image_coder):
    """Both decoders read both encoders' files."""
    bf16 = ImageCoder(model, image_coder.tables, "00112233445566778899", amp=True)
    plain, other = image_coder.encode(photo(), 2), bf16.encode(photo(), 2)
    assert plain != other and abs(len(plain) - len(other)) < 0.02 * len(plain)
    for data in (plain, other):
        pictures = [coder.decode(data).astype(float) for coder in (image_coder, bf16)]
        assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 2


def test_another_device_runs_the_plain_networks_and_gives_the_same_picture(model, image_coder):
    """ "cpu:0" takes the way of a GPU: none of the CPU's faster forms, tensors there and back."""
    other = ImageCoder(model, image_coder.tables, "00112233445566778899", device="cpu:0")
    assert other.device != image_coder.device and "Strip" not in str(other.g_s)
    for data in (image_coder.encode(photo(), 2), other.encode(photo(), 2)):
        pictures = [coder.decode(data).astype(int) for coder in (image_coder, other)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_every_flipped_byte_and_every_cut_is_refused(image_coder):
    data = image_coder.encode(some_image(40, 40), 0)
    for position in range(len(data)):
        with pytest.raises(BadStream):
            image_coder.decode(data[:position])
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(BadStream):
            image_coder.decode(bytes(damaged))
    with pytest.raises(BadStream):
        image_coder.decode(data + b"\0")


def rewrite(data, offset, field, value):
    """Change a header field and make the checksum right again."""
    data = bytearray(data)
    struct.pack_into(field, data, offset, value)
    crc = zlib.crc32(data[SIZE:], zlib.crc32(data[: SIZE - 4]))
    struct.pack_into("<I", data, SIZE - 4, crc)
    return bytes(data)


@pytest.mark.parametrize(
    "offset, field, value, sentence",
    [
        (4, "<B", 3, "version 3"),
        (5, "<H", 4 * 256, "quality 4"),
        (7, "<I", 2**31, "limit"),
        (7, "<I", 0, "0 pixels|x0"),
        (15, "<8s", b"otherone", "made by model"),
        (39, "<I", 1, "symbols"),
    ],
)
def test_headers_that_lie_are_refused(image_coder, offset, field, value, sentence):
    data = rewrite(image_coder.encode(some_image(40, 40), 0), offset, field, value)
    with pytest.raises(BadStream, match=sentence):
        image_coder.decode(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_latents_that_are_not_usable_integers_are_refused(value):
    model = lively_codec()
    image_coder = ImageCoder(model, build_tables(model), "0" * 16)
    with torch.no_grad():
        model.g_a.conv4.bias[3] = value
    with pytest.raises(LicError, match="not finite or beyond"):
        image_coder.encode(photo(), 0)


def test_the_largest_symbols_are_2_to_30_less_one_on_both_sides():
    values = torch.tensor([2**30 - 1.0, 0.4 - 2**30], dtype=torch.float64)
    assert bitstream.integers(values[:1], "y").tolist() == [2**30 - 1]
    with pytest.raises(LicError, match="beyond 2"):
        bitstream.integers(values, "y")


def test_an_escaped_symbol_of_2_to_30_is_refused(image_coder):
    data = bytearray(image_coder.encode(some_image(40, 40), 0))
    data += struct.pack("<i", -(2**30))
    with pytest.raises(BadStream, match="no encoder writes"):
        image_coder.decode(rewrite(data, 35, "<I", lengths_of(data)[3] + 1))


def lengths_of(data):
    return struct.unpack_from("<4I", data, 23)


@pytest.mark.parametrize("quality", [-0.1, 3.01, float("nan")])
def test_unknown_quality_is_refused(image_coder, quality):
    with pytest.raises(LicError, match="between 0 and 3"):
        image_coder.encode(photo(), quality)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "checkpoints").glob("*.pt")), ids=lambda path: path.stem
)
def test_shipped_checkpoints_code_a_picture_well(path):
    coder, image = load_coder(path), dead_leaves(7, 128)
    quality = [
        psnr(image, coder.decode(coder.encode(image, level)))
        for level in range(len(coder.model.lambdas))
    ]
    assert quality == sorted(quality) and 20 < quality[0] and quality[-1] < 45


def test_the_default_quality_is_a_level_that_a_codec_has(model, image_coder):
    assert image_coder.encode(photo()) == image_coder.encode(photo(), 2)
    single = Codec({"widths": model.config["widths"], "lambdas": [0.01]})
    coder_of_one = ImageCoder(single, build_tables(single), "0" * 16)
    assert read_header(coder_of_one.encode(photo()))[0].quality == 0


def test_the_state_never_outgrows_its_64_bits():
    counts = np.array([5, 2**24 - 5])
    coder = PlainAns()
    coder.state = 5 << 40  # one less, and a word need not be moved out before the push
    coder.push(np.array([0]), counts)
    assert coder.state < 2**64
    assert coder.pop(1, counts).tolist() == [0] and coder.state == 5 << 40


@pytest.mark.parametrize("extra", ["word", "escape"])
def test_a_stream_with_something_left_is_refused(image_coder, extra):
    tables, index = image_coder.tables["y"], np.full(99, 20)
    symbols = np.arange(99, dtype=np.int32) % 3 - 1
    words, escapes = ans.encode(symbols, index, tables)
    assert np.array_equal(ans.decode(words, escapes, index, tables), symbols)
    if extra == "word":
        words = np.concatenate([np.array([7, 8, 9], np.uint32), words])
    else:
        escapes = np.append(escapes, np.int32(3))
    with pytest.raises(BadStream, match="does not end where it must"):
        ans.decode(words, escapes, index, tables)


def test_a_file_of_no_width_is_refused(image_coder):
    data = rewrite(image_coder.encode(some_image(40, 40), 0), 11, "<I", 0)
    with pytest.raises(BadStream, match="0x40 pixels"):
        image_coder.decode(data)


def test_a_quality_is_rounded_to_a_256th(image_coder):
    assert image_coder.level(1.9999) == 2.0 and image_coder.level(0.4995) == 128 / 256


def test_a_picture_is_padded_by_its_last_row_and_column():
    image = some_image(3, 5)
    padded = bitstream.pad_edges(image)
    assert padded.shape == (64, 64, 3) and np.array_equal(padded[:3, :5], image)
    assert (padded[3:, :5] == image[-1]).all() and (padded[:3, 5:] == image[:, -1:]).all()


def test_a_table_leaves_little_outside_with_a_margin_and_an_escape(image_coder):
    """Of the table of scale s: 2^-20 on either side, then 16 entries; the escape has that mass."""
    tables = image_coder.tables["y"]
    starts = np.cumsum(tables.sizes) - tables.sizes
    for t in (0, 20, 63):
        scale = np.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * t)
        beyond = int(np.ceil(4.76 * scale - 0.5))  # a Gaussian has 2^-20 beyond 4.76 scales
        last = tables.offsets[t] + tables.sizes[t] - 2
        assert abs(last - (beyond + 16)) <= 1 + 0.002 * scale
        assert abs(tables.offsets[t] + last) <= 1
        escape = tables.counts[starts[t] + tables.sizes[t] - 1]
        assert abs(escape - (1 + 2 * TAIL * 2**24)) <= 1
