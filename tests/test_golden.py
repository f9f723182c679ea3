"""What files on disk decode to must never change: golden files, and a decoder without torch."""

import argparse
import io
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from golden.make import FOLDER, Recorder
from helpers import ROOT, needs_constriction, quantized_codec, run_script
from numpy_decoder import Decoder, conv, deconv, gdn, leaky_relu
from PIL import Image

from lic.__main__ import export
from lic.codec import ans
from lic.codec.bitstream import ImageCoder, channel_index, load_coder, padded
from lic.codec.checkpoint import load_checkpoint, save_checkpoint
from lic.codec.header import Header, crc_of_symbols, pack_file
from lic.codec.tables import Tables, build_tables
from lic.files import BadStream, LicError
from lic.images import dead_leaves, read_image
from lic.measure import best_within, bits_of_blocks, bits_of_symbols
from lic.metrics import psnr
from lic.pictures import enlarged, heat

FILES = sorted(path.name for path in FOLDER.glob("*.lic"))


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FOLDER / "decoded.npz"))


def decoder_of(name):
    model, meta = load_checkpoint(FOLDER / f"{name.split('_')[0]}.pt")
    return ImageCoder(model, meta["tables"], meta["fingerprint"])


def test_the_golden_files_are_no_trivial_ones(golden):
    assert len(FILES) == 6
    assert all(np.unique(golden[f"{name}.y"]).size >= 3 for name in FILES)
    escapes = {
        name: struct.unpack_from("<II", (FOLDER / name).read_bytes(), 31) for name in FILES
    }  # of z, of y
    assert escapes["codec_noise_2.lic"][1] > 100 and min(escapes["quantized_noise_0.lic"]) >= 5


@pytest.mark.parametrize("name", FILES)
def test_golden_files_decode_to_the_same_symbols_and_pixels(name, golden):
    with Recorder() as symbols:
        pixels = decoder_of(name).decode((FOLDER / name).read_bytes())
    assert np.array_equal(symbols[0], golden[f"{name}.z"]) and np.array_equal(
        symbols[1], golden[f"{name}.y"]
    )
    assert np.abs(pixels.astype(int) - golden[f"{name}.pixels"]).max() <= 1


@needs_constriction
@pytest.mark.parametrize("name", FILES)
def test_numpy_decoder_gives_the_same_symbols_and_pixels(name, golden):
    decoder = Decoder(dict(np.load(FOLDER / f"{name.split('_')[0]}.npz")))
    z, y, pixels = decoder.decode((FOLDER / name).read_bytes())
    assert np.array_equal(z, golden[f"{name}.z"]) and np.array_equal(y, golden[f"{name}.y"])
    assert np.abs(pixels.astype(int) - golden[f"{name}.pixels"]).max() <= 1


@needs_constriction
def test_numpy_decoder_rounds_no_float_input(tmp_path):
    model = quantized_codec(float_inputs=["g_s.conv4"])
    image_coder = ImageCoder(
        model,
        tables := build_tables(model),
        save_checkpoint(tmp_path / "q.pt", model, tables, "quantize", {}, 0),
    )
    export(
        argparse.Namespace(checkpoint=tmp_path / "q.pt", output=tmp_path / "q.npz", overwrite=False)
    )
    data = image_coder.encode(dead_leaves(5, 64), 2)
    decoder = Decoder(dict(np.load(tmp_path / "q.npz")))
    own = image_coder.decode(data).astype(int)

    def difference():
        return np.abs(decoder.decode(data)[2] - own).max()

    assert difference() <= 1
    decoder.float_inputs = ["g_s.conv1"]
    assert difference() > 1


def test_numpy_decoder_runs_from_the_command_line_without_torch(tmp_path, golden):
    code = (
        f"import sys, runpy; sys.modules['torch'] = None; "
        f"sys.argv = ['', {str(FOLDER / 'codec.npz')!r}, "
        f"{str(FOLDER / 'codec_leaves_0.lic')!r}, {str(tmp_path / 'a.png')!r}]; "
        f"runpy.run_path({str(ROOT / 'ports' / 'numpy_decoder.py')!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (
        np.abs(
            read_image(tmp_path / "a.png").astype(int) - golden["codec_leaves_0.lic.pixels"]
        ).max()
        <= 1
    )


@pytest.mark.parametrize("codec", ["codec", "quantized"])
def test_export_gives_the_golden_archives(codec, tmp_path):
    path = tmp_path / "a.npz"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "lic",
            "export",
            str(path),
            "--checkpoint",
            str(FOLDER / f"{codec}.pt"),
        ],
        cwd=ROOT,
        check=True,
    )
    exported, expected = dict(np.load(path)), dict(np.load(FOLDER / f"{codec}.npz"))
    assert exported.keys() == expected.keys()
    for name, array in expected.items():
        assert exported[name].dtype == array.dtype and np.array_equal(exported[name], array), name
    if codec == "quantized":
        assert exported["g_s.conv2.weight"].dtype == np.int8


