"""The loss and the loop that all training stages share: train, fine-tune, quantization-aware.

    J = bpp + lmbda * 255^2 * MSE            (MSE on [0, 1]; a larger lmbda: a larger file)

Each image of a batch draws a rate level; the loss is the level-weighted mean of J, with noise
for the rate and straight-through rounding for what enters g_s (Minnen and Singh,
arXiv:2007.08739). One optimizer, no auxiliary loss.

An exact resume needs no saved random state: each step draws from a generator seeded with (seed, step),
and the learning rate is a function of the step and the number of steps. (Exact on the CPU: a GPU adds up
in no fixed order.)
"""

import argparse
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from lic.files import UNREADABLE, LicError, check_writable, read_tensors, warn_of_slow_bf16, write_tensors
from lic.images import random_crops
from lic.optimizer import Optimizer


class Interrupted(LicError):
    status = 130


def number(kind, accepted, description):
    """An argparse type: int or float, if it is accepted; else argparse prints what it should be."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepted(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


positive_int = number(int, lambda value: value >= 1, "a whole number from 1 up")
count = number(int, lambda value: value >= 0, "a whole number from 0 up")
positive_float = number(float, lambda value: 0 < value < float("inf"), "a positive finite number")


def add_training_arguments(parser, steps, lr, out):
    """The options of a stage that trains; steps, lr and out are that stage's defaults."""
    parser.add_argument("--data", help="folder of images, searched recursively (default: synthetic images)")
    parser.add_argument("--steps", type=count, default=steps, help=f"training steps (default: {steps})")
    parser.add_argument("--batch", type=positive_int, default=8, help="crops a step (default: 8)")
    parser.add_argument("--crop", type=positive_int, default=128, help="side of a crop, pixels, a multiple of 64 (default: 128)")
    parser.add_argument("--lr", type=positive_float, default=lr, help=f"peak learning rate (default: {lr})")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast: faster with AVX-512 bf16 or on a GPU")
    parser.add_argument("--compile", action="store_true", help="fuse the kernels of a step: after half a minute much faster on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--seed", type=count, default=0, help="of weights, crops and noise (default: 0)")
    parser.add_argument("--save-every", type=positive_int, default=1000, help="steps between saves (default: 1000)")
    parser.add_argument("--out", default=out, help=f"checkpoint to write (default: {out})")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.state, exactly as if never stopped")


def rate_distortion(out, x, lmbda):
    """J, bpp of y, bpp of z, MSE of each image, all (B,). out: models.Output; lmbda: (B,)."""
    pixels = x.shape[2] * x.shape[3]
    mse = (out.x_hat - x).square().mean((1, 2, 3))
    y_bpp, z_bpp = out.y_bits.sum(1) / pixels, out.z_bits.sum(1) / pixels
    return y_bpp + z_bpp + lmbda * 255**2 * mse, y_bpp, z_bpp, mse


def level_weights(lambdas):
    """Weight of each level's J in the training loss, mean 1: (levels,).

    J grows about as lmbda^0.5; without the weights the high rates would own the gradient.
    """
    weights = torch.tensor(lambdas) ** -0.5
    return weights / weights.mean()


@torch.no_grad()
def image_losses(model, x, amp=False):
    """J of every level and image with real rounding; x (B, 3, H, W) -> (levels, B) float64."""
    model.eval()
    losses = []
    for level, lmbda in enumerate(model.lambdas):
        J = []
        for batch in x.split(4):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                out = model(batch, torch.full((len(batch),), float(level), device=x.device))
            J.append(rate_distortion(out, batch, lmbda)[0])
        losses.append(torch.cat(J).double().cpu())
    return torch.stack(losses)


def mean_loss(model, x, amp=False):
    """The same, averaged over the images: (levels,)."""
    return image_losses(model, x, amp).mean(1)


def learning_rate(step, steps, peak):
    """Linear warm-up, constant, then linear to peak / 50 over the last two thirds."""
    warmup, decline = phases(steps)
    if step < decline:
        return peak * min(1, (step + 1) / warmup)
    return peak * (1 - 0.98 * (step - decline) / max(1, steps - decline))


