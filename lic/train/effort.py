"""An encoder that searches: y and z of one picture, trained for that picture (`--effort`).

g_a and h_a give latents in one pass, as good as training made them on average; for the one picture
at hand better ones exist, and every decoder reads them. Here J of the picture at its level is
minimised over y and z, all weights fixed, by stochastic Gumbel annealing (Yang, Bamler, Mandt,
"Improving inference for neural image compression", arXiv:2006.04240, section 3.2). A latent v is
then neither rounded nor free, but drawn towards one of the two integers around it:

    v_hat = floor(v) + sigmoid((logit(d) / tau + noise) / SOFTNESS)        d = v - floor(v)

noise: logistic, the difference of two Gumbel variables. The sigmoid exceeds 1/2 with probability
d^(1/tau) / (d^(1/tau) + (1 - d)^(1/tau)): at first both integers are tried, and as tau falls more
and more the nearer one alone. logit(d), for the paper's atanh(d) - atanh(1 - d), is the "linear"
of Perugachi-Diaz, Gansekoele, Bhulai, "Robustly overfitting latents for flexible neural image
compression", arXiv:2401.17789; a SOFTNESS that does not fall with tau is ours. What each is worth:
docs/effort.md.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch

from lic.codec.entropy import soft_limit
from lic.codec.strips import coarse_side, reach
from lic.files import MAX_PIXELS
from lic.images import to_tensor
from lic.metrics import psnr, squared_error
from lic.train.loop import Progress

LEARNING_RATE = 0.01  # of Adam: about as far does a latent move in a step
TAU, TAU_HELD, TAU_FALL = 0.5, 0.35, 2.0  # see `temperature`
SOFTNESS = 0.5
NEAREST = 1e-4  # to an integer; a latent that is nearer counts as so near
TILE = 12  # positions of z, 768 pixels: the longest side of what is searched at once


def encode(coder, image, quality=None, effort=60, max_pixels=MAX_PIXELS, verbose=False):
    """image (H, W, 3) uint8 -> bytes, as by coder.encode but searched, `effort` steps a tile.

    coder: a bitstream.ImageCoder; its `encode` says what the other arguments are and what is
    raised. Of the searched file and the plain one the better is returned, by J of what each decodes
    to. verbose: print how it goes.
    """
    level = coder.level(quality)
    y, z = coder.latents(image, level, max_pixels)
    plain = coder.encode_latents(y, z, level, *image.shape[:2])
    lmbda = lmbda_of(coder.model, level)
    y, z = search(coder, image, y, z, level, lmbda, effort, verbose)
    searched = coder.encode_latents(y, z, level, *image.shape[:2])

    losses = []
    for name, data in (("plain", plain), ("searched", searched)):
        decoded = coder.decode(data, max_pixels)
        bpp = 8 * len(data) / (image.shape[0] * image.shape[1])
        losses.append(bpp + lmbda * squared_error(image, decoded))
        if verbose:
            print(f"{name:8}  J {losses[-1]:.4f}  bpp {bpp:.4f}  psnr {psnr(image, decoded):.4f}")
    return searched if losses[1] < losses[0] else plain


def lmbda_of(model, level):
    """lambda of a level; between two levels their geometric mean, weighted as that of the gains."""
    return math.exp(np.interp(level, range(len(model.lambdas)), np.log(model.lambdas)))


class Window(NamedTuple):
    """A rectangle of rows and columns."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, tensor):
        """Its part of a tensor (..., rows, columns)."""
        return tensor[..., self.top : self.bottom, self.left : self.right]

    def wider(self, margin, rows, columns):
        """With a margin on each side, within `rows` and `columns`."""
        return Window(
            max(0, self.top - margin),
            min(rows, self.bottom + margin),
            max(0, self.left - margin),
            min(columns, self.right + margin),
        )

    def times(self, factor):
        """The same rectangle where rows and columns are so many times finer."""
        return Window(*(factor * edge for edge in self))

    def inside(self, outer):
        """The same rectangle, counted from the upper left corner of another."""
        top, left = outer.top, outer.left
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)