def forged(**fields):
    """codec_pixel_1.lic with header fields changed and its checksum made right again."""
    data = bytearray((FOLDER / "codec_pixel_1.lic").read_bytes())
    for name, value in fields.items():
        struct.pack_into(*{"quality": ("<H", data, 5), "height": ("<I", data, 7)}[name], value)
    struct.pack_into("<I", data, 43, zlib.crc32(data[47:], zlib.crc32(data[:43])))
    return bytes(data)


def with_a_word_of_zero():
    """One more word of y, 0, at the end of the stream."""
    data = bytearray(forged()) + bytes(4)
    (words,) = struct.unpack_from("<I", data, 27)
    struct.pack_into("<I", data, 27, words + 1)
    struct.pack_into("<I", data, 43, zlib.crc32(data[47:], zlib.crc32(data[:43])))
    return bytes(data)


FORGED = [
    b"",
    b"LIC",
    forged(height=0),
    forged(height=2**31),
    forged(quality=3 * 256),
    forged(height=64 * 20),
    forged()[:-4],
    forged()[:50] + b"x" + forged()[51:],
    with_a_word_of_zero(),
]


def overflowing():
    """A file, right in all else, whose symbols make g_s overflow in float32."""
    image_coder, image = load_coder(FOLDER / "codec.pt"), read_image(FOLDER / "leaves.png")
    y, z = image_coder.latents(image, 1.0)
    return image_coder.encode_latents(3e7 * y, z, 1.0, *image.shape[:2])


def test_a_picture_that_is_no_number_is_refused():
    with pytest.raises(BadStream, match="g_s gives no number"):
        load_coder(FOLDER / "codec.pt").decode(overflowing())


@needs_constriction
@pytest.mark.parametrize("data", [*FORGED, pytest.param(overflowing, id="overflowing")])
def test_numpy_decoder_refuses_bad_files_with_a_value_error(data):
    decoder = Decoder(dict(np.load(FOLDER / "codec.npz")))
    assert len(decoder.decode(forged())) == 3  # the file itself is good
    with pytest.raises(ValueError):
        decoder.decode(data() if callable(data) else data)


@pytest.mark.parametrize(
    "name", [n for n in FILES if "noise" not in n]
)  # those were written with outliers forced
def test_encoding_again_differs_in_few_symbols_and_no_quality(name, golden):
    """Another machine may round a y the other way, and is right to."""
    codec, image, quality = name.removesuffix(".lic").split("_")
    image_coder, image = decoder_of(name), read_image(FOLDER / f"{image}.png")
    with Recorder() as symbols:
        pixels = image_coder.decode(image_coder.encode(image, float(quality)))
    changed = (symbols[1] != golden[f"{name}.y"]).sum() + (symbols[0] != golden[f"{name}.z"]).sum()
    assert changed <= 2
    assert abs(psnr(pixels, image) - psnr(golden[f"{name}.pixels"], image)) < 0.02


def test_compare_puts_four_crops_side_by_side(tmp_path, monkeypatch, capsys):
    output, arguments = tmp_path / "beside.png", ["--checkpoint", FOLDER / "codec.pt", "--crop", 64]
    compare = ["lic/__main__.py", "compare", FOLDER / "leaves.png", output, *arguments]
    assert run_script(monkeypatch, *compare, "--at", 70, 0) == 2
    assert "lies outside" in capsys.readouterr().err and not output.exists()
    assert run_script(monkeypatch, *compare[:3], tmp_path / "beside.jpg", *arguments) == 2
    assert "end the name in .png" in capsys.readouterr().err
    assert run_script(monkeypatch, *compare, "--at", 3, 5) == 0
    assert capsys.readouterr().out.count(" dB") == 3
    beside = read_image(output)  # the crops stand below their captions, which may be wider
    assert beside.shape[0] > 64 and beside.shape[1] > 4 * 64
    assert np.array_equal(beside[-64:, :64], read_image(FOLDER / "leaves.png")[5:69, 3:67])
    assert (beside[:-64, :64] == 0).any() and (beside[:-64] != 255).any()
    capsys.readouterr()
    assert run_script(monkeypatch, *compare) == 2  # an existing picture may be another photograph
    assert "replace it by --overwrite" in capsys.readouterr().err and np.array_equal(
        read_image(output), beside
    )


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_compare_takes_the_best_jpeg_and_webp_that_are_no_larger(form):
    image = read_image(FOLDER / "leaves.png")
    quality, data, decoded = best_within(image, form, 2500)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form, quality=quality + 1)
    assert 0 < quality < 99 and len(data) <= 2500 < len(buffer.getvalue())
    assert decoded.shape == image.shape and psnr(decoded, image) > 15
    assert best_within(image, form, 1)[0] == 0  # the smallest there is
    with pytest.raises(LicError, match="Pillow cannot write"):
        best_within(np.zeros((1, 70_000, 3), np.uint8), form, 2500)