def phases(steps):
    """Length of the warm-up, and the step at which the decline begins. From 14,000 steps on the warm-up is the
    same, so that a run can be prolonged as if it had been meant to be longer from the start."""
    return min(280, max(1, steps // 50)), steps // 3


def fit(model, train, held_out, args, parent=None):
    """Train `model` in place for args.steps steps; args as `add_training_arguments` gives them.

    train: list of (H, W, 3) uint8; held_out: (B, 3, H, W), whose J is printed at each save; parent:
    what else the weights at step 0 came from, plain values, so that --resume notices another.
    Saves to OUT.state at intervals and on Ctrl-C or SIGTERM, then raises Interrupted; raises
    LicError at the first gradient that is not finite. --resume takes another args.steps if the warm-up is the
    same and the decline of the learning rate has not begun.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise LicError("--device cuda: this torch sees no GPU; leave the option out")
    if args.amp and args.device == "cpu":
        warn_of_slow_bf16()
    state_path = args.out + ".state"
    torch.backends.cudnn.benchmark = True  # the shapes never change
    model.to(args.device, memory_format=torch.channels_last)
    # a step is a thousand small kernels, which take longer to launch than to run; this mode records them as CUDA graphs
    forward = torch.compile(model, mode="reduce-overhead") if args.compile else model
    train, held_out = [torch.from_numpy(image).to(args.device) for image in train], held_out.to(args.device)
    optimizer = Optimizer(model)
    settings = {k: vars(args)[k] for k in ("steps", "batch", "crop", "lr", "amp", "seed")}
    settings |= {"data": args.data and Path(args.data).name}  # photos, photos/ and ../photos are the same
    settings |= {"images": [len(train), sum(image.numel() for image in train)]}  # another photograph would shift every crop
    settings |= {"config": model.config, "quantization": model.quantization, "parent": parent, "recipe": "Muon in float32 and Adam, leaky ReLU, decline over two thirds"}
    first = load_state(state_path, model, optimizer, settings) if args.resume else 0
    lambdas = torch.tensor(model.lambdas, device=args.device)
    weights = level_weights(model.lambdas).to(args.device)
    progress = Progress(first, args.steps)
    with signals_kept() as interrupted:
        for step in range(first, args.steps):
            rng = np.random.default_rng([args.seed, step])
            torch.manual_seed(int(rng.integers(2**63)))  # the noise
            x = random_crops(train, args.batch, args.crop, rng)  # (B, 3, crop, crop)
            level = torch.from_numpy(rng.integers(len(lambdas), size=args.batch)).to(args.device, non_blocking=True)  # (B,)

            model.train()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                out = forward(x, level.float())
            J, y_bpp, z_bpp, mse = rate_distortion(out, x, lambdas[level])
            loss = (weights[level] * J).mean()
            loss.backward()
            norm = optimizer.step(learning_rate(step, args.steps, args.lr))
            if not torch.isfinite(norm):  # the weights are spoilt, the last save is not
                raise LicError(f"at step {step} the loss is {loss.item()} and its gradient's norm {norm.item()}; "
                               f"remove {state_path}, if it is there, and start again with a smaller --lr")  # fmt: skip

            with torch.no_grad():
                progress.update(step + 1, loss=loss, bpp_y=y_bpp.mean(), bpp_z=z_bpp.mean(),
                                psnr=-10 * torch.log10(mse).mean())  # fmt: skip
            if interrupted or step + 1 == args.steps or (step + 1) % args.save_every == 0:
                save_state(state_path, model, optimizer, step + 1, settings)
                J = mean_loss(model, held_out, args.amp)
                print(f"saved {state_path}  held-out J a level:", *(f"{v:.4f}" for v in J), flush=True)
            if interrupted:
                raise Interrupted(f"interrupted after step {step + 1}; go on with --resume")
    model.to("cpu").eval()


@contextmanager
def signals_kept():
    """Yields a list; SIGINT and SIGTERM append to it and do nothing else, so that a step and its save are not cut in two."""
    received = []
    before = {number: signal.signal(number, lambda signum, frame: received.append(signum))
              for number in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Averages what a loop reports and prints it about every ten seconds, with the time left."""

    def __init__(self, first, steps):
        self.first, self.steps = first, steps
        self.start = self.printed = time.monotonic()
        self.sums, self.count = {}, 0

    def update(self, step, **figures):
        """step: how many are done; figures: 0-d tensors, averaged until the next line is printed."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        now = time.monotonic()
        if step < self.steps and now - self.printed < 10:
            return
        pace = (now - self.start) / (step - self.first)
        left = int(pace * (self.steps - step))
        text = "  ".join(f"{name} {float(total) / self.count:.4f}" for name, total in self.sums.items())
        print(f"step {step}/{self.steps}  {text}  {pace:.3f} s/step  "
              f"left {left // 3600}:{left // 60 % 60:02}:{left % 60:02}", flush=True)  # fmt: skip
        self.printed, self.sums, self.count = now, {}, 0


def save_state(path, model, optimizer, step, settings):
    """Write what --resume needs; settings: plain values that must not change in between."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "settings": settings}
    write_tensors(path, state)


def read_state(path, otherwise):
    """What `save_state` wrote; raises LicError(otherwise) if it is something else."""
    state = read_tensors(path, otherwise)
    try:
        state["step"], state["settings"]["steps"]
    except UNREADABLE as error:
        raise LicError(otherwise) from error
    return state


def check_out(args):
    """Before a stage reads anything: raises LicError if args.out cannot be written, or if a new run would write over the
    state of one that was stopped."""
    check_writable(args.out)
    path = args.out + ".state"
    if args.resume or not args.steps or not Path(path).exists():
        return
    state = read_state(path, otherwise=f"{path} is in the way and no training state; remove it")
    done, steps = state["step"], state["settings"]["steps"]
    if done < steps:
        raise LicError(f"{path} holds a run that was stopped at step {done} of {steps}; go on with --resume, or remove the file")


def load_state(path, model, optimizer, settings):
    """Restore model and optimizer in place; returns the number of steps already done."""
    state = read_state(path, otherwise=f"{path} holds no training state; start without --resume")
    done, made_with = state["step"], state["settings"]
    changed = sorted(k for k in settings if settings[k] != made_with.get(k))
    if changed == ["steps"]:
        (warmup, decline), (new_warmup, new_decline) = phases(made_with["steps"]), phases(settings["steps"])
        if done > min(decline, new_decline) or warmup != new_warmup:
            raise LicError(f"{path} is at step {done} of {made_with['steps']}; --steps can change only in the first third of the "
                           f"old and the new number, and only if they have the same warm-up, as any two from 14,000 up have")  # fmt: skip
    elif changed:
        raise LicError(f"{path} was made with another {', '.join(changed)}; resume with the same settings")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return done
