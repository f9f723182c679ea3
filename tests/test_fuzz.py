"""Damaged files and checkpoints: nothing but the codec's own refusal, quickly, and never a
wrong image."""

import io
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent / "golden"
sys.path[:0] = [str(FOLDER.parent.parent)]

from lic.codec.bitstream import ImageCoder
from lic.codec.checkpoint import load_checkpoint
from lic.codec.header import MAGIC, SIZE, VERSION
from lic.files import BadStream, LicError

MUTATIONS = 2000
MAX_PIXELS = 2**20


def mutate(data, others, rng):
    """One damaged version of data: flipped bits, a cut, a splice, a header edit or random bytes."""
    data = bytearray(data)
    kind = rng.integers(6)
    if kind == 0:
        for position in rng.integers(8 * len(data), size=rng.integers(1, 9)):
            data[position // 8] ^= 1 << position % 8
    elif kind == 1:
        del data[rng.integers(len(data)) :]
    elif kind == 2:
        other = others[rng.integers(len(others))]
        data = data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]
    elif (
        kind == 3
    ):  # one field after the fingerprint or before it: a size, a length, the quality, the checksum
        offset, field = [
            (5, "<H"),
            (7, "<I"),
            (11, "<I"),
            (23, "<I"),
            (27, "<I"),
            (31, "<I"),
            (35, "<I"),
            (39, "<I"),
        ][rng.integers(8)]
        (old,) = struct.unpack_from(field, data, offset)
        value = [old + 1, old - 1, 0, 2**31, rng.integers(2**16), 64 * rng.integers(64)][
            rng.integers(6)
        ]
        struct.pack_into(field, data, offset, int(value) % 2 ** (8 * struct.calcsize(field)))
    elif kind == 4:
        start = rng.integers(len(data))
        data[start : start + 8] = rng.bytes(rng.integers(1, 17))
    else:
        words = np.frombuffer(bytes(data[SIZE:]), "<u4").copy()
        rng.shuffle(words)
        data[SIZE:] = words.tobytes()
    return bytes(data)


def with_checksum(data):
    """The file's own checksum made right again, and its length: what a careful forger would do."""
    data = data[: len(data) - (len(data) - SIZE) % 4]
    data = bytearray(data)
    lengths = list(struct.unpack_from("<4I", data, 23))
    words = (len(data) - SIZE) // 4
    if sum(lengths) != words:
        lengths[1] = max(0, words - lengths[0] - lengths[2] - lengths[3])
        struct.pack_into("<4I", data, 23, *lengths)
    struct.pack_into("<I", data, 43, zlib.crc32(data[SIZE:], zlib.crc32(data[:43])))
    return bytes(data)


def test_mutated_files_are_refused_and_nothing_else_happens():
    """In a process of its own, whose peak of memory is that of the fuzzing."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def fuzz():
    coders, files = {}, []
    for path in sorted(FOLDER.glob("*.lic")):
        codec = path.name.split("_")[0]
        if codec not in coders:
            model, meta = load_checkpoint(FOLDER / f"{codec}.pt")
            coders[codec] = ImageCoder(model, meta["tables"], meta["fingerprint"])
        files.append((coders[codec], path.read_bytes()))
    intact = [coder.decode(data) for coder, data in files]
    rng = np.random.default_rng(0)
    sentences, slowest = {}, 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(MUTATIONS):
        which = rng.integers(len(files))
        image_coder, original = files[which]
        data = mutate(original, [data for _, data in files], rng)
        if k % 2 and len(data) >= SIZE:
            data = with_checksum(data)
        start = time.perf_counter()
        try:
            image = image_coder.decode(data, MAX_PIXELS)
        except BadStream as error:  # anything else fails the test
            sentence = re.sub(r"[0-9a-f.]*[0-9][0-9a-f.]*", "#", str(error))
            sentences[sentence] = sentences.get(sentence, 0) + 1
        else:  # the mutation changed nothing
            assert data == original and np.array_equal(image, intact[which])
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(
        f"{MUTATIONS} mutated files, {sum(sentences.values())} refused, "
        f"the slowest in {slowest:.2f} s, memory +{grown:.0f} MiB"
    )
    for sentence, count in sorted(sentences.items(), key=lambda item: -item[1]):
        print(f"{count:6}  {sentence}")
    assert sum(sentences.values()) > 0.95 * MUTATIONS
    assert len(sentences) >= 8  # the mutations reach every check, not only the checksum
    assert slowest < 5 and grown < 500


def test_random_bytes_are_refused():
    model, meta = load_checkpoint(FOLDER / "codec.pt")
    image_coder = ImageCoder(model, meta["tables"], meta["fingerprint"])
    rng = np.random.default_rng(1)
    for _ in range(200):
        data = rng.bytes(rng.integers(200))
        for start in (b"", MAGIC, MAGIC + bytes([VERSION])):
            with pytest.raises(BadStream):
                image_coder.decode(start + data)


@pytest.mark.parametrize("codec", ["codec", "quantized"])
def test_mutated_checkpoints_are_refused_or_mean_the_same(codec, tmp_path):
    """A zip archive has bytes that mean nothing (dates, padding); whatever loads must be the
    same codec."""
    data = (FOLDER / f"{codec}.pt").read_bytes()
    model, meta = load_checkpoint(FOLDER / f"{codec}.pt")
    intact, tables = model.state_dict(), meta["tables"]
    rng = np.random.default_rng(2)
    path = tmp_path / "a.pt"
    refused = 0
    for k in range(200):
        damaged = bytearray(data)
        if k % 4 == 0:
            del damaged[rng.integers(len(data)) :]
        else:
            for position in rng.integers(8 * len(data), size=rng.integers(1, 4)):
                damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            model, meta = load_checkpoint(path)
        except LicError as error:
            assert "a.pt" in str(error)
            refused += 1
        else:
            loaded = model.state_dict()
            assert all(torch.equal(tensor, loaded[name]) for name, tensor in intact.items())
            assert all(
                np.array_equal(a, b)
                for kind in tables
                for a, b in zip(tables[kind], meta["tables"][kind])
            )
    assert refused > 180


class Exploit:
    def __reduce__(self):
        return exec, ("open('owned', 'w')",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"format": "lic checkpoint", "version": 2, "config": Exploit()}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Exploit())):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(LicError, match="not a lic checkpoint"):
            load_checkpoint(tmp_path / "a.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


if __name__ == "__main__":
    fuzz()
