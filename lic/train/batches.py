"""What is random in a step: crops, levels and the seed of the noise, drawn from (seed, step) alone.

So a run that goes on needs no random state, several processes can draw the same batch and take a
share of it each, and the next batch can be cut while this one is trained on.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from lic.images import random_crops


class Batch(NamedTuple):
    noise: int  # its seed
    pixels: torch.Tensor  # (b, crop, crop, 3) uint8
    level: torch.Tensor  # (b,) int64


def batches_of(steps, images, levels, args, part):
    """The Batch of each step; for a GPU each is cut while the one before is trained on.

    levels: how many there are. part (k, n): the k-th of n processes takes its n-th of a batch.
    """
    one = partial(draw, images=images, levels=levels, args=args, part=part)
    return ahead(one, steps) if args.device == "cuda" else map(one, steps)


def draw(step, images, levels, args, part):
    """The Batch of one step: all of it is drawn, but the pixels of the part alone are read."""
    rng = np.random.default_rng([args.seed, step])
    noise = int(rng.integers(2**63))
    crops = random_crops(images, args.batch, args.crop, rng)
    level = rng.integers(levels, size=args.batch)

    k, n = part
    own = slice(k * args.batch // n, (k + 1) * args.batch // n)
    pixels = torch.from_numpy(np.stack(crops[own]))
    if args.device == "cuda":
        pixels = pixels.pin_memory()  # so that nothing waits for its copy to the GPU
    return Batch(noise, pixels, torch.from_numpy(level[own]))


def ahead(function, arguments):
    """function(argument) for each; a thread computes the next while the last is used."""
    with ThreadPoolExecutor(1) as thread:
        current = None
        for argument in arguments:
            following = thread.submit(function, argument)
            if current:
                yield current.result()
            current = following
        if current:
            yield current.result()
