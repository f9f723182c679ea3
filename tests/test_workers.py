"""evaluate.py --workers: processes side by side."""

import json
import os

import pytest
from helpers import ROOT, run_script
from PIL import Image

from lic.codec.bitstream import load_coder
from lic.files import LicError
from lic.images import dead_leaves
from lic.measure import crew

CHECKPOINT = ROOT / "tests" / "golden" / "quantized.pt"
SECONDS = ("encode_seconds", "decode_seconds")


def end_at_once(coder, number):
    os._exit(1)


def refuse(coder, number):
    raise LicError(f"number {number} is refused")


def name_process(coder, number):
    return number, os.getpid(), coder.amp


def test_two_processes_measure_what_one_measures(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        Image.fromarray(dead_leaves(seed, 64 + 30 * seed)).save(photos / f"{seed}.png")
    results = []
    for workers in (1, 2):
        out, record = tmp_path / f"{workers}.json", tmp_path / f"record{workers}.json"
        command = ["evaluate.py", CHECKPOINT, "--data", photos, "--workers", workers]
        assert run_script(monkeypatch, *command, "--json", out, "--record", record) == 0
        levels = json.loads(out.read_text())["checkpoints"][0]["levels"]
        for level in levels:
            assert all(level.pop(name) > 0 for name in SECONDS)
        results.append(levels)
        assert len(json.loads(record.read_text())["measured"]) == 3 * len(levels)
    assert results[0] == results[1]


def test_results_come_in_order_and_errors_come_through():
    coder = load_coder(CHECKPOINT)
    with crew(CHECKPOINT, coder, workers=2) as each:
        results = list(each(name_process, [(number,) for number in range(6)]))
        assert [number for number, _, _ in results] == list(range(6))
        assert os.getpid() not in {process for _, process, _ in results}
        with pytest.raises(LicError, match="number 3 is refused"):
            list(each(refuse, [(3,)]))


def test_a_process_that_dies_is_a_sentence():
    with pytest.raises(LicError, match="has ended.*fewer --workers"):
        with crew(CHECKPOINT, load_coder(CHECKPOINT), workers=2) as each:
            list(each(end_at_once, [(1,), (2,)]))
