"""Photographs in, crops out; and "dead leaves" where there are no photographs.

An image is a NumPy array (H, W, 3), uint8, RGB. Photographs are decoded once and cropped
from memory. Every 16th file of a sorted folder is held out for validation.

Dead leaves: overlapping textured discs whose radii follow a power law have the scale
invariance and the edges of natural images (Lee, Mumford, Huang, "Occlusion models for
natural images", IJCV 2001).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lic.files import LicError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
HELD_OUT = 16
BITS_PER_SAMPLE = 258  # a TIFF tag


def read_image(path):
    """(H, W, 3) uint8 RGB of any file that Pillow opens; raises LicError naming the file.

    Turned as EXIF says; 16 bits are scaled to 8, not clipped (grey rounded here, colour truncated
    by Pillow); transparency is composited on white; CMYK is converted without a colour profile; of
    an animation, the first frame. Floating-point and 32-bit images have no known white and are
    refused, and so are TIFFs of 12 bits and 16-bit grey with transparency, which Pillow does not
    tell apart from plain 16-bit grey.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):
                # 16-bit grey, which convert("RGB") would clip to white
                if image.has_transparency_data:
                    raise ValueError("16-bit grey with transparency; convert it to 8 bits first")
                if file.format == "TIFF" and file.tag_v2.get(BITS_PER_SAMPLE, (16,)) != (16,):
                    raise ValueError("neither 8 nor 16 bits a sample; convert it first")
                grey = np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if image.mode in ("I", "F"):
                raise ValueError("32-bit or floating-point pixels; convert it to 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.array(image.convert("RGB"))  # a copy, which torch may share
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise LicError(f"cannot read {path} as an image: {error}") from error


def find_images(folder):
    """Sorted paths of the images anywhere below `folder`; raises LicError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LicError(f"{folder} is not a folder; --data takes a folder of images")
    paths = []
    for path in folder.rglob("*"):
        hidden = path.name.startswith(".")  # macOS puts a ._name.png beside name.png
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            paths.append(path)
    # upper case first also on Windows: the same images are held out everywhere
    paths.sort(key=lambda path: path.parts)
    if not paths:
        raise LicError(f"no images below {folder}; looked for {' '.join(sorted(SUFFIXES))}")
    return paths


def dead_leaves(seed, size=256):
    """One synthetic image, (size, size, 3) uint8, determined by its seed."""
    rng = np.random.default_rng([seed, size])
    image = np.full((size, size, 3), 128.0)
    rows, columns = np.mgrid[0:size, 0:size]
    smallest, largest = size / 50, size / 2
    for _ in range(1200):  # covers the image several times over
        u = rng.random()  # radius density ~ r^-3, so r^-2 is uniform
        r = (u * smallest**-2 + (1 - u) * largest**-2) ** -0.5
        cy, cx = rng.uniform(-r, size + r, 2)
        top, left = max(int(cy - r), 0), max(int(cx - r), 0)
        box = np.s_[top : int(cy + r) + 2, left : int(cx + r) + 2]
        y, x = rows[box] - cy, columns[box] - cx
        inside = y * y + x * x <= r * r
        slope, frequency = rng.normal(0, 0.25, 2), rng.normal(0, 0.4, 2)
        waves = np.sin(frequency[0] * y + frequency[1] * x)
        shade = slope[0] * y + slope[1] * x + rng.exponential(6) * waves
        colour = rng.uniform(20, 235) + rng.normal(0, 25, 3)  # mostly grey, as photographs are
        image[box][inside] = (colour + shade[:, :, None])[inside]
    image += rng.normal(0, 2, image.shape)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def load_images(data, crop):
    """Training and validation images: two lists of (H, W, 3) uint8.

    data: a folder, or None for 24 synthetic images. Every image must hold a crop x crop square.
    """
    if data is None:
        images = [dead_leaves(seed) for seed in range(24)]
        names = [f"synthetic image {seed}" for seed in range(24)]
    else:
        names = find_images(data)
        images = [read_image(path) for path in names]
    for name, image in zip(names, images):
        if min(image.shape[:2]) < crop:
            height, width = image.shape[:2]
            raise LicError(
                f"{name} is {width}x{height}, smaller than the crop of {crop}; "
                "crop less, or leave such images out"
            )
    validation = images[::HELD_OUT]
    train = [image for i, image in enumerate(images) if i % HELD_OUT]
    return train or validation, validation


def to_tensor(images):
    """Equally large images, list of (H, W, 3) uint8 -> (B, 3, H, W) in [0, 1], channels_last."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def random_crops(images, batch, crop, rng):
    """Random squares of crop pixels, half of them mirrored: (batch, 3, crop, crop) in [0, 1].

    images: list of (H, W, 3) uint8 tensors, all on the device where the crops are wanted. The
    result is channels_last.
    """
    crops = []
    for index in rng.integers(len(images), size=batch):
        height, width, _ = images[index].shape
        top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
        square = images[index][top : top + crop, left : left + crop]
        crops.append(square.flip(1) if rng.random() < 0.5 else square)
    return torch.stack(crops).permute(0, 3, 1, 2).float() / 255


def fixed_crops(images, count, crop):
    """Centre squares of count images spread over the list: (count, 3, crop, crop), or fewer.

    The same at every call, at most one an image.
    """
    crops = []
    for index in np.linspace(0, len(images) - 1, min(count, len(images))).astype(int):
        image = images[index]
        top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
        crops.append(image[top : top + crop, left : left + crop])
    return to_tensor(crops)
