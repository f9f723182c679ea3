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

import numpy as np
import torch

from lic.codec.entropy import soft_limit
from lic.files import MAX_PIXELS
from lic.images import to_tensor
from lic.metrics import psnr, squared_error
from lic.train.loop import Progress
from lic.train.tiles import tiles_of

LEARNING_RATE = 0.01  # of Adam: about as far does a latent move in a step
TAU, TAU_HELD, TAU_FALL = 0.5, 0.35, 2.0  # see `temperature`
SOFTNESS = 0.5
NEAREST = 1e-4  # to an integer; a latent that is nearer counts as so near


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
            dB = psnr(image, decoded)
            print(f"{name:8}  J {losses[-1]:.4f}  bpp {bpp:.4f}  psnr {dB:.4f}")
    return searched if losses[1] < losses[0] else plain


def lmbda_of(model, level):
    """lambda of a level; between two levels their geometric mean, weighted as that of the gains."""
    return math.exp(np.interp(level, range(len(model.lambdas)), np.log(model.lambdas)))


def search(coder, image, y, z, level, lmbda, steps, verbose=False):
    """Better latents for an image, in the place of y and z from coder.latents; not rounded.

    Tile by tile, so that memory does not grow with the picture. A tile sees its neighbours'
    latents, searched or not yet, and what its own change there.
    """
    model = copy.deepcopy(coder.model).eval().requires_grad_(False)
    y, z = y.clone(), z.clone()  # coder.latents made them in inference mode, without gradients
    tiles, noise = tiles_of(*z.shape[2:]), torch.Generator().manual_seed(0)
    progress = Progress(len(tiles) * steps) if verbose else None

    def report(y, z, **figures):
        if progress:
            progress.update(**{name: value.detach() for name, value in figures.items()})

    for tile in tiles:
        with torch.autocast("cpu", torch.bfloat16, enabled=coder.amp):
            search_tile(model, image, y, z, tile, level, lmbda, steps, noise, report)
    return y, z


def search_tile(model, image, y, z, tile, level, lmbda, steps, noise, report):
    """Replace the latents of a Tile in y and z by better ones.

    report is called after each step with the latents of the tile and its margins and with J, bpp
    and PSNR of what was tried.
    """
    rows, columns = slice(*tile.pixels[:2]), slice(*tile.pixels[2:])
    x = to_tensor([image[rows, columns]])  # as far as the image goes, not padded
    y_part = tile.y_seen.of(y).clone().requires_grad_()
    z_part = tile.z_seen.of(z).clone().requires_grad_()
    y_inside, z_inside = tile.y.inside(tile.y_seen), tile.z.inside(tile.z_seen)
    own_y, own_z = y_inside.mask_of(y_part), z_inside.mask_of(z_part)
    coded = tile.y_seen.inside(tile.z_seen.times(y.shape[2] // z.shape[2]))
    _, inverse_gain = model.gains(torch.tensor([level]))

    adam = torch.optim.Adam([y_part, z_part], lr=LEARNING_RATE)
    for step in range(steps):
        tau = temperature(step / steps)
        z_hat = torch.where(own_z, annealed(z_part, tau, noise), z_part.round())
        mean, log_scale = coded.of(model.h_s(z_hat).to(x.dtype)).chunk(2, 1)
        residual = y_part - mean
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
        with torch.no_grad():
            report(y_part, z_part, J=J, bpp=bpp, psnr=-10 * torch.log10(mse))
    with torch.no_grad():
        tile.y.of(y)[:] = y_inside.of(y_part)
        tile.z.of(z)[:] = z_inside.of(z_part)


def temperature(progress):
    """tau after a share of the steps, `progress`: constant, then falling exponentially."""
    return TAU * math.exp(-TAU_FALL * max(0, progress - TAU_HELD))


def annealed(v, tau, noise):
    """v_hat of the formula above, of any shape. noise: a torch.Generator."""
    low = v.detach().floor()
    towards_upper = torch.logit(v - low, NEAREST) / tau
    towards_upper = towards_upper + torch.logit(torch.rand(v.shape, generator=noise), NEAREST)
    return low + torch.sigmoid(towards_upper / SOFTNESS)
