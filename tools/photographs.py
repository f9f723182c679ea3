"""Photographs by the ten thousand: what a step pays for its crops (docs/scale.md).

python tools/photographs.py make photos/ --count 20000     JPEGs of 640x480, synthetic
python tools/photographs.py crops photos/ --cache runs/    decoded if need be, then cropped
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lic.images import dead_leaves, random_crops, to_tensor
from lic.photographs import open_photographs, raw_path
from lic.program import run

HEIGHT, WIDTH, SIDE = 480, 640, 800  # of a photograph; of the images that they are cut from
SOURCES = 60
STEPS, BATCH, CROP = 200, 8, 128


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=("make", "crops"))
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=20_000, help="(default: 20000)")
    parser.add_argument("--cache", default="runs", help="(default: runs)")
    return parser.parse_args()


def make(folder, count):
    """Pieces of a few synthetic images, mirrored or not, each with noise: no two are the same."""
    rng = np.random.default_rng(0)
    sources = [dead_leaves(seed, SIDE).astype(np.int16) for seed in range(SOURCES)]
    noise = rng.normal(0, 4, (SIDE, SIDE, 3)).astype(np.int16)
    for number in range(count):
        piece = window(sources[number % SOURCES], rng) + window(noise, rng)
        path = Path(folder, f"{number // 1000:03}", f"{number:06}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(piece.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def window(image, rng):
    top, left = rng.integers(SIDE - HEIGHT), rng.integers(SIDE - WIDTH)
    piece = image[top : top + HEIGHT, left : left + WIDTH]
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def time_crops(folder, cache):
    start = time.perf_counter()
    images = open_photographs(folder, cache)
    print(f"{len(images)} images opened in {time.perf_counter() - start:.2f} s")
    with open(raw_path(folder, cache), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for state in ("cold", "warm"):  # the same crops: the second time they are in memory
        rng, seconds = np.random.default_rng(0), []
        for _ in range(STEPS):
            start = time.perf_counter()
            to_tensor(random_crops(images, BATCH, CROP, rng))
            seconds.append(time.perf_counter() - start)
        mean, median = 1000 * np.mean(seconds), 1000 * np.median(seconds)
        print(f"{BATCH} crops of {CROP}x{CROP}, {state}: mean {mean:.1f} ms, median {median:.1f}")


def main():
    args = parse_args()
    if args.what == "make":
        make(args.folder, args.count)
    else:
        time_crops(args.folder, args.cache)


if __name__ == "__main__":
    run(main)
