"""The loop that all training stages share: train, fine-tune, train with rounded activations.

Noise for the rate and straight-through rounding for what enters g_s (Minnen and Singh,
arXiv:2007.08739); one optimizer, no auxiliary loss. `--resume` goes on as if never stopped, to the
last bit on a CPU with as many threads (a GPU adds up in no fixed order): state.py.
"""

import hashlib
import math
import shlex
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from lic.codec import structure
from lic.files import LicError
from lic.images import in_unit_range
from lic.options import multiple_of, positive_number, positive_whole_number, whole_number
from lic.photographs import load_images
from lic.program import warn_of_slow_bf16
from lic.train.batches import batches_of
from lic.train.loss import level_weights, mean_loss, rate_distortion
from lic.train.optimizer import Optimizer
from lic.train.processes import (
    average_gradients,
    choose_gpu,
    count,
    meet,
    part,
    rank,
    same_start,
    told_once,
    wait_for_all,
)
from lic.train.schedule import learning_rate
from lic.train.state import load_state, save_state, state_path

# what a state must have been trained with, in words: change it when a step computes anything else
RECIPE = "Muon in float32 and Adam, leaky ReLU, decline over two thirds"
HELD_OUT_CROPS = 16  # of other images, on which J is reported


class Interrupted(LicError):
    status = 130


def add_training_arguments(parser, steps, lr, out):
    """The options of a stage that trains; steps, lr and out are that stage's defaults."""
    # fmt: off
    add, stride = parser.add_argument, structure.total_stride()
    add_image_arguments(parser)
    add("--validation",
        help="folder of images to hold out (default: one in sixteen of those to train on, by its "
        "content)")
    add("--steps", type=whole_number, default=steps, help=f"training steps (default: {steps})")
    add("--batch", type=positive_whole_number, default=8, help="crops a step (default: 8)")
    add("--crop", type=multiple_of(stride), default=128,
        help=f"side of a crop, pixels, a multiple of {stride} (default: 128)")
    add("--lr", type=positive_number, default=lr, help=f"peak learning rate (default: {lr})")
    add("--amp", action="store_true",
        help="bf16 autocast: faster on a GPU and on most CPUs with AVX-512 bf16")
    add("--compile", action="store_true",
        help="fuse the kernels of a step: after half a minute much faster on a GPU")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    add("--seed", type=whole_number, default=0, help="of weights, crops and noise (default: 0)")
    add("--save-every", type=positive_whole_number, default=1000,
        help="steps between saves (default: 1000)")
    add("--out", default=out, help=f"checkpoint to write (default: {out})")
    add("--resume", action="store_true",
        help="go on from OUT.state, with as many threads exactly as if never stopped; options that "
        "are not given are as they were; the rate may be smaller, and the number of steps "
        "another before the rate declines")
    add("--finish", action="store_true",
        help="once resumed, take no more steps: write the checkpoint")
    add("--overwrite", action="store_true", help="replace OUT, and a stopped run's OUT.state")
    # fmt: on


def add_image_arguments(parser):
    """The options of a stage that looks at images, for `images_for`."""
    # fmt: off
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data",
        help="folder of images, searched recursively (default: synthetic images)")
    source.add_argument("--synthetic", action="store_true",
        help="synthetic images, even for a codec of photographs")
    parser.add_argument("--cache",
        help="folder of the file into which photographs are decoded, once for all runs (default: "
        "that of OUT)")
    parser.add_argument("--skip-bad", action="store_true",
        help="leave out images that cannot be read or are smaller than a crop (default: refuse)")
    # fmt: on


def images_for(args, parent=None):
    """Training and validation images, two Images; prints what they are.

    parent: meta of the checkpoint that the stage goes on from. Raises LicError if that one was
    trained on photographs and none are given: to forget --data would spoil it. Of several processes
    the others begin when the first has come so far.
    """
    lineage = parent["lineage"] if parent else []
    photographs = {entry["data"] for entry in lineage} - {None, "dead leaves"}
    if args.data is None and photographs and not args.synthetic:
        raise LicError(
            f"{args.checkpoint} was trained on photographs ({', '.join(sorted(photographs))}); "
            "give such with --data, or ask for --synthetic"
        )
    held_out, cache = getattr(args, "validation", None), args.cache or Path(args.out).parent
    train, validation = load_images(args.data, args.crop, held_out, cache, args.skip_bad)
    source = args.data or "made here, synthetic"
    print(f"images: {len(train)} to train, {len(validation)} to validate ({source})")
    meet()
    return train, validation


def data_option(args):
    """How the next stage's command goes on after its checkpoint."""
    if args.data:
        return f" --data {shlex.quote(str(args.data))}"
    return " --synthetic" if args.synthetic else ""


def held_out_option(args):
    """How evaluate.py's command goes on, to measure on what this stage held out."""
    if args.data and args.validation:
        return f" --data {shlex.quote(str(args.validation))}"
    return f"{data_option(args)} --held-out" if args.data else ""


def run_settings(model, train, args, origin):
    """What --resume must find unchanged: plain values."""
    return {
        **{key: vars(args)[key] for key in ("steps", "batch", "crop", "lr", "amp", "seed")},
        "data": args.data and Path(args.data).resolve().name,
        "images": hashlib.sha256(b"".join(train.digests)).hexdigest(),
        "config": model.config,
        "quantization": model.quantization,
        "origin": origin,
        "recipe": RECIPE,
    }