@pytest.mark.parametrize("name", ["codec", "quantized"])
def test_the_map_of_bits_adds_up_to_the_file(name):
    image_coder, image = decoder_of(name), read_image(FOLDER / "leaves.png")
    y, z = image_coder.latents(image, 2.0)
    bits, side = bits_of_blocks(image_coder, y, z)
    assert side == 16 and bits.shape == y.shape[2:]
    header, coder_ends = 47, 2 * 8  # each of the two streams ends with a state of 64 bits
    size = len(image_coder.encode_latents(y, z, 2.0, *image.shape[:2]))
    assert size - header - coder_ends <= bits.sum() / 8 <= size - header


def test_a_symbol_outside_its_table_costs_the_escape_and_32_bits():
    tables = Tables(np.array([2**23, 2**22, 2**22], np.int32), np.array([3]), np.array([-1]))
    bits = bits_of_symbols(np.array([-1, 0, 1, -2]), np.zeros(4, int), tables)
    assert bits.tolist() == [1, 2, 34, 34]


def test_show_draws_the_bits_beside_the_photograph(tmp_path, monkeypatch, capsys):
    output, arguments = tmp_path / "map.png", ["--checkpoint", FOLDER / "codec.pt"]
    show = ["lic/__main__.py", "show", FOLDER / "leaves.png", output, *arguments]
    assert run_script(monkeypatch, *show) == 0
    assert "a block of 16x16 takes" in capsys.readouterr().out
    photograph, picture = read_image(FOLDER / "leaves.png"), read_image(output)
    height, width, _ = photograph.shape
    assert np.array_equal(picture[-height:, :width], photograph)
    codec = decoder_of("codec")
    blocks, side = bits_of_blocks(codec, *codec.latents(photograph, codec.level()))
    coloured = heat(enlarged(blocks, side)[:height, :width], blocks.max())
    places = range(width, picture.shape[1] - width + 1)
    assert any(np.array_equal(picture[-height:, x : x + width], coloured) for x in places)
    assert run_script(monkeypatch, *show) == 2


def test_larger_pictures_than_max_pixels_are_refused(tmp_path, monkeypatch, capsys):
    """Padded to 64x64, the pixel of pixel.png takes 4,096."""
    photograph, stream, back = FOLDER / "pixel.png", tmp_path / "a.lic", tmp_path / "a.png"
    codec = ["--checkpoint", FOLDER / "codec.pt", "--max-pixels"]
    compress = ["lic/__main__.py", "compress", photograph, stream, *codec]
    assert run_script(monkeypatch, *compress, 4095) == 2 and not stream.exists()
    assert run_script(monkeypatch, *compress, 4096) == 0
    decompress = ["lic/__main__.py", "decompress", stream, back, *codec]
    assert run_script(monkeypatch, *decompress, 4095) == 1 and not back.exists()
    assert run_script(monkeypatch, *decompress, 4096) == 0
    assert "4095" in capsys.readouterr().err


def test_four_megapixels_come_back_in_their_size():
    image = np.tile(read_image(FOLDER / "leaves.png"), (29, 23, 1))[:2559, :1601]
    image_coder = decoder_of("codec")
    data = image_coder.encode(image, 2)
    decoded = image_coder.decode(data)
    assert decoded.shape == image.shape
    assert psnr(decoded, image) > psnr(np.full_like(image, 128), image) + 3


