"""What the hyperprior of a codec saves on one picture.

    python docs/exercises/one_density.py checkpoints/dense.pt docs/coffee.png
    python docs/exercises/one_density.py runs/dense.pt                          a synthetic picture

Compares the bits of y and z with the entropy of y rounded, a channel at a time: what y would cost
with one table a channel, and with the table that suits this very picture best. A trained table,
which must suit all pictures, costs more.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lic.codec.bitstream import padded
from lic.codec.checkpoint import load_checkpoint
from lic.images import dead_leaves, read_image


def entropy(symbols):
    """Bits of all symbols under the table of their own frequencies. symbols: (n,)."""
    _, counts = symbols.unique(return_counts=True)
    return -(counts * torch.log2(counts / len(symbols))).sum()


model, _ = load_checkpoint(sys.argv[1])
x = padded(read_image(sys.argv[2]) if len(sys.argv) > 2 else dead_leaves(100, 512))
pixels = x.shape[2] * x.shape[3]
print("lambda     y      z      sum    one table a channel")
for level, lmbda in enumerate(model.lambdas):
    level = torch.tensor([float(level)])
    with torch.no_grad():
        gain, _ = model.gains(level)
        y = (model.g_a(x - 0.5) * gain).round()  # (1, M, H/16, W/16)
        out = model(x, level)
    y_bpp, z_bpp = out.y_bits.sum() / pixels, out.z_bits.sum() / pixels
    one_table = sum(map(entropy, y[0].flatten(1))) / pixels
    print(
        f"{lmbda:<7} {y_bpp:.4f} {z_bpp:.4f} {y_bpp + z_bpp:.4f} "
        f"{one_table:.4f} {one_table / (y_bpp + z_bpp) - 1:+.1%}"
    )