def fit(model, train, held_out, args, origin=None):
    """Train `model` in place for args.steps steps; args as `add_training_arguments` gives them.

    train: Images; held_out: (B, 3, H, W), whose J is printed at each save; origin: what else the
    weights at step 0 came from, plain values, so that --resume notices another. Saves to OUT.state
    at intervals, and on Ctrl-C, SIGTERM or SIGHUP before it raises Interrupted.
    Raises LicError within a step of a gradient that is not finite. Returns the number of steps
    done: args.steps, or fewer with --finish.
    Several processes (processes.py) end with the same weights; only the first measures and saves.
    """
    if args.device == "cuda":
        choose_gpu()
    if args.amp and args.device == "cpu" and rank() == 0:
        warn_of_slow_bf16()
    settings, state = run_settings(model, train, args, origin), state_path(args.out)
    torch.backends.cudnn.benchmark = True  # the shapes never change
    model.to(args.device, memory_format=torch.channels_last)
    forward = compiled(model) if args.compile else model
    held_out = held_out.to(args.device)
    optimizer = Optimizer(model)
    first = load_state(state, model, optimizer, settings) if args.resume else 0
    same_start(model, first)
    lambdas = torch.tensor(model.lambdas, device=args.device)
    weights = level_weights(model.lambdas).to(args.device)
    if not args.resume and rank() == 0:  # an older run's state is not what this one goes on from
        Path(state).unlink(missing_ok=True)
    last = first if args.finish else args.steps
    share = (rank(), count())
    batches = batches_of(range(first, last), train, len(lambdas), args, share)
    progress, latest = Progress(args.steps, first), None
    with signals_kept() as received, told_once():
        for step, (noise, pixels, level) in enumerate(batches, first):
            torch.manual_seed(noise)
            x = in_unit_range(pixels.to(args.device, non_blocking=True))  # (b, 3, crop, crop)
            level = level.to(args.device, non_blocking=True)  # (b,)

            model.train()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                out = forward(x, level.float(), share)
            J, y_bpp, z_bpp, mse = rate_distortion(out, x, lambdas[level])
            loss = (weights[level] * J).mean()
            loss.backward()
            interrupted = average_gradients(model, received)
            norm = optimizer.step(learning_rate(step, args.steps, args.lr))
            with torch.no_grad():
                psnr = -10 * torch.log10(mse)
                progress.update(loss=loss, bpp_y=y_bpp.mean(), bpp_z=z_bpp.mean(), psnr=psnr.mean())

            done = step + 1
            # of the step before: for this one's a GPU would have to be waited for
            before, latest = latest, Outcome(step, loss.detach(), norm, interrupted)
            stopping = before is not None and before.must_stop(state)
            if stopping or done == args.steps or done % args.save_every == 0:
                stopping = latest.must_stop(state) or stopping
                if rank() == 0:
                    save(model, optimizer, held_out, done, settings, args)
                wait_for_all()
            if stopping:
                raise Interrupted(f"interrupted after step {done}; go on with --resume")
    part()
    model.to("cpu").eval()
    return last


def save(model, optimizer, held_out, done, settings, args):
    """Write OUT.state, unless held-out J, which is printed, shows that the weights are spoilt."""
    state, J = state_path(args.out), mean_loss(model, held_out, args.amp)
    if not J.isfinite().all():
        raise LicError(
            f"after step {done} held-out J is not finite; {remedy_for_spoilt_weights(state)}"
        )
    save_state(state, model, optimizer, done, settings, vars(args))
    print(f"saved {state}  held-out J a level:", *(f"{v:.4f}" for v in J), flush=True)


class Outcome:
    """What a step tells of itself, on its way from a GPU while the next step runs."""

    def __init__(self, step, loss, norm, interrupted):
        figures = torch.stack([loss, norm, interrupted])
        self.step, self.figures = step, figures.to("cpu", non_blocking=True)
        self.arrival = torch.cuda.Event() if figures.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def must_stop(self, state):
        """Was any process interrupted? Raises LicError if the step has spoilt the weights."""
        if self.arrival:
            self.arrival.synchronize()
        loss, norm, interrupted = self.figures.tolist()
        if not math.isfinite(norm):  # the last save is not spoilt
            raise LicError(
                f"at step {self.step} the loss is {loss} and its gradient's norm {norm}; "
                f"{remedy_for_spoilt_weights(state)}"
            )
        return interrupted > 0


def compiled(model):
    """The model's forward, compiled; LicError where torch cannot, for want of a compiler, say."""
    # a step is a thousand small kernels, which take longer to launch than to run on a GPU;
    # this mode records them as CUDA graphs
    fused = torch.compile(model, mode="reduce-overhead")

    def forward(x, level, share):
        try:
            return fused(x, level, share)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise LicError(f"--compile does not work here ({reason}); leave it out") from error

    return forward


def remedy_for_spoilt_weights(state):
    if Path(state).exists():
        return f"go on from {state} with --resume and a smaller --lr"
    return "start again with a smaller --lr"


@contextmanager
def signals_kept():
    """Yields a list; SIGINT, SIGTERM and SIGHUP append to it and do nothing else.

    So a step and its save are not cut in two.
    """
    received, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if number in before or signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, lambda signum, frame: received.append(signum))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Averages what a loop reports and prints it about every ten seconds.

    With the time left at the pace since the line before. steps: of the whole loop; done: where it
    starts.
    """

    def __init__(self, steps, done=0):
        self.steps, self.done, self.printed = steps, done, time.monotonic()
        self.sums, self.count = {}, 0

    def update(self, **figures):
        """One more step is done. figures: 0-d tensors, averaged until the next line."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        self.done += 1
        now = time.monotonic()
        if self.done < self.steps and now - self.printed < 10:
            return
        pace = (now - self.printed) / self.count
        minutes, seconds = divmod(int(pace * (self.steps - self.done)), 60)
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        text = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        print(
            f"step {self.done}/{self.steps}  {text}  {pace:.3f} s/step  "
            f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}",
            flush=True,
        )
        self.printed, self.sums, self.count = now, {}, 0
