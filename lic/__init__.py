"""lic: learned image compression, its pruning by search, and its quantization, from scratch.

    import lic
    codec = lic.load("checkpoints/quantized.pt")   # without a name: the one that is shipped
    data = codec.encode(image, quality=2)          # (H, W, 3) uint8 -> bytes
    image = codec.decode(data)
    data = lic.encode(codec, image, quality=2, effort=60)   # slow, a better file

The command line is in __main__.py, the stages are scripts beside this folder.
"""

import numbers
from pathlib import Path

from lic.files import MAX_PIXELS, LicError

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "quantized.pt"


def load(path=SHIPPED, amp=False):
    """The bitstream.ImageCoder of a checkpoint. Raises LicError for a file that cannot be used."""
    from lic.codec.bitstream import load_coder  # here: not all that imports lic needs torch

    return load_coder(path, amp)


def encode(codec, image, quality=None, effort=0, max_pixels=MAX_PIXELS, verbose=False):
    """codec.encode, with a search of so many steps for a better file: train/effort.py.

    verbose: print how the search goes. Raises LicError for an effort that is no whole number from
    0 up.
    """
    whole = isinstance(effort, numbers.Integral) and not isinstance(effort, bool)
    if not whole or effort < 0:
        raise LicError(f"effort {effort!r} is not a whole number from 0 up")
    if effort == 0:
        return codec.encode(image, quality, max_pixels)
    from lic.train.effort import encode  # here: a decoder does not need what trains

    return encode(codec, image, quality, effort, max_pixels, verbose)
