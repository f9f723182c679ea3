"""Photographs in, crops out; and "dead leaves" where there are no photographs.

An image is a NumPy array (H, W, 3), uint8, RGB. One in sixteen is held out for validation: which,
its pixels decide, so that a photograph stays on its side whatever is added to its folder (only
where that holds out none, it is the one of the least digest). photographs.py decodes a folder once
for all runs.

Dead leaves: overlapping textured discs whose radii follow a power law have the scale
invariance and the edges of natural images (Lee, Mumford, Huang, "Occlusion models for
natural images", IJCV 2001).
"""

import hashlib
import itertools
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lic.files import MAX_PIXELS, LicError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
HELD_OUT = 16  # one image in so many
# TIFF and EXIF tags
SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 254, 258, 262, 274, 339
TURNS = {  # EXIF orientation: what shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path, max_pixels=MAX_PIXELS):
    """(H, W, 3) uint8 RGB of any file that Pillow opens; raises LicError naming the file.

    Turned as EXIF says, if it says so legibly; 16 bits are scaled to 8, not clipped (grey rounded
    here, colour truncated by Pillow); transparency is composited on white; CMYK is converted
    without a colour profile; of an animation, the first frame. Metadata never matter.

    Refused is what has no known white or what Pillow does not tell apart from something else:
    floating-point and 32-bit pixels, signed ones, TIFFs of 12 bits, 16 bits with a transparent
    colour; a TIFF that begins with a preview; what has more than max_pixels; and what is cut off, a
    JPEG even if by its end marker alone, since that does not tell whether pixels are missing, too.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no ordinary file")
        # an open file: given a path, Pillow maps some TIFFs into memory in the wrong shape
        with pillow_limits(), open(path, "rb") as data, Image.open(data) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{width}x{height} pixels, more than the limit of {max_pixels} "
                    "(python -m lic has --max-pixels)"
                )
            file.load()
            image = turned(file)
            if file.format == "PNG":
                image = with_transparent_colour(image, file, bits=png_bits(data))
            return to_rgb(image, file)
    except MemoryError as error:
        raise LicError(f"cannot read {path} as an image: not enough memory") from error
    except UnidentifiedImageError as error:
        raise LicError(
            f"cannot read {path} as an image: it is damaged, no image, or of a kind that Pillow "
            "does not know (HEIC, raw); convert it to PNG or JPEG first"
        ) from error
    except OSError as error:
        raise LicError(f"cannot read {path} as an image: {error.strerror or error}") from error
    except Exception as error:  # whatever a decoder raises, the file is to blame
        raise LicError(f"cannot read {path} as an image: {error}") from error


@contextmanager
def pillow_limits():
    """Within it Pillow has no limit of its own on pixels, and one of 64 MiB on a PNG's texts."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, 2**26
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def turned(file):
    """The picture upright. An orientation that cannot be read is none: so do viewers."""
    try:
        orientation = file.getexif().get(ORIENTATION)
    except Exception:
        orientation = None
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return file.copy() if turn is None else file.transpose(turn)


def png_bits(data):
    """Bits a sample of an open PNG file, from its header."""
    data.seek(24)
    return data.read(1)[0]


def with_transparent_colour(image, file, bits):
    """Mend what Pillow makes of a transparent colour (tRNS) in a PNG that has not 8 bits a sample.

    It scales grey of 1, 2 and 4 bits to 8, but not that colour; of 16 bits it keeps the upper 8.
    """
    colour = file.info.get("transparency")
    if colour is None or bits == 8 or image.mode not in ("1", "L", "RGB"):
        return image
    if bits == 16:
        raise ValueError("16 bits with a transparent colour; convert it to 8 bits first")
    image = image.convert("L")
    image.info["transparency"] = colour * 255 // (2**bits - 1)
    return image


def to_rgb(image, file):
    """(H, W, 3) uint8 of `image`, which was opened as `file` and may have been changed since."""
    tags = file.tag_v2 if file.format == "TIFF" else {}
    if tags.get(SUBFILE_TYPE) in (1, 3):  # bit 0: a reduced picture; a tag of any type
        raise ValueError("its first picture is a preview, as in raw files; develop it first")
    unsigned = set(tags.get(SAMPLE_FORMAT, (1,))) == {1}
    if not unsigned and image.mode not in ("I", "F"):
        raise ValueError("its samples are no unsigned integers; convert it first")
    if image.mode.startswith("I;16") or (image.mode == "I" and file.format == "PPM"):
        # 16-bit grey, which convert("RGB") would clip to white
        if image.has_transparency_data:
            raise ValueError("16-bit grey with transparency; convert it to 8 bits first")
        if tags.get(BITS_PER_SAMPLE, (16,)) != (16,):
            raise ValueError("neither 8 nor 16 bits a sample; convert it first")
        grey = np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == 0:  # white is 0, which Pillow knows of 8 bits alone
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("32-bit or floating-point pixels; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))  # a copy, which torch may share


def find_images(folder):
    """Sorted paths of the images anywhere below `folder`; raises LicError if there is none.

    Hidden files and folders are left out; linked folders are followed, each once. What else is
    left out is counted in a printed line.
    """
    if not str(folder):
        raise LicError("the name of the folder is empty; give a folder of images")
    if not os.path.isdir(folder):
        raise LicError(f"{folder} is not a folder; give a folder of images")
    paths, left_out, visited = [], {}, set()

    def leave_out(what):
        left_out[what] = left_out.get(what, 0) + 1

    # links are followed, and a loop of them is not
    for parent, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: leave_out("unreadable folders")
    ):
        here = os.path.realpath(parent)
        if here in visited:
            folders.clear()
            continue
        visited.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):  # macOS puts a ._name.png beside name.png
                continue
            if path.suffix.lower() in SUFFIXES and path.is_file():
                paths.append(path)
            else:
                leave_out(path.suffix.lower() or "files without a suffix")
    if left_out:
        counts = (f"{count} {what}" for what, count in sorted(left_out.items()))
        print(f"left out below {folder}: {', '.join(counts)}")
    if not paths:
        raise LicError(f"no images below {folder}; looked for {' '.join(sorted(SUFFIXES))}")
    # upper case first also on Windows: the same order everywhere
    return sorted(paths, key=lambda path: path.parts)


