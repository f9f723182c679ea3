"""Killed at any moment, a command leaves the old file or the new one, never half of one.

A child process runs the real command and kills itself with SIGKILL at its n-th write, at the worst
moments (file opened, half written, written but not renamed, just renamed); and another at random
times.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from golden.make import FOLDER
from helpers import ROOT, run_script

from lic.codec.bitstream import ImageCoder
from lic.codec.checkpoint import load_checkpoint
from lic.train.state import read_state

MOMENTS = ["opened", "half", "written", "renamed"]
CHILD = """
import builtins, os, runpy, signal, sys
moment, countdown, script, *sys.argv[1:] = sys.argv[1:]
countdown = int(countdown)
real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class HalfWritten:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, data):
        global countdown
        countdown -= 1
        if countdown == 0 and moment == "opened":
            die()
        if countdown == 0 and moment == "half":
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()
        self.file.write(data)
    def flush(self):
        self.file.flush()
    def fileno(self):
        return self.file.fileno()

def opener(path, mode="r", *more, **options):
    file = real_open(path, mode, *more, **options)
    return HalfWritten(file) if mode == "wb" and str(path).endswith(".tmp") else file

def fsync(descriptor):
    real_fsync(descriptor)
    if countdown == 0 and moment == "written":
        die()

def replace(old, new):
    real_replace(old, new)
    if countdown == 0 and moment == "renamed":
        die()

builtins.open, os.fsync, os.replace = opener, fsync, replace
if script == "lic":
    runpy.run_module("lic", run_name="__main__")
else:
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
"""


def run_and_kill(moment, countdown, script, *arguments):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, moment, str(countdown), script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-500:]


@pytest.mark.parametrize("moment", MOMENTS)
def test_compress_killed_while_writing(moment, tmp_path):
    output = tmp_path / "a.lic"
    output.write_bytes(b"the old file")
    run_and_kill(
        moment,
        1,
        "lic",
        "compress",
        "--overwrite",
        FOLDER / "leaves.png",
        output,
        "--quality",
        0,
        "--checkpoint",
        FOLDER / "codec.pt",
    )
    if moment == "renamed":
        model, meta = load_checkpoint(FOLDER / "codec.pt")
        decoded = ImageCoder(model, meta["tables"], meta["fingerprint"]).decode(output.read_bytes())
        assert decoded.shape == (90, 70, 3)
    else:
        assert output.read_bytes() == b"the old file"


TRAINING = ["--steps", 3, "--batch", 1, "--crop", 64, "--save-every", 1]
STAGES = {  # stage: arguments that make OUT.state three times and then OUT
    "train": ["--preset", "tiny"],
    "prune": ["--checkpoint", FOLDER / "codec.pt", "--control"],
    "quantize": ["--checkpoint", FOLDER / "codec.pt"],
}


@pytest.mark.parametrize(
    "stage, moment",
    [("train", "half"), ("train", "written"), ("prune", "half"), ("quantize", "opened")],
)
def test_a_stage_killed_while_saving_goes_on_from_the_save_before(
    stage, moment, tmp_path, photos, monkeypatch
):
    """Killed at its second save, then at its third; then it ends, as if never stopped."""
    command = [f"{stage}.py", *STAGES[stage], *TRAINING, "--data", photos]
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    assert run_script(monkeypatch, *command, "--out", whole) == 0
    run_and_kill(moment, 2, *command, "--out", killed)
    assert (
        run_script(monkeypatch, *command, "--out", killed) == 2
    )  # without --resume it would be written over
    assert read_state(f"{killed}.state", "")["step"] == 1 and not killed.exists()
    run_and_kill(moment, 2, *command, "--out", killed, "--resume")
    assert read_state(f"{killed}.state", "")["step"] == 2 and not killed.exists()
    assert run_script(monkeypatch, *command, "--out", killed, "--resume") == 0
    assert load_checkpoint(killed)[1]["fingerprint"] == load_checkpoint(whole)[1]["fingerprint"]


def test_files_stay_whole_under_kills_at_random_times(tmp_path):
    """A process that does nothing but write, killed twenty times after random delays."""
    path = tmp_path / "a.bin"
    code = (
        "import itertools\n"
        "from lic.files import write_bytes\n"
        f"for k in itertools.cycle(range(256)): write_bytes({str(path)!r}, bytes([k]) * 300_000)"
    )
    delays = random.Random(0)
    for _ in range(20):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        while not path.exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.05))
        child.kill()
        child.wait()
        data = path.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1
