"""What the search of lic/train/effort.py does, and what each part of it is worth.

    python tools/effort.py picture docs/coffee.png --curves curves.png --bits bits.png
    python tools/effort.py variants photos/ --levels 0 2 4

picture: two plots (with matplotlib). The curves: J of the picture by step, its latents rounded as
for a file, by annealing and by rounding straight through. The bits: where in the picture they lie,
before the search and after. variants: how much other formulas, rates and numbers of steps change J
of rounded latents, a mean over the centres of some photographs.
"""

import argparse
import io
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
from lic.files import claim_output, write_bytes
from lic.images import find_images, fixed_crops, read_image, read_images
from lic.options import positive_whole_number, whole_number
from lic.plots import import_pyplot, write_figure
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
    "LEARNING_RATE 0.02": {"LEARNING_RATE": 0.02},
    "10 steps": {"steps": 10},
    "30 steps": {"steps": 30},
    "100 steps": {"steps": 100},
    "200 steps": {"steps": 200},
    "200 steps of 0.01": {"steps": 200, "FARTHEST": 2.0},
}


def parse_args():
    # fmt: off
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=SHIPPED, help="default: the codec shipped")
    commands = parser.add_subparsers(dest="command", required=True)
    picture = commands.add_parser("picture")
    picture.set_defaults(function=show_picture)
    picture.add_argument("image", help="picture, of one megapixel, say: it is not cut into tiles")
    picture.add_argument("--level", type=whole_number, default=2, help="rate level (default: 2)")
    picture.add_argument("--curves", required=True, help="PNG to write")
    picture.add_argument("--bits", required=True, help="PNG to write")
    picture.add_argument("--overwrite", action="store_true", help="replace them")
    variants = commands.add_parser("variants")
    variants.set_defaults(function=show_variants)
    variants.add_argument("photos", help="folder")
    variants.add_argument("--levels", type=whole_number, nargs="+", default=[2],
                          help="rate levels (default: 2)")
    variants.add_argument("--crops", type=positive_whole_number, default=4,
                          help="photographs, of each the centre of 256x256 (default: 4)")
    variants.add_argument("--only", nargs="+", help="names of variants (default: all)")
    # fmt: on
    return parser.parse_args()


class Search:
    """The search of a picture, without tiles. `losses`: J of the rounded y, the first before it.

    y_bits (M, h, w): where the bits of y lie, as they were noted last.
    """

    def __init__(self, coder, image, level):
        self.model, self.level, self.losses = coder.model, float(level), []
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
        self.found = effort.train_latents(
            self.model, self.x, self.v, self.mean, self.log_scale, own, self.inverse_gain,
            self.lmbda, steps, noise, report)  # fmt: skip
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


def write_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    write_bytes(path, buffer.getvalue())
    print(f"wrote {path}")


def plot_curves(pyplot, searches, path):
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, search in searches.items():
        start = search.losses[0]
        axes.plot([100 * (J / start - 1) for J in search.losses], label=name)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="J of the rounded latents, % above the start")
    axes.legend()
    axes.grid(alpha=0.3)
    write_figure(figure, path)


def plot_bits(pyplot, image, before, after, path):
    """before, after: bits of each position of y, (h, w)."""
    largest = max(before.max(), after.max())
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    (picture, difference), below = panels
    extent = (0, 16 * before.shape[1], 16 * before.shape[0], 0)
    picture.imshow(image)
    picture.set_title("the picture")
    limit = (after - before).abs().max()
    drawn = difference.imshow(
        after - before, cmap="coolwarm", vmin=-limit, vmax=limit, extent=extent
    )
    difference.set_title("bits of y a position, the change")
    figure.colorbar(drawn, ax=difference)
    for axes, bits, title in zip(below, (before, after), ("before", "after")):
        drawn = axes.imshow(bits, cmap="magma", vmin=0, vmax=largest, extent=extent)
        axes.set_title(f"{title}: {bits.sum() / 8:,.0f} bytes")
    figure.colorbar(drawn, ax=below[1])
    for axes in panels.flatten():
        axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0), xticks=[], yticks=[])
    write_figure(figure, path)


def show_picture(args, coder):
    for path in (args.curves, args.bits):
        claim_output(path, ".png", args.overwrite, [args.image, args.checkpoint])
    pyplot, image = import_pyplot(), read_image(args.image)
    searches = {
        name: Search(coder, image, args.level) for name in ("annealing", "straight through")
    }
    before = searches["annealing"].y_bits.sum(0)
    searches["annealing"].run(trace=True)
    with mock.patch.object(effort, "annealed", straight_through):
        searches["straight through"].run(trace=True)
    for name, search in searches.items():
        print(f"{name:16}  J {search.losses[0]:.4f} -> {search.losses[-1]:.4f}, {STEPS} steps")
    old, new = searches["annealing"].v.round(), searches["annealing"].found.round()
    print(
        f"annealing changed {(old != new).sum():,} of {old.numel():,} latents, by at most "
        f"{(old - new).abs().max():g}; not 0 were {(old != 0).sum():,}, are {(new != 0).sum():,}"
    )
    plot_curves(pyplot, searches, args.curves)
    plot_bits(pyplot, image, before, searches["annealing"].y_bits.sum(0), args.bits)


def main():
    args = parse_args()
    coder = load(args.checkpoint)
    coder.model.requires_grad_(False)
    args.function(args, coder)


if __name__ == "__main__":
    run(main)
