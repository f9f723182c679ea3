"""Several processes train one codec, each on its share of every batch.

    torchrun --nproc-per-node 2 train.py --data photos/        likewise prune.py and quantize.py

All have the same weights and draw the same random numbers; each computes the gradient of its share,
and the mean over the processes is the gradient of the whole batch, since the loss is a mean and the
shares are equally large. So n processes take the steps that one would, but for the order in which
floats are added, and a run may be resumed on another number of them.

torchrun tells each process its RANK and where to meet. Process 0 alone prints and saves.
Left out: weights or optimizer states divided among the processes; this codec is small.
"""

import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from lic.files import LicError
from lic.program import PatientLog

PATIENCE = timedelta(hours=12)  # for process 0 to decode the photographs


class Lost(LicError):
    """Another process has ended."""


def process_count():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0)) if process_count() > 1 else 0


def check_batch(batch):
    if batch % process_count():
        raise LicError(
            f"--batch {batch} cannot be shared among {process_count()} processes; "
            "make it a multiple"
        )


def join_group():
    """Wait until all processes are here, once; then, and from then on, only process 0 prints.

    Process 0 comes when it has checked the arguments and opened the photographs, the others before:
    so what is wrong is said once, and the photographs are decoded once.
    """
    if process_count() == 1 or distributed.is_initialized():
        return
    if rank() > 0:
        sys.stdout = PatientLog(None)
    print(f"waiting until all {process_count()} processes are here", flush=True)
    # torch waits where no handler of Python's is run
    handlers = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        distributed.init_process_group(timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise LicError(f"the processes do not meet ({reason}); start them by torchrun") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def same_start(model, optimizer, step):
    """Give all processes the weights of process 0, and the optimizer's logarithms of scales.

    Raises LicError if one of them is at another step.
    """
    if process_count() == 1:
        return
    first = torch.tensor(step)
    with nobody_lost():
        distributed.broadcast(first, 0)
        for tensor in [*model.state_dict().values(), *optimizer.logs]:
            plain = tensor.contiguous()  # channels_last is not sent
            distributed.broadcast(plain, 0)
            tensor.copy_(plain)
    if step != first:
        raise LicError(
            f"process {rank()} goes on from step {step}, process 0 from {first.item()}: "
            "all must see the same folder of --out"
        )


def average_gradients(model, interrupted):
    """Replace each gradient by its mean over the processes.

    Returns whether any of them was `interrupted`, so that all stop together: a tensor (), 0 if not.
    """
    names, parameters = zip(*model.named_parameters())
    flag = parameters[0].new_full((1,), bool(interrupted))
    if process_count() == 1:
        return flag[0]
    flat = torch.cat([p.grad.flatten() for p in parameters] + [flag])
    with nobody_lost():
        distributed.all_reduce(flat)
    flat /= process_count()
    *gradients, flag = flat.split([p.numel() for p in parameters] + [1])
    for name, parameter, gradient in zip(names, parameters, gradients):
        if name.endswith("input_scale"):  # the root of the share's size is in it: eight_bits.py
            gradient /= process_count() ** 0.5
        parameter.grad = gradient.view(parameter.shape)
    return flag[0]


def wait_for_all():
    """Wait until process 0 has saved: if another process ended before, torchrun would end it."""
    if process_count() > 1:
        with nobody_lost():
            distributed.barrier()


def leave_group():
    """From here on each process is alone."""
    if process_count() > 1:
        distributed.destroy_process_group()


@contextmanager
def nobody_lost():
    """Within it a LicError if another process has ended, which torch notices as it waits for it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise Lost(
            f"another process has ended or cannot be reached ({reason}); "
            "go on from the last save, if there is one, with --resume"
        ) from error


@contextmanager
def told_once():
    """What stops all processes alike is told by process 0; the others end without a word."""
    try:
        yield
    except LicError as error:
        if rank() == 0 or isinstance(error, Lost):
            raise
        sys.exit(error.status)