def read_images(paths, crop=0):
    """Images; raises LicError that names all those that cannot be read or hold no crop."""
    images, faults = [], []
    for path in paths:
        try:
            image = read_image(path)
        except LicError as error:
            faults.append(str(error))
            continue
        fault = fault_of_size(path, *image.shape[:2], crop)
        if fault:
            faults.append(fault)
        images.append(image)
    if faults:
        raise LicError(f"{in_words(faults)}: leave such images out")
    return Images(images)


def fault_of_size(path, height, width, crop):
    """What is wrong with an image that holds no square of crop x crop pixels, or None."""
    if min(height, width) < crop:
        return f"{path} is {width}x{height}, smaller than the crop of {crop}"
    return None


def in_words(faults):
    """The first twenty of many sentences, and how many more there are."""
    more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
    return "; ".join(faults[:20]) + more


def digest(image):
    """SHA-256 of an image's size and pixels, bytes."""
    return hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()


class Images(list):
    """A list of (H, W, 3) uint8, and `digests`, that of each: computed here if they are not given.

    So what asks for the digests of many photographs need not read their pixels again.
    """

    def __init__(self, images, digests=None):
        super().__init__(images)
        self.digests = [digest(image) for image in self] if digests is None else list(digests)

    def where(self, chosen):
        """Those for which `chosen`, a list of bool, is true."""
        digests = itertools.compress(self.digests, chosen)
        return Images(itertools.compress(self, chosen), digests)


def split(images):
    """Training and validation images, two Images.

    `held_out` says which; if that leaves none to train on, as of a single image, all are both.
    """
    chosen = held_out(images.digests)
    validation = images.where(chosen)
    train = images.where([not held for held in chosen])
    return train or validation, validation


def held_out(digests):
    """Which of some images are held out, a list of bool: one in sixteen, by its digest.

    If that is none, the one with the least digest.
    """
    chosen = [d[0] % HELD_OUT == 0 for d in digests]
    if not any(chosen):
        least = min(digests)
        chosen = [d == least for d in digests]  # and copies of that image
    return chosen


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


def to_tensor(images):
    """Equally large images, list of (H, W, 3) uint8 -> (B, 3, H, W) in [0, 1], channels_last."""
    return in_unit_range(torch.from_numpy(np.stack(images)))


def in_unit_range(pixels):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [0, 1], channels_last."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def random_crops(images, batch, crop, rng):
    """Random squares of crop pixels, half of them mirrored: list of (crop, crop, 3) uint8.

    They are views of the images: no pixel is read yet.
    """
    crops = []
    for index in rng.integers(len(images), size=batch):
        height, width, _ = images[index].shape
        top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
        square = images[index][top : top + crop, left : left + crop]
        crops.append(square[:, ::-1] if rng.random() < 0.5 else square)
    return crops


def fixed_crops(images, count, crop):
    """Centre squares of count images spread over the list: (count, 3, crop, crop), or fewer.

    The same at every call, at most one an image. Raises LicError for an image that holds none.
    """
    crops = []
    for index in np.linspace(0, len(images) - 1, min(count, len(images))).astype(int):
        image = images[index]
        if min(image.shape[:2]) < crop:
            raise LicError(f"an image has less than {crop} pixels a side; leave such images out")
        top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
        crops.append(image[top : top + crop, left : left + crop])
    return to_tensor(crops)