def tiles_of(rows, columns):
    """Windows of at most TILE rows and columns that cover all, of nearly the same size."""

    def cuts(length):
        count = -(-length // TILE)
        edges = [length * k // count for k in range(count + 1)]
        return list(zip(edges[:-1], edges[1:]))

    return [
        Window(*vertical, *horizontal) for vertical in cuts(rows) for horizontal in cuts(columns)
    ]


def search(coder, image, y, z, level, lmbda, steps, verbose=False):
    """Better latents for an image, in the place of y and z from coder.latents; not rounded.

    Tile by tile, so that memory does not grow with the picture. A tile sees its neighbours'
    latents, searched or not yet, and what its own change there.
    """
    model = copy.deepcopy(coder.model).eval().requires_grad_(False)
    y, z = y.clone(), z.clone()  # coder.latents made them in inference mode, without gradients
    tiles, noise = tiles_of(*z.shape[2:]), torch.Generator().manual_seed(0)
    progress = Progress(len(tiles) * steps) if verbose else None
    for tile in tiles:
        with torch.autocast("cpu", torch.bfloat16, enabled=coder.amp):
            search_tile(model, image, y, z, tile, level, lmbda, steps, noise, progress)
    return y, z


def search_tile(model, image, y, z, tile, level, lmbda, steps, noise, progress):
    """Replace the latents of a tile, a Window in positions of z, in y and z, by better ones."""
    y_side, z_side = coarse_side("g_s"), coarse_side("h_s")  # 16 and 64 pixels
    # On z the coding of y depends so far away; on y's the pixels, and these on further y's.
    z_seen = tile.wider(reach("h_s"), *z.shape[2:])
    y_margin = math.ceil(2 * reach("g_s") * y_side / z_side)
    y_seen = tile.wider(y_margin, *z.shape[2:]).times(z_side // y_side)
    pixels = y_seen.times(y_side)
    x = to_tensor([image[pixels.top : pixels.bottom, pixels.left : pixels.right]])  # not padded

    tile_y = tile.times(z_side // y_side)
    own_z, own_y = (torch.zeros(v.shape[2:], dtype=torch.bool) for v in (z, y))
    tile.of(own_z)[:] = True
    tile_y.of(own_y)[:] = True
    own_z, own_y = z_seen.of(own_z), y_seen.of(own_y)
    part_z = z_seen.of(z).clone().requires_grad_()
    part_y = y_seen.of(y).clone().requires_grad_()
    coded = y_seen.inside(z_seen.times(z_side // y_side))
    _, inverse_gain = model.gains(torch.tensor([level]))

    adam = torch.optim.Adam([part_y, part_z], lr=LEARNING_RATE)
    for step in range(steps):
        tau = temperature(step / steps)
        z_hat = torch.where(own_z, annealed(part_z, tau, noise), part_z.round())
        mean, log_scale = coded.of(model.h_s(z_hat).to(x.dtype)).chunk(2, 1)
        residual = part_y - mean
        y_hat = mean + torch.where(own_y, annealed(residual, tau, noise), residual.round())
        x_hat = model.g_s(y_hat * inverse_gain).to(x.dtype) + 0.5
        x_hat = x_hat[:, :, : x.shape[2], : x.shape[3]]  # what was padded is not looked at

        y_bits = soft_limit(model.prior_y.bits(y_hat, mean, log_scale)).sum()
        bits = y_bits + model.prior_z.bits(z_hat).sum()
        bpp = bits / (x.shape[2] * x.shape[3])
        mse = (x_hat - x).square().mean()
        J = bpp + lmbda * 255**2 * mse
        adam.zero_grad()
        J.backward()
        adam.step()
        if progress:
            figures = {"J": J, "bpp": bpp, "psnr": -10 * torch.log10(mse)}
            progress.update(**{name: value.detach() for name, value in figures.items()})
    with torch.no_grad():
        tile.of(z)[:] = tile.inside(z_seen).of(part_z)
        tile_y.of(y)[:] = tile_y.inside(y_seen).of(part_y)


def temperature(progress):
    """tau after a share of the steps, `progress`: constant, then falling exponentially."""
    return TAU * math.exp(-TAU_FALL * max(0, progress - TAU_HELD))


def annealed(v, tau, noise):
    """v_hat of the formula above, of any shape. noise: a torch.Generator."""
    low = v.detach().floor()
    towards_upper = torch.logit(v - low, NEAREST) / tau
    towards_upper = towards_upper + torch.logit(torch.rand(v.shape, generator=noise), NEAREST)
    return low + torch.sigmoid(towards_upper / SOFTNESS)
