"""A large picture in tiles: what is searched at once, and how far one looks beyond it."""

import math
from typing import NamedTuple

import torch

TILE = 48  # positions of y, 768 pixels: the longest side of a tile


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

    def inside(self, outer):
        """The same rectangle, counted from the upper left corner of another."""
        top, left = outer.top, outer.left
        return Window(self.top - top, self.bottom - top, self.left - left, self.right - left)

    def pixels_of(self, image, side):
        """The pixels of an image (H, W, 3) under a window of positions of side x side pixels."""
        top, bottom, left, right = (side * edge for edge in self)
        return image[top:bottom, left:right]


def tiles_of(rows, columns):
    """Windows that cover rows x columns positions of y, of nearly the same size."""
    return [
        Window(top, bottom, left, right)
        for top, bottom in pieces(rows)
        for left, right in pieces(columns)
    ]


def pieces(length):
    """[(start, end)] of a line in pieces of at most TILE, nearly equal."""
    count = math.ceil(length / TILE)
    edges = [length * k // count for k in range(count + 1)]
    return list(zip(edges[:-1], edges[1:]))
