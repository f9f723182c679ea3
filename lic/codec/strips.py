"""Large pictures pass through the networks in strips, so that memory does not grow with them.

A strip is some rows of a network's coarse side (y for g_a and g_s, z for h_a and h_s) with as many
rows above and below as its layers see; what these make is cut off again. So every kept value is
computed from the same inputs as in one piece: in integers the same bits, in floating point the same
but for an order of summation that a library may choose by size.
"""

import math

import torch

from lic.codec import structure

WHOLE = 2**22  # pixels of the picture up to which it passes in one piece
STRIP = 2**20  # pixels of a strip, about
MARGINS = 4  # a strip has at least so many times the rows of its margin, which are computed twice


def reach(network):
    """Rows of the coarse side of "g_a", "g_s", "h_a" or "h_s" that one row there depends on.

    On either side. A layer sees kernel // 2 rows of what it evaluates; on the way a row of a finer
    level is a fraction of a coarse one.
    """
    where = structure.positions()
    rows = 0.0
    for layer in structure.layers_of(network):
        # a transposed convolution meets one input on either side, see structure.PHASES
        seen = layer.kernel // 2 if layer.kind == "conv" else 1
        pixels = where[layer.reads] ** -0.5  # on the side of a position of its input
        rows += seen * pixels / coarse_side(network)
    return math.ceil(rows)


def row_ranges(height, width, side, margin):
    """(start, end, start with margin, end with margin) of each strip, rows of the coarse side.

    height, width: of the coarse side; side: pixels of the picture on the side of a position there.
    """
    rows = height
    if height * width * side**2 > WHOLE:
        rows = max(1, MARGINS * margin, STRIP // (width * side**2))
    for start in range(0, height, rows):
        end = min(start + rows, height)
        yield start, end, max(0, start - margin), min(height, end + margin)


def down(name, network, height, width, rows_of):
    """What g_a or h_a makes of an input: (1, C, height, width).

    rows_of(start, end): the input's rows that belong to those rows of the output, a tensor.
    """
    side = coarse_side(name)
    parts = []
    for start, end, above, below in row_ranges(height, width, side, reach(name)):
        part = network(rows_of(above, below))
        parts.append(part[:, :, start - above : end - above])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def up(name, network, x):
    """What g_s or h_s makes of x (1, C, h, w), strip by strip, from top to bottom.

    network: returns a tuple of tensors; yields such tuples.
    """
    height, width = x.shape[2:]
    for start, end, above, below in row_ranges(height, width, coarse_side(name), reach(name)):
        parts = network(x[:, :, above:below])
        scale = parts[0].shape[2] // (below - above)
        kept = slice(scale * (start - above), scale * (end - above))
        yield tuple(part[:, :, kept] for part in parts)


def coarse_side(name):
    """Pixels of the picture on the side of a position of a network's coarse side: 16 or 64."""
    group = "y" if name in ("g_a", "g_s") else "z"
    return round(structure.positions()[group] ** -0.5)
