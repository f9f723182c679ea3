"""Integer probability tables: the bridge from the densities of entropy.py to the coder.

A table is a row of integer counts that add up to 2^24, one for each integer of its support
[offset, offset + size - 2] and a last one for "escape". A symbol outside the support is coded
as escape and its value stored plainly beside the stream: nothing is ever clipped.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch

from lic.codec.ans import PRECISION
from lic.codec.entropy import LOG_SCALE_MIN, LOG_SCALE_STEP, SCALE_LEVELS

TAIL = 2.0**-20  # mass that a distribution may have on either side of its table, before MARGIN
MARGIN = 16  # entries added on either side: an outlier costs 24 bits there, an escape 19 + 32
REACH = 2**14  # a support never reaches further from 0, before MARGIN


class Tables(NamedTuple):
    counts: np.ndarray  # (sum of sizes,) int32, the tables one after the other
    sizes: np.ndarray  # (T,) int32, entries of each table with the escape
    offsets: np.ndarray  # (T,) int32, the integer that entry 0 stands for


def numbers_of_tables(config):
    """How many tables a codec has: for z one a channel, for y one a scale."""
    return {"z": config["widths"]["z"], "y": SCALE_LEVELS}


@torch.no_grad()
def build_tables(model):
    """The coder's tables for z and y: {"z": Tables, "y": Tables}.

    Called once, when a checkpoint is saved. The tables travel with the weights because a decoder
    that computes them anew on another machine may round a count the other way.
    """
    prior = copy.deepcopy(model.prior_z).cpu().double()

    def cdf_z(v):  # (Z, N)
        logits = prior.logits(torch.from_numpy(v)[:, None])  # (Z, 1, N)
        return torch.sigmoid(logits[:, 0]).numpy()

    levels = torch.arange(SCALE_LEVELS, dtype=torch.float64)
    scales = torch.exp(LOG_SCALE_MIN + LOG_SCALE_STEP * levels)[:, None]

    def cdf_y(v):  # (SCALE_LEVELS, N)
        return (0.5 * torch.erfc(-torch.from_numpy(v) / scales * 0.5**0.5)).numpy()

    cdfs, counts = {"z": cdf_z, "y": cdf_y}, numbers_of_tables(model.config)
    return {kind: tables_of(cdfs[kind], count) for kind, count in counts.items()}


def tables_of(cdf, count):
    """Tables of `count` distributions. cdf: (count, N) float64 values -> (count, N)."""
    first = smallest_integer(lambda v: cdf(v[:, None] + 0.5)[:, 0] > TAIL, count) - MARGIN
    last = smallest_integer(lambda v: cdf(v[:, None] + 0.5)[:, 0] >= 1 - TAIL, count) + MARGIN
    edges = np.arange(first.min(), last.max() + 2) - 0.5
    mass = np.diff(cdf(np.repeat(edges[None], count, axis=0)), axis=1)  # (count, widest support)
    rows = []
    for t in range(count):
        support = slice(first[t] - first.min(), last[t] - first.min() + 1)
        p = np.append(mass[t, support].clip(min=0), 2 * TAIL)
        counts = 1 + np.floor(p / p.sum() * (2**PRECISION - len(p))).astype(np.int32)
        counts[counts.argmax()] += 2**PRECISION - counts.sum()
        rows.append(counts)
    sizes = np.array([len(row) for row in rows], dtype=np.int32)
    return Tables(np.concatenate(rows), sizes, first.astype(np.int32))


def smallest_integer(condition, count):
    """Smallest v from -REACH on at which condition(v) holds, at most REACH, by bisection: (count,).

    condition: (count,) integers -> (count,) bool; where it is true, so it is for all larger ones.
    """
    low, high = np.full(count, -REACH), np.full(count, REACH)
    while (low < high).any():
        middle = (low + high) // 2
        holds = condition(middle)
        high = np.where(holds, middle, high)
        low = np.where(holds, low, np.minimum(middle + 1, high))  # a finished one stays
    return low
