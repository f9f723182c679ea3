"""Several processes train as one does, and what stops one stops all."""

import argparse
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, lively_codec, photo_like, quantized_codec, run_script

from lic.codec.entropy import add_noise
from lic.files import LicError
from lic.images import dead_leaves
from lic.train import processes
from lic.train.batches import ahead, batches_of
from lic.train.loss import rate_distortion
from lic.train.optimizer import Optimizer
from lic.train.state import read_state

TRAIN = ["train.py", "--batch", 2, "--crop", 64, "--steps", 20, "--save-every", 2]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(*command):
    """The processes that torchrun would start."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = []
    for rank in range(2):
        environment = os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, *map(str, command)]
        started.append(subprocess.Popen(words, cwd=ROOT, env=environment, **pipes))
    return started


def ends(started):
    """Status, stdout and stderr of each."""
    texts = [process.communicate(timeout=120) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, photos):
    """The output of one process that was never stopped."""
    out = tmp_path_factory.mktemp("straight") / "one.pt"
    with pytest.MonkeyPatch.context() as patch:
        assert run_script(patch, *TRAIN, "--data", photos, "--out", out) == 0
    return out


def weights(out):
    return read_state(f"{out}.state", "no state")["model"]


def assert_close(a, b):
    """Equal but for the order in which floats were added; the steps moved kernels by about 0.01."""
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=5e-5, msg=name)


def test_two_processes_take_the_steps_of_one(straight, tmp_path, photos):
    two = tmp_path / "two.pt"
    (first, text, _), other = ends(start_two(*TRAIN, "--data", photos, "--out", two))
    assert first == 0 and text.count("decoding") == 1 and f"wrote {two}" in text
    assert other == (0, "", "")
    assert_close(weights(straight), weights(two))


def test_a_run_goes_on_on_another_number_of_processes(straight, tmp_path, photos, monkeypatch):
    out = tmp_path / "broken.pt"
    command = [*TRAIN, "--data", photos, "--out", out]
    started = start_two(*command)
    assert any("saved" in line for line in started[0].stdout)
    started[1].send_signal(signal.SIGTERM)
    (status, _, error), other = ends(started)
    step = read_state(f"{out}.state", "no state")["step"]
    assert (status, error) == (130, f"error: interrupted after step {step}; go on with --resume\n")
    assert other == (130, "", "") and 2 <= step < 20

    started = start_two(*command, "--resume")
    assert any("saved" in line for line in started[0].stdout)
    started[1].kill()
    (status, _, error), _ = ends(started)
    assert status == 2 and error.startswith("error: another process has ended")
    assert error.count("\n") == 1 and not out.exists()
    assert step < read_state(f"{out}.state", "no state")["step"] < 20

    assert run_script(monkeypatch, *command, "--resume") == 0
    assert_close(weights(straight), weights(out))


def test_the_noise_of_the_shares_is_that_of_the_batch():
    for layout in (torch.contiguous_format, torch.channels_last):
        for size in ((8, 5, 4, 3), (8, 5, 1, 1)):
            y = torch.zeros(size).contiguous(memory_format=layout)
            torch.manual_seed(1)
            whole = torch.rand_like(y) - 0.5
            for k in range(4):
                torch.manual_seed(1)
                assert torch.equal(
                    add_noise(y[2 * k : 2 * k + 2], (k, 4)), whole[2 * k : 2 * k + 2]
                )


def test_the_shares_of_a_batch_are_the_batch():
    args = argparse.Namespace(seed=3, batch=4, crop=32, device="cpu")
    images = [dead_leaves(seed, 64) for seed in range(3)]
    (whole,) = batches_of([7], images, 4, args, (0, 1))
    halves = [next(batches_of([7], images, 4, args, (k, 2))) for k in range(2)]
    assert all(half.noise == whole.noise for half in halves)
    assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)
    assert torch.equal(torch.cat([half.level for half in halves]), whole.level)


@pytest.mark.parametrize("make", [lively_codec, quantized_codec])
def test_the_mean_of_the_shares_gradients_is_that_of_the_batch(make, monkeypatch):
    model = make().double().train()  # in float32 a last bit may round an 8-bit input elsewhere
    x = torch.cat([photo_like(), photo_like().flip(3)]).double()
    level = torch.tensor([0.0, 2.0], dtype=torch.float64)
    sent = []

    def backward(k, n):
        torch.manual_seed(5)
        own = slice(2 * k // n, 2 * (k + 1) // n)
        model.zero_grad()
        out = model(x[own], level[own], (k, n))
        rate_distortion(out, x[own], 0.01)[0].mean().backward()

    def all_reduce(flat):  # of two processes, one after the other
        sent.append(flat.clone())
        flat.copy_(sum(sent))

    backward(0, 1)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes.distributed, "all_reduce", all_reduce)
    backward(0, 2)
    assert not processes.average_gradients(model, [])
    backward(1, 2)
    assert processes.average_gradients(model, [signal.SIGINT])
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def test_all_begin_with_the_weights_and_the_scales_of_the_first(monkeypatch):
    first, other = (quantized_codec().to(memory_format=torch.channels_last) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    ours, theirs = Optimizer(first), Optimizer(other)
    sent = iter([torch.tensor(0), *first.state_dict().values(), *ours.logs])
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.distributed, "broadcast", lambda tensor, _: tensor.copy_(next(sent))
    )
    processes.same_start(other, theirs, 0)
    for mine, yours in zip(first.state_dict().values(), other.state_dict().values()):
        assert torch.equal(mine, yours)
    assert theirs.logs and all(map(torch.equal, ours.logs, theirs.logs))


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_script(monkeypatch, *TRAIN, "--out", tmp_path / "a.pt") == 2
    assert "--batch 2 cannot be shared among 4 processes" in capsys.readouterr().err


def test_a_thread_is_one_ahead_and_changes_nothing():
    used, made = [], []

    def make(number):
        made.append(number)
        if number == 9:
            raise LicError("nine")
        return number * number

    for value in ahead(make, range(4)):
        used.append(value)
    assert used == [0, 1, 4, 9] and made == [0, 1, 2, 3] and list(ahead(make, [])) == []
    with pytest.raises(LicError, match="nine"):
        list(ahead(make, [8, 9]))