@pytest.mark.parametrize("codec", ["codec", "quantized"])
def test_settings_of_the_decoder_change_no_symbol(codec, tmp_path):
    """tools/exactness.py on one image; on Kodak its table is in docs/notebook/."""
    (tmp_path / "leaves.png").write_bytes((FOLDER / "leaves.png").read_bytes())
    command = [
        sys.executable,
        "tools/exactness.py",
        "--data",
        tmp_path,
        "--checkpoint",
        FOLDER / f"{codec}.pt",
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(
        r"^(1 thread|oneDNN off|NCHW|batch of 3) +(\d+) +(\d+)", done.stdout, re.MULTILINE
    )
    assert len(rows) == 6 and {wrong for setting, tried, wrong in rows[:4]} == {"0"}


@pytest.mark.parametrize(
    "environment",
    [{}, {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}],
    ids=["this CPU", "as an older one"],
)
def test_files_of_the_shipped_codecs_made_on_another_machine_are_read(environment):
    """tests/golden/shipped/ was made on an AMD EPYC of the third generation (AVX2, no int8
    kernels). The second case keeps the libraries from using newer instructions: float64 sums in h_s
    then differ in their last bits (on x86)."""
    program = """if True:
        import sys
        sys.path[:0] = [".", "tests"]
        import numpy as np
        from golden.make import FOLDER, SHIPPED
        from lic.codec.bitstream import load_coder
        expected = np.load(FOLDER / "shipped" / "pixels.npz")
        for name in SHIPPED:
            data = (FOLDER / "shipped" / f"{name}.lic").read_bytes()
            pixels = load_coder(f"checkpoints/{name}.pt").decode(data)
            off = np.abs(pixels[::4, ::4].astype(int) - expected[name])
            print(name, off.max(), (off > 0).mean())"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 2 and all(
        int(most) <= 2 and float(share) < 0.01 for name, most, share in rows
    ), done.stdout


def layers():
    return dict(np.load(FOLDER / "layers.npz"))


def test_layer_vectors_are_what_the_codec_computes():
    model, _ = load_checkpoint(FOLDER / "codec.pt")
    expected, seen = layers(), {}
    for name in expected:
        if "." in name:
            model.get_submodule(name).register_forward_hook(
                lambda *hooked, name=name: seen.update({name: hooked[2]})
            )
    with torch.no_grad():
        model(padded(read_image(FOLDER / "leaves.png")[:64, :64]), torch.tensor([1.0]))
    assert len(seen) == len(expected) - 4 == 24
    for name, output in seen.items():
        torch.testing.assert_close(
            output, torch.from_numpy(expected[name]), atol=1e-4, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("name", [name for name in layers() if "." in name])
def test_layer_vectors_are_what_plain_numpy_computes(name):
    """Each layer by itself, from the output before it: the vectors and formulas that a port
    starts from."""
    vectors, arrays = layers(), dict(np.load(FOLDER / "codec.npz"))
    names = list(vectors)
    x = vectors[names[names.index(name) - 1]][0].astype(np.float64)
    network, layer = name.split(".")
    if layer.startswith("gdn"):
        output = gdn(x, arrays[f"{name}.beta"], arrays[f"{name}.gamma"], inverse=network == "g_s")
    elif layer.startswith("lrelu"):
        output = leaky_relu(x)
    elif network == "g_s" or name in ("h_s.conv1", "h_s.conv2"):
        output = deconv(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"])
    else:
        output = conv(
            x,
            arrays[f"{name}.weight"],
            arrays[f"{name}.bias"],
            1 if name in ("h_a.conv1", "h_s.conv3") else 2,
        )
    np.testing.assert_allclose(vectors[name][0], output, atol=1e-4, rtol=1e-4)


def test_the_worked_example_of_the_format_page(golden):
    """docs/bitstream.md prints a file byte by byte; here it is made from its symbols."""
    page = (ROOT / "docs" / "bitstream.md").read_text(encoding="utf-8")
    block = page.split("## Worked example")[1].split("```")[1]
    example = bytes.fromhex(
        "".join(re.match(r"([0-9a-f]{2} *)*(?= |$)", line)[0] for line in block.splitlines())
    )
    name = "codec_pixel_1.lic"
    assert example == (FOLDER / name).read_bytes()

    image_coder, (z, y) = decoder_of(name), (golden[f"{name}.{kind}"] for kind in "zy")
    _, y_index = image_coder.entropy_parameters(z.reshape(-1, 1, 1))
    z_words, _ = ans.encode(z, channel_index((len(z), 1, 1)), image_coder.tables["z"])
    y_words, _ = ans.encode(y, y_index, image_coder.tables["y"])
    header = Header(256, 1, 1, image_coder.fingerprint, (len(z_words), len(y_words), 0, 0))
    words = z_words.astype("<u4").tobytes() + y_words.astype("<u4").tobytes()
    assert example == pack_file(header, crc_of_symbols(header, z, y), words)
    fields = struct.pack(
        "<4sBHII8s4I",
        b"LIC\x89",
        2,
        256,
        1,
        1,
        header.fingerprint,
        len(z_words),
        len(y_words),
        0,
        0,
    )
    fields += struct.pack(
        "<I", zlib.crc32(y.astype("<i4"), zlib.crc32(z.astype("<i4"), zlib.crc32(fields)))
    )
    assert example == fields + struct.pack("<I", zlib.crc32(fields + words)) + words
