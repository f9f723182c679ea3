"""What each part of the search of lic/train/effort.py is worth.

    python tools/effort.py photos/ --levels 0 2 4

How much other formulas, rates and numbers of steps change J of rounded latents, a mean over the
centres of some photographs.
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lic import SHIPPED, load
from lic.codec.bitstream import padded
from lic.codec.gradients import round_ste
from lic.files import LicError
from lic.images import find_images, fixed_crops, read_images
from lic.options import make_parser, positive_whole_number, whole_number
from lic.program import run
from lic.train import effort
from lic.train.effort import annealed


def straight_through(v, tau, noise):
    return round_ste(v)


def with_atanh(v, tau, noise):
    """The paper's formula, but for a SOFTNESS that stays."""
    low = v.detach().floor()
    d = (v - low).clamp(effort.NEAREST, 1 - effort.NEAREST)
    towards_upper = (torch.atanh(d) - torch.atanh(1 - d)) / tau
    towards_upper = towards_upper + torch.logit(
        torch.rand(v.shape, generator=noise), effort.NEAREST
    )
    return low + torch.sigmoid(towards_upper / effort.SOFTNESS)


def with_falling_softness(v, tau, noise):
    with mock.patch.object(effort, "SOFTNESS", tau):
        return annealed(v, tau, noise)


def as_in_the_paper(v, tau, noise):
    with mock.patch.object(effort, "SOFTNESS", tau):
        return with_atanh(v, tau, noise)


def without_noise(v, tau, noise):
    low = v.detach().floor()
    return low + torch.sigmoid(torch.logit(v - low, effort.NEAREST) / tau / effort.SOFTNESS)


CROP, STEPS = 256, 60
VARIANTS = {  # name: what is replaced in lic/train/effort.py, or the number of steps
    "as it is": {},
    "atanh, as in the paper": {"annealed": with_atanh},
    "SOFTNESS = tau, as in the paper": {"annealed": with_falling_softness},
    "both": {"annealed": as_in_the_paper},
    "without noise": {"annealed": without_noise},
    "straight through": {"annealed": straight_through},
    "SOFTNESS 0.35": {"SOFTNESS": 0.35},
    "SOFTNESS 0.7": {"SOFTNESS": 0.7},
    "TAU 0.35": {"TAU": 0.35},
    "TAU 0.7": {"TAU": 0.7},
    "LEARNING_RATE 0.005": {"LEARNING_RATE": 0.005},
    "LEARNING_RATE 0.02": {"LEARNING_RATE": 0.02, "MAX_MOVE": 2.0},
    "10 steps": {"steps": 10},
    "30 steps": {"steps": 30},
    "100 steps": {"steps": 100},
    "200 steps": {"steps": 200},
    "200 steps of 0.01": {"steps": 200, "MAX_MOVE": 2.0},
}


def parse_args():
    # fmt: off
    parser = make_parser(__doc__)
    parser.add_argument("--checkpoint", default=SHIPPED, help="default: the codec shipped")
    parser.add_argument("photos", help="folder")
    parser.add_argument("--levels", type=whole_number, nargs="+", default=[2],
                        help="rate levels (default: 2)")
    parser.add_argument("--crops", type=positive_whole_number, default=4,
                        help="photographs, of each the centre of 256x256 (default: 4)")
    parser.add_argument("--only", nargs="+", help="names of variants (default: all)")
    parser.add_argument("--amp", action="store_true", help="search in bf16")
    # fmt: on
    return parser.parse_args()


class Search:
    """The search of a picture, without tiles. `losses`: J of the rounded y, the first before it.

    y_bits (M, h, w): where the bits of y lie, as they were noted last.
    """

    def __init__(self, coder, image, level):
        self.model, self.amp = coder.model, coder.amp
        self.level, self.losses = float(level), []
        self.lmbda = effort.lmbda_of(coder.model, self.level)
        height, width = image.shape[:2]
        self.x = padded(image)[:, :, :height, :width]
        y, z = coder.latents(image, self.level)
        self.mean, self.log_scale = effort.coded_with(coder, z)
        self.v = y - self.mean
        _, self.inverse_gain = self.model.gains(torch.tensor([self.level]))
        self.z_bits = self.model.prior_z.bits(z.round()).sum()
        self.note(self.v)

    def run(self, steps=STEPS, trace=False):
        """trace: note every step, instead of the last one."""
        own = torch.ones(self.v.shape[2:], dtype=torch.bool)
        noise = torch.Generator().manual_seed(0)
        report = self.note if trace else lambda v, **figures: None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
            part = effort.Part(self.x, self.v, self.mean, self.log_scale, own)
            self.found = effort.train_latents(
                self.model, part, self.inverse_gain, self.lmbda, steps, noise, report
            )
        if not trace:
            self.note(self.found)
        return self

    @torch.no_grad()
    def note(self, v, **figures):
        """J of what a file of v = y - mean would hold."""
        y_hat = self.mean + v.round()
        x_hat = self.model.g_s(y_hat * self.inverse_gain) + 0.5
        mse = (x_hat[:, :, : self.x.shape[2], : self.x.shape[3]] - self.x).square().mean()
        self.y_bits = self.model.prior_y.bits(y_hat, self.mean, self.log_scale)[0]
        bpp = (self.y_bits.sum() + self.z_bits) / (self.x.shape[2] * self.x.shape[3])
        self.losses.append((bpp + self.lmbda * 255**2 * mse).item())


def show_variants(args, coder):
    crops = fixed_crops(read_images(find_images(args.photos), CROP), args.crops, CROP)
    images = (crops.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    levels = "".join(f"{f'level {level}':>10}" for level in args.levels)
    print(f"change of J, {len(images)} crops of {CROP}x{CROP}, {STEPS} steps unless said")
    print(f"{'':34}{levels}   s/step/megapixel")
    for name, replaced in VARIANTS.items():
        if args.only and name not in args.only:
            continue
        replaced = dict(replaced)
        steps, start, row = replaced.pop("steps", STEPS), time.perf_counter(), ""
        with ExitStack() as stack:
            for attribute, value in replaced.items():
                stack.enter_context(mock.patch.object(effort, attribute, value))
            for level in args.levels:
                searches = [Search(coder, image, level).run(steps) for image in images]
                changes = [search.losses[-1] / search.losses[0] - 1 for search in searches]
                row += f"{sum(changes) / len(changes):>+10.2%}"
        work = len(args.levels) * steps * len(images) * CROP**2 / 1e6
        print(f"{name:34}{row}{(time.perf_counter() - start) / work:>10.2f}", flush=True)


def main():
    args = parse_args()
    unknown = set(args.only or []) - VARIANTS.keys()
    if unknown:
        raise LicError(f"no variant is called {', '.join(sorted(unknown))}")
    coder = load(args.checkpoint, args.amp)
    for level in args.levels:
        coder.level(level)  # raises LicError for one that the codec has not
    coder.model.requires_grad_(False)
    show_variants(args, coder)


if __name__ == "__main__":
    run(main)
