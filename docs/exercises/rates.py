"""Where the bits of a codec are, on the crops of held_out_J from the synthetic images.

    python docs/exercises/rates.py runs/dense.pt

y is counted apart on the two colours of a chessboard: in the exercise `checkerboard` the anchors
are where row + column is odd. In all other codecs the two colours differ by chance alone.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lic.codec.checkpoint import load_checkpoint
from lic.codec.entropy import MAX_BITS
from lic.images import fixed_crops
from lic.photographs import load_images
from lic.train.loss import rate_distortion
from lic.train.stage import HELD_OUT_CROPS

CROP = 128  # pixels, the default of train.py

model, _ = load_checkpoint(sys.argv[1])
_, validation = load_images(None, CROP)
x = fixed_crops(validation, HELD_OUT_CROPS, CROP)  # (16, 3, 128, 128)
prior_bits, seen = model.prior_y.bits, []


def kept_bits(*arguments):
    bits = prior_bits(*arguments)  # (16, M, 8, 8)
    seen.append(bits.clamp(max=MAX_BITS))  # as in Codec.forward
    return bits


model.prior_y.bits = kept_bits
print("lambda       J    bpp of z   of y   odd   even    PSNR dB")
for level, lmbda in enumerate(model.lambdas):
    with torch.no_grad():
        out = model(x, torch.full((len(x),), float(level)))
    J, y_bpp, z_bpp, mse = (figure.mean() for figure in rate_distortion(out, x, lmbda))
    bits = seen[-1].sum((0, 1)) / (len(x) * CROP**2)  # (8, 8)
    row, column = torch.meshgrid(*map(torch.arange, bits.shape), indexing="ij")
    odd = (row + column) % 2 == 1
    print(
        f"{lmbda:<7} {J:8.4f}  {z_bpp:8.4f} {y_bpp:8.4f} {bits[odd].sum():7.4f} "
        f"{bits[~odd].sum():7.4f} {-10 * torch.log10(mse):7.3f}"
    )
