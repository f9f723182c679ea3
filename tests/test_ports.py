"""ports/decoder.c, built and run where there is a C compiler; and what the files for ports guard.

python tests/test_ports.py        1,000 damaged files and 200 damaged archives, with sanitizers
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "ports")]

from golden.make import FOLDER
from golden.mistakes import FLOAT_MISTAKES, INTEGER_MISTAKES, MistakenDecoder
from helpers import needs_constriction
from numpy_decoder import Decoder, conv, deconv, gdn, leaky_relu
from PIL import Image
from test_fuzz import mutate, with_checksum
from test_golden import FORGED

from lic import SHIPPED
from lic.__main__ import export
from lic.codec import fast
from lic.codec.bitstream import load_coder
from lic.codec.checkpoint import load_checkpoint
from lic.codec.integer import IntegerHyperSynthesis

COMPILER = shutil.which("cc")
FILES = sorted(path.name for path in FOLDER.glob("*.lic"))
SANITIZERS = ["-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def build(folder, *options):
    """ports/decoder.c as a program, or None where it cannot be built so."""
    program, source = folder / "decoder", ROOT / "ports" / "decoder.c"
    command = [COMPILER, "-std=c99", "-O2", *options, "-o", program, source, "-lm"]
    built = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return None if built.returncode else program


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C compiler (cc) here: ports/decoder.c is not tried")
    program = build(tmp_path_factory.mktemp("c"), "-Wall", "-Wextra", "-Werror")
    assert program, "ports/decoder.c does not compile without warnings"
    return program


def decode(program, archive, file, ppm):
    no_leaks = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # what is left is freed by the exit
    command = [program, archive, file, ppm]
    return subprocess.run(command, env=no_leaks, capture_output=True, text=True)


@pytest.mark.parametrize("name", FILES)
def test_c_decodes_the_golden_files(decoder, name, tmp_path):
    archive = FOLDER / f"{name.split('_')[0]}.npz"
    done = decode(decoder, archive, FOLDER / name, tmp_path / "a.ppm")
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(tmp_path / "a.ppm")).astype(int)
    expected = np.load(FOLDER / "decoded.npz")[f"{name}.pixels"]
    assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= 1


def test_c_decodes_a_file_of_the_shipped_codec(decoder, tmp_path):
    archive, file = tmp_path / "codec.npz", FOLDER / "shipped" / "quantized.lic"
    export(argparse.Namespace(checkpoint=SHIPPED, output=archive, overwrite=False))
    done = decode(decoder, archive, file, tmp_path / "a.ppm")
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(tmp_path / "a.ppm")).astype(int)[::4, ::4]
    expected = np.load(FOLDER / "shipped" / "pixels.npz")["quantized"]
    assert np.abs(pixels - expected).max() <= 2


def damaged(data, rng):
    """With flipped bits or bytes, cut off, or with a piece moved."""
    data, kind = bytearray(data), rng.integers(4)
    if kind == 0:
        for position in rng.integers(8 * len(data), size=rng.integers(1, 20)):
            data[position // 8] ^= 1 << position % 8
    elif kind == 1:
        del data[rng.integers(len(data)) :]
    else:  # in the headers of an archive or in its directory, where the numbers are that matter
        start = rng.integers(256) if kind == 2 else len(data) - rng.integers(1, 8000)
        data[start : start + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes()
    return bytes(data)


def damage(program, folder, files, archives):
    """How many of so many damaged files and archives the program refuses; it must not crash.

    And what it says. Every second file's own checksum is made right again. A damaged archive may
    still be one: its numbers have no checksum.
    """
    rng, refused, said = np.random.default_rng(0), [0, 0], set()
    originals = [(FOLDER / name).read_bytes() for name in FILES]
    path, ppm = folder / "damaged", folder / "a.ppm"
    for k in range(files + archives):
        of_archive = k >= files
        name = FILES[k % len(FILES)]
        archive, data = FOLDER / f"{name.split('_')[0]}.npz", (FOLDER / name).read_bytes()
        if of_archive:
            path.write_bytes(damaged(archive.read_bytes(), rng))
            done = decode(program, path, FOLDER / name, ppm)
        else:
            data = mutate(data, originals, rng)
            path.write_bytes(with_checksum(data) if k % 2 and len(data) >= 47 else data)
            done = decode(program, archive, path, ppm)
        assert done.returncode in (0, 1), (k, done.returncode, done.stderr)
        assert done.returncode == 0 or done.stderr.startswith("error: "), (k, done.stderr)
        refused[of_archive] += done.returncode
        said.add(done.stderr)
    return *refused, said


@pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc) here")
@pytest.mark.parametrize("name, value", [("log_inverse_gain", 1e4), ("h_s.conv3.bias", np.nan),
    ("log_inverse_gain", -np.inf)])  # fmt: skip
def test_c_writes_no_picture_of_what_is_no_number(name, value, tmp_path):
    program = build(tmp_path, *SANITIZERS) or build(tmp_path)
    arrays = dict(np.load(FOLDER / "codec.npz"))
    arrays[name] = np.full_like(arrays[name], value)
    np.savez(tmp_path / "a.npz", **arrays)
    done = decode(program, tmp_path / "a.npz", FOLDER / "codec_leaves_0.lic", tmp_path / "a.ppm")
    assert done.returncode == 1 and " no number" in done.stderr
    assert not (tmp_path / "a.ppm").exists()


@pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc) here")
def test_c_refuses_what_is_damaged_and_touches_no_memory_but_its_own(tmp_path):
    program = build(tmp_path, *SANITIZERS) or build(tmp_path)
    files, archives, said = damage(program, tmp_path, files=100, archives=60)
    assert files >= 98 and archives > 20
    assert len(said) > 15 and "error: the symbols are not the encoder's\n" in said


@pytest.mark.parametrize("data", FORGED)
def test_c_refuses_forged_files(data, decoder, tmp_path):
    (tmp_path / "a.lic").write_bytes(data)
    done = decode(decoder, FOLDER / "codec.npz", tmp_path / "a.lic", tmp_path / "a.ppm")
    assert done.returncode == 1 and done.stderr.startswith("error: ")


@pytest.mark.parametrize("key, value", [("weight_bits", 80), ("more", 1)])
def test_c_refuses_a_quantization_that_it_does_not_know(key, value, decoder, tmp_path):
    arrays = dict(np.load(FOLDER / "quantized.npz"))
    about = json.loads(str(arrays["about"]))
    about["quantization"][key] = value
    np.savez(tmp_path / "a.npz", **arrays | {"about": json.dumps(about)})
    done = decode(
        decoder, tmp_path / "a.npz", FOLDER / "quantized_leaves_2.lic", tmp_path / "a.ppm"
    )
    assert done.returncode == 1 and "does not know the quantization" in done.stderr


EXACT = {"float": FOLDER / "codec.npz", "integer": FOLDER / "exact" / "integer.npz"}
MISTAKES = [("float", name, mistake) for name, mistake in FLOAT_MISTAKES.items()]
MISTAKES += [("integer", name, mistake) for name, mistake in INTEGER_MISTAKES.items()]


def exact_file(kind):
    return FOLDER / "exact" / f"{kind}.lic"


@needs_constriction
@pytest.mark.parametrize("kind", EXACT)
def test_the_exact_files_are_read_by_numpy_and_c(kind, decoder, tmp_path):
    arrays, data = dict(np.load(EXACT[kind])), exact_file(kind).read_bytes()
    Decoder(arrays).decode(data)
    MistakenDecoder(arrays).decode(data)  # with no mistake
    done = decode(decoder, EXACT[kind], exact_file(kind), tmp_path / "a.ppm")
    assert done.returncode == 0, done.stderr


@needs_constriction
@pytest.mark.parametrize(
    "kind, mistake", [row[::2] for row in MISTAKES], ids=[row[1] for row in MISTAKES]
)
def test_the_exact_files_refuse_each_mistake(kind, mistake):
    decoder = MistakenDecoder(dict(np.load(EXACT[kind])), **mistake)
    with pytest.raises(ValueError):
        decoder.decode(exact_file(kind).read_bytes())


def test_the_codec_reads_the_exact_float_file():
    load_coder(FOLDER / "codec.pt").decode(exact_file("float").read_bytes())


@needs_constriction
@pytest.mark.parametrize("kernels", ["float64", "int8"])
def test_the_codec_finds_the_tables_of_the_exact_integer_file(kernels):
    exact = dict(np.load(EXACT["integer"]))
    model, _ = load_checkpoint(FOLDER / "quantized.pt")
    for name in ("h_s.conv1", "h_s.conv2", "h_s.conv3"):
        multiplier = torch.from_numpy(exact[f"{name}.multiplier"])
        model.get_submodule(name).multiplier.copy_(multiplier)
    h_s = IntegerHyperSynthesis(model.h_s)
    if kernels == "int8":
        if not fast.available():
            pytest.skip("no exact int8 kernel on this CPU")
        for k, layer in enumerate(fast.h_s_layers(model.h_s)):
            if k:  # the first reads z, which may be wider than 16 bits
                h_s.layers[k] = fast.Int8IntegerConvolution(h_s.layers[k], layer)
    z, _, _ = Decoder(exact).decode(exact_file("integer").read_bytes())
    z = z.reshape(-1, 5, 25)
    mean, index = Decoder(exact).integer_h_s(z)
    with torch.no_grad():
        our_mean, our_index = h_s(torch.from_numpy(z).double()[None])
    assert np.array_equal(our_mean[0].numpy(), mean)
    assert np.array_equal(our_index[0].numpy(), index)


def test_quantized_layer_vectors_are_what_plain_numpy_computes():
    """Each layer from the output before it, as a port would try them."""
    vectors, arrays = (
        dict(np.load(FOLDER / "layers_quantized.npz")),
        dict(np.load(FOLDER / "quantized.npz")),
    )
    x = vectors["z"][0].astype(np.float64)
    for name in ("h_s.conv1", "h_s.conv2", "h_s.conv3"):
        weight, bias = (arrays[f"{name}.{part}"] for part in ("weight", "integer_bias"))
        multiplier = arrays[f"{name}.multiplier"][:, None, None]
        if name == "h_s.conv3":
            mean, index = np.split(np.rint(conv(x, weight * 1.0, bias, 1) * multiplier), 2)
        else:
            sums = leaky_relu(deconv(x, weight * 1.0, bias))
            made = np.clip(np.rint(sums * multiplier), -8224, 57311)
            assert np.array_equal(vectors[name][0], made)
            x = vectors[name][0].astype(np.float64)
    assert np.array_equal(vectors["mean"][0], mean / 4096)
    assert np.array_equal(vectors["index"][0], np.clip(index, 0, 63))

    symbols = np.load(FOLDER / "decoded.npz")
    assert np.array_equal(vectors["z"].ravel(), symbols["quantized_leaves_2.lic.z"])
    assert np.array_equal(vectors["y"].ravel(), symbols["quantized_leaves_2.lic.y"])
    gain = np.exp(arrays["log_inverse_gain"][2])[:, None, None]
    y_hat = (vectors["y"][0] + vectors["mean"][0]) * gain
    np.testing.assert_allclose(vectors["g_s"][0], y_hat, atol=1e-5, rtol=1e-5)

    decoder, x = Decoder(arrays), vectors["g_s"][0]
    for k in (1, 2, 3, 4):
        made = decoder.layer(f"g_s.conv{k}", x)
        x = vectors[f"g_s.conv{k}"][0]
        np.testing.assert_allclose(x, made, atol=1e-4, rtol=1e-4)
        if k < 4:
            beta, gamma = (arrays[f"g_s.gdn{k}.{part}"] for part in ("beta", "gamma"))
            made = gdn(x, beta, gamma, inverse=True)
            x = vectors[f"g_s.gdn{k}"][0]
            np.testing.assert_allclose(x, made, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder), *SANITIZERS)
        if program is None:
            sys.exit("no C compiler here that has these sanitizers")
        files, archives, _ = damage(program, Path(folder), files=1000, archives=200)
    print(f"refused: {files} of 1000 damaged files, {archives} of 200 damaged archives; no crash")
