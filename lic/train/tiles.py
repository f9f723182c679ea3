"""A large picture in tiles: what is searched at once, and how far one looks beyond it."""

import math
from typing import NamedTuple

import torch

from lic.codec.strips import coarse_side, reach

TILE = 12  # positions of z, 768 pixels: the longest side of a tile


class Window(NamedTuple):
    """A rectangle of rows and columns."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, tensor):
        """Its part of a tensor (..., rows, columns)."""
        return tensor[..., self.top : self.bottom, self.left : self.right]

    def mask_of(self, tensor):
        """True in the window: (rows, columns) of a tensor (..., rows, columns)."""
        mask = torch.zeros(tensor.shape[-2:], dtype=torch.bool)
        self.of(mask)[:] = True
        return mask

    def wider(self, margin, rows, columns):
        """With a margin on each side, within `rows` and `columns`."""
        return Window(
            max(0, self.top - margin),
            min(rows, self.bottom + margin),
            max(0, self.left - margin),
            min(columns, self.right + margin),
        )

    def times(self, factor):
        """The same rectangle where rows and columns are so many times finer."""
        return Window(*(factor * edge for edge in self))

    def inside(self, outer):
        """The same rectangle, counted from the upper left corner of another."""
        top, left = outer.top, outer.left
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)


class Tile(NamedTuple):
    z: Window  # its positions
    y: Window
    z_seen: Window  # with those on which the coding of its y depends
    y_seen: Window  # with those that its y meets in a pixel
    pixels: Window  # of y_seen


def tiles_of(rows, columns):
    """Tiles that cover rows x columns positions of z, of nearly the same size."""
    y_side, z_side = coarse_side("g_s"), coarse_side("h_s")  # 16 and 64 pixels
    # y's pixels reach as far as g_s does, and these see as far again
    y_margin = math.ceil(2 * reach("g_s") * y_side / z_side)
    tiles = []
    for top, bottom in pieces(rows):
        for left, right in pieces(columns):
            z = Window(top, bottom, left, right)
            z_seen = z.wider(reach("h_s"), rows, columns)
            y_seen = z.wider(y_margin, rows, columns).times(z_side // y_side)
            y = z.times(z_side // y_side)
            tiles.append(Tile(z, y, z_seen, y_seen, y_seen.times(y_side)))
    return tiles


def pieces(length):
    """[(start, end)] of a line in pieces of at most TILE, nearly equal."""
    count = math.ceil(length / TILE)
    edges = [length * k // count for k in range(count + 1)]
    return list(zip(edges[:-1], edges[1:]))
