"""An encoder that searches: y of one picture, trained for that picture (`--effort`).

g_a gives y in one pass, as good as training made it on average; for the one picture at hand a
better y exists, and every decoder reads it. Here J of the picture at its level is minimised over
y, all weights fixed, by stochastic Gumbel annealing (Yang, Bamler, Mandt, "Improving inference for
neural image compression", arXiv:2006.04240, section 3.2). Meanwhile v = y - mean is neither rounded
nor free, but drawn towards one of the two integers around it:

    v_hat = floor(v) + sigmoid((logit(d) / tau + noise) / SOFTNESS)        d = v - floor(v)

noise: logistic, the difference of two Gumbel variables. The sigmoid exceeds 1/2 with probability
d^(1/tau) / (d^(1/tau) + (1 - d)^(1/tau)): at first both integers are tried, and as tau falls more
and more the nearer one alone.

Not as in the paper: logit(d), for atanh(d) - atanh(1 - d), is the "linear" of Perugachi-Diaz,
Gansekoele, Bhulai, "Robustly overfitting latents for flexible neural image compression",
arXiv:2401.17789; SOFTNESS does not fall with tau; z is not searched. What each is worth:
docs/effort.md.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch

from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, soft_limit
from lic.codec.strips import coarse_side, reach
from lic.files import MAX_PIXELS
from lic.images import to_tensor
from lic.metrics import bits_per_pixel, psnr, squared_error
from lic.train.progress import Progress
from lic.train.tiles import tiles_of

LEARNING_RATE = 0.01  # of Adam: a latent moves about so far in a step
MAX_MOVE = 1.0  # of a latent, in all steps: so a long search takes smaller ones
TAU, TAU_HELD, TAU_FALL = 0.5, 0.35, 2.0  # see `temperature`
SOFTNESS = 0.5
NEAREST = 1e-4  # to an integer; a latent that is nearer counts as so near, and has no gradient


def encode(coder, image, quality=None, effort=60, max_pixels=MAX_PIXELS, verbose=False):
    """image (H, W, 3) uint8 -> bytes, as by coder.encode but searched, `effort` steps a tile.

    coder: a bitstream.ImageCoder; its `encode` says what the other arguments are and what is
    raised. Of the searched file and the plain one the better is returned, by J of what each decodes
    to. verbose: print how the search goes (of what it tries, without z) and what both files are.
    """
    level = coder.level(quality)
    lmbda = lmbda_of(coder.model, level)
    y, z = coder.latents(image, level, max_pixels)
    plain = coder.encode_latents(y, z, level, *image.shape[:2])
    y = search(coder, image, y, z, level, lmbda, effort, verbose)
    searched = coder.encode_latents(y, z, level, *image.shape[:2])

    losses = []
    for name, data in (("plain", plain), ("searched", searched)):
        decoded = coder.decode(data, max_pixels)
        bpp = bits_per_pixel(len(data), image)
        losses.append(bpp + lmbda * squared_error(image, decoded))
        if verbose:
            dB = psnr(image, decoded)
            print(f"{name:8}  J {losses[-1]:.4f}  bpp {bpp:.4f}  psnr {dB:.4f}")
    return searched if losses[1] < losses[0] else plain


def lmbda_of(model, level):
    """lambda of a level; between two levels their geometric mean, weighted as that of the gains."""
    return math.exp(np.interp(level, range(len(model.lambdas)), np.log(model.lambdas)))


def search(coder, image, y, z, level, lmbda, steps, verbose=False):
    """A better y for an image, not rounded, where coder.latents gave y (1, M, H/16, W/16) and z.

    Tile by tile, so that the memory for g_s and its gradients does not grow with the picture. A
    tile sees its neighbours, searched or not yet, and what its own y changes of their pixels.
    """
    model = copy.deepcopy(coder.model).eval().requires_grad_(False)
    _, inverse_gain = model.gains(torch.tensor([level]))
    mean, log_scale = coded_with(coder, z)
    v = y - mean
    tiles = tiles_of(*v.shape[2:])
    noise = torch.Generator().manual_seed(0)
    progress = Progress(len(tiles) * steps) if verbose else None

    def report(v, **figures):
        if progress:
            progress.update(**figures)

    for tile in tiles:
        # a position of y changes pixels `reach` positions away; y that far beyond do so, too
        seen = tile.wider(2 * reach("g_s"), *v.shape[2:])
        x = to_tensor([seen.pixels_of(image, coarse_side("g_s"))])  # without what was padded
        own = tile.inside(seen)
        part = Part(x, seen.of(v), seen.of(mean), seen.of(log_scale), own.mask_of(seen.of(v)))
        with torch.autocast("cpu", torch.bfloat16, enabled=coder.amp):
            found = train_latents(model, part, inverse_gain, lmbda, steps, noise, report)
        tile.of(v)[:] = own.of(found)
    return v + mean


def coded_with(coder, z):
    """Mean and log scale of each y, (1, M, H/16, W/16) float32, as the coder knows them."""
    mean, index = coder.entropy_parameters(z[0].round().int().numpy())
    index = torch.from_numpy(index).reshape(mean.shape)
    return mean.float(), LOG_SCALE_MIN + LOG_SCALE_STEP * index


class Part(NamedTuple):
    """What is searched at once: a picture, or a tile of it with what that sees around it."""

    x: torch.Tensor  # pixels, (1, 3, H, W)
    v: torch.Tensor  # y - mean, (1, M, h, w), h and w at least H/16 and W/16; so are the next two
    mean: torch.Tensor
    log_scale: torch.Tensor
    own: torch.Tensor  # where v is searched, (h, w) bool; elsewhere it stays, rounded


def train_latents(model, part, inverse_gain, lmbda, steps, noise, report):
    """A better v for a Part, (1, M, h, w), after so many steps.

    noise: a torch.Generator. report is called after each step, with v, which tools/effort.py looks
    at, and with J, bpp_y and PSNR of what was tried.
    """
    x, v, mean, log_scale, own = part
    v = v.clone().requires_grad_()
    adam = torch.optim.Adam([v], lr=min(LEARNING_RATE, MAX_MOVE / steps))
    for step in range(steps):
        tau = temperature(step / steps)
        y_hat = torch.where(own, annealed(v, tau, noise), v.round()) + mean
        x_hat = model.g_s(y_hat * inverse_gain).to(x.dtype) + 0.5
        bits = soft_limit(model.prior_y.bits(y_hat, mean, log_scale))

        mse = (x_hat[:, :, : x.shape[2], : x.shape[3]] - x).square().mean()
        bpp_y = bits.sum() / (x.shape[2] * x.shape[3])
        J = bpp_y + lmbda * 255**2 * mse
        adam.zero_grad()
        J.backward()
        adam.step()
        with torch.no_grad():
            report(v.detach(), J=J.detach(), bpp_y=bpp_y.detach(), psnr=-10 * torch.log10(mse))
    return v.detach()


def temperature(progress):
    """tau after a share of the steps, `progress`: constant, then falling exponentially."""
    return TAU * math.exp(-TAU_FALL * max(0, progress - TAU_HELD))


def annealed(v, tau, noise):
    """v_hat of the formula above, of any shape. noise: a torch.Generator."""
    low = v.detach().floor()
    towards_upper = torch.logit(v - low, NEAREST) / tau
    towards_upper = towards_upper + torch.logit(torch.rand(v.shape, generator=noise), NEAREST)
    return low + torch.sigmoid(towards_upper / SOFTNESS)
