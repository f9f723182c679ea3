"""The loop that all training stages share: train, fine-tune, train with rounded activations.

Noise for the rate and straight-through rounding for what enters g_s (Minnen and Singh,
arXiv:2007.08739); one optimizer, no auxiliary loss. `--resume` goes on as if never stopped, to the
last bit on a CPU with as many threads (a GPU adds up in no fixed order): state.py.
"""

import hashlib
import math
import signal
from contextlib import contextmanager
from pathlib import Path

import torch

from lic.files import LicError
from lic.images import in_unit_range
from lic.program import STOP_SIGNALS, choose_gpu, warn_of_slow_bf16
from lic.train.batches import batches_of
from lic.train.loss import level_weights, mean_loss, rate_distortion
from lic.train.optimizer import Optimizer
from lic.train.processes import (
    average_gradients,
    leave_group,
    process_count,
    rank,
    same_start,
    told_once,
    wait_for_all,
)
from lic.train.progress import Progress
from lic.train.schedule import learning_rate
from lic.train.state import load_state, save_state, state_path

# what a state must have been trained with, in words: change it when a step computes anything else
RECIPE = "Muon in float32 and Adam, leaky ReLU, decline over two thirds"


class Interrupted(LicError):
    """Ctrl-C, or a signal that asks to stop; what was trained is saved."""

    status = 130


def run_settings(model, train, args, origin):
    """What --resume must find unchanged: plain values, each by the name that a refusal gives it."""
    options = ("steps", "batch", "crop", "lr", "amp", "seed")
    settings = {option: vars(args)[option] for option in options}
    settings |= {
        "data": args.data and Path(args.data).resolve().name,
        "images": hashlib.sha256(b"".join(train.digests)).hexdigest(),
        "config": model.config,
        "quantization": model.quantization,
        "recipe": RECIPE,
    }
    return settings | origin


@told_once()
def fit(model, train, held_out, args, **origin):
    """Train `model` in place for args.steps steps; args as `add_training_arguments` gives them.

    train: Images; held_out: (B, 3, H, W), whose J is printed at each save; origin: what else the
    weights at step 0 came from, by name, so that --resume notices another. Saves to OUT.state at
    intervals, and on Ctrl-C, SIGTERM or SIGHUP before it raises Interrupted.
    Raises LicError within a step of a gradient that is not finite. Returns the number of steps
    done: args.steps, or fewer with --finish.
    Several processes (processes.py) end with the same weights; only the first measures and saves.
    """
    if args.device == "cuda":
        choose_gpu()
    if args.amp and args.device == "cpu" and rank() == 0:
        warn_of_slow_bf16()
    settings = run_settings(model, train, args, origin)
    path = state_path(args.out)
    torch.backends.cudnn.benchmark = True  # the shapes never change
    model.to(args.device, memory_format=torch.channels_last)
    forward = compiled(model) if args.compile else model
    held_out = held_out.to(args.device)
    optimizer = Optimizer(model)
    # without further steps only quantize.py looks at photographs: it rounds the weights by them
    any_images = args.finish and not model.quantization
    first = load_state(path, model, optimizer, settings, any_images) if args.resume else 0
    same_start(model, optimizer, first)
    lambdas = torch.tensor(model.lambdas, device=args.device)
    level_weight = level_weights(model.lambdas).to(args.device)
    if not args.resume and rank() == 0:  # an older run's state is not what this one goes on from
        Path(path).unlink(missing_ok=True)
    last = first if args.finish else args.steps
    part = (rank(), process_count())
    batches = batches_of(range(first, last), train, len(lambdas), args, part)
    progress, before = Progress(args.steps, first), None
    with signals_kept() as received:
        for step, (noise, pixels, level) in enumerate(batches, first):
            torch.manual_seed(noise)
            x = in_unit_range(pixels.to(args.device, non_blocking=True))  # (b, 3, crop, crop)
            level = level.to(args.device, non_blocking=True)  # (b,)

            model.train()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                out = forward(x, level.float(), part)
            J, y_bpp, z_bpp, mse = rate_distortion(out, x, lambdas[level])
            loss = (level_weight[level] * J).mean()
            loss.backward()
            interrupted = average_gradients(model, received)
            norm = optimizer.step(learning_rate(step, args.steps, args.lr))
            with torch.no_grad():
                psnr = -10 * torch.log10(mse)
                progress.update(loss=loss, bpp_y=y_bpp.mean(), bpp_z=z_bpp.mean(), psnr=psnr.mean())

            done = step + 1
            outcome = Outcome(step, loss.detach(), norm, interrupted)
            # a GPU would have to be waited for: what the step before gave is known by now
            stopping = before is not None and before.is_interrupted(path)
            if stopping or done == args.steps or done % args.save_every == 0:
                stopping = outcome.is_interrupted(path) or stopping
                if rank() == 0:
                    save(model, optimizer, held_out, done, settings, args)
                wait_for_all()
            before = outcome
            if stopping:
                raise Interrupted(f"interrupted after step {done}; go on with --resume")
    leave_group()
    model.to("cpu").eval()
    return last


def save(model, optimizer, held_out, done, settings, args):
    """Write OUT.state, unless held-out J, which is printed, shows that the weights are spoilt."""
    path = state_path(args.out)
    J = mean_loss(model, held_out, args.amp)
    if not J.isfinite().all():
        raise LicError(
            f"after step {done} held-out J is not finite; {remedy_for_spoilt_weights(path)}"
        )
    save_state(path, model, optimizer, done, settings, vars(args))
    print(f"saved {path}  held-out J a level:", *(f"{v:.4f}" for v in J), flush=True)


class Outcome:
    """What a step tells of itself, on its way from a GPU while the next step runs."""

    def __init__(self, step, loss, norm, interrupted):
        figures = torch.stack([loss, norm, interrupted])
        self.step, self.figures = step, figures.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if figures.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def is_interrupted(self, path):
        """Was any process? Raises LicError if the step has spoilt the weights: so none are saved.

        path: of the last save, to go on from.
        """
        if self.arrival:
            self.arrival.synchronize()
        loss, norm, interrupted = self.figures.tolist()
        if not math.isfinite(norm):  # the last save is not spoilt
            raise LicError(
                f"at step {self.step} the loss is {loss} and its gradient's norm {norm}; "
                f"{remedy_for_spoilt_weights(path)}"
            )
        return interrupted > 0


def compiled(model):
    """The model's forward, compiled; LicError where torch cannot, for want of a compiler, say."""
    # a step is a thousand small kernels, which take longer to launch than to run on a GPU;
    # this mode records them as CUDA graphs
    fused = torch.compile(model, mode="reduce-overhead")

    def forward(x, level, part):
        try:
            return fused(x, level, part)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise LicError(f"--compile does not work here ({reason}); give --no-compile") from error

    return forward


def remedy_for_spoilt_weights(path):
    if Path(path).exists():
        return f"go on from {path} with --resume and a smaller --lr"
    return "start again with a smaller --lr"


@contextmanager
def signals_kept():
    """Yields a list; SIGINT, SIGTERM and SIGHUP append to it and do nothing else.

    So a step and its save are not cut in two.
    """
    received, before = [], {}
    for number in (signal.SIGINT, *STOP_SIGNALS):
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, lambda signum, frame: received.append(signum))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
