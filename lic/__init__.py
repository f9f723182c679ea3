"""lic: learned image compression, its pruning by search, and its quantization, from scratch.

    import lic
    codec = lic.load("checkpoints/quantized.pt")   # without a name: the one that is shipped
    data = codec.encode(image, quality=2)          # (H, W, 3) uint8 -> bytes
    image = codec.decode(data)

The command line is in __main__.py, the stages are scripts beside this folder.
"""

from pathlib import Path

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "quantized.pt"


def load(path=SHIPPED, amp=False):
    """The bitstream.ImageCoder of a checkpoint. Raises LicError for a file that cannot be used."""
    from lic.codec.bitstream import load_coder  # here: not all that imports lic needs torch

    return load_coder(path, amp)
