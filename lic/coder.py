"""Integer probability tables and the entropy coder over them: NumPy and constriction only.

A table is a row of integer counts that add up to 2^24, one for each integer of its support
[offset, offset + size - 2] and a last one for "escape". A symbol outside the support is coded
as escape and its value stored plainly beside the stream: nothing is ever clipped.

Symbols are sorted by table (stable, so the order within a table stays) and each table codes
its run of symbols in one call to constriction's ANS coder: a loop over tables, not over symbols.

`perfect=False` gives symbol k the left cumulative k + floor(sum_{j<k} p_j * (2^24 - n) / sum p).
With p_j = counts_j - 1 the factor is 1 and the coder's integers are exactly ours, so that any
other ANS implementation can read the files (docs/bitstream.md).
"""

from typing import NamedTuple

import constriction
import numpy as np

from lic.files import BadStream

PRECISION = 24  # bits; fixed by constriction's default ANS coder
TAIL = 2.0**-20  # mass that a distribution may have outside its table, on either side, before MARGIN
MARGIN = 16  # entries added on either side: an outlier costs 24 bits there, an escape 19 + 32
REACH = 2**14  # a support never reaches further from 0, before MARGIN


class Tables(NamedTuple):
    counts: np.ndarray  # (sum of sizes,) int32, the tables one after the other
    sizes: np.ndarray  # (T,) int32, entries of each table with the escape
    offsets: np.ndarray  # (T,) int32, the integer that entry 0 stands for


def build_tables(cdf, count):
    """Tables of `count` distributions. cdf: (count, N) float64 values -> (count, N) probabilities."""

    def smallest(condition):
        """Smallest integer v in [-REACH, REACH] for which the rising condition(v) holds: (count,)."""
        low, high = np.full(count, -REACH), np.full(count, REACH)
        while (low < high).any():
            middle = (low + high) // 2
            holds = condition(middle)
            low, high = np.where(holds, low, np.minimum(middle + 1, high)), np.where(holds, middle, high)
        return low

    first = smallest(lambda v: cdf(v[:, None] + 0.5)[:, 0] > TAIL)
    last = smallest(lambda v: cdf(v[:, None] + 0.5)[:, 0] >= 1 - TAIL)
    first, last = first - MARGIN, last + MARGIN
    edges = np.arange(first.min(), last.max() + 2) - 0.5
    mass = np.diff(cdf(np.repeat(edges[None], count, axis=0)), axis=1)  # (count, widest support)
    rows = []
    for t in range(count):
        p = mass[t, first[t] - first.min() : last[t] - first.min() + 1].clip(min=0)
        p = np.append(p, 2 * TAIL)
        counts = 1 + np.floor(p / p.sum() * (2**PRECISION - len(p))).astype(np.int32)
        counts[counts.argmax()] += 2**PRECISION - counts.sum()
        rows.append(counts)
    sizes = np.array([len(row) for row in rows], dtype=np.int32)
    return Tables(np.concatenate(rows), sizes, first.astype(np.int32))


def _runs(tables, table_index):
    """Order that sorts the symbols by table, and (start, end, escape entry, offset, model) of each run."""
    order = np.argsort(table_index, kind="stable")
    lengths = np.bincount(table_index, minlength=len(tables.sizes))
    ends = np.cumsum(lengths)
    starts = np.concatenate([[0], np.cumsum(tables.sizes)])
    runs = []
    for t in np.flatnonzero(lengths):
        end, length = ends[t], lengths[t]
        p = (tables.counts[starts[t] : starts[t + 1]] - 1).astype(np.float64)
        model = constriction.stream.model.Categorical(p, perfect=False, lazy=False)
        runs.append((end - length, end, tables.sizes[t] - 1, tables.offsets[t], model))
    return order, runs


def encode(symbols, table_index, tables):
    """Code integers: symbols (n,) int32, table_index (n,) small ints -> words uint32, escapes int32.

    escapes: the values outside their tables, in the order in which they are decoded.
    """
    order, runs = _runs(tables, table_index)
    sorted_symbols = symbols[order]
    coder = constriction.stream.stack.AnsCoder()
    escapes = []
    for start, end, escape, offset, model in reversed(runs):  # a stack: what is coded last comes out first
        values = sorted_symbols[start:end]
        entries = values - offset
        if entries.min() < 0 or entries.max() >= escape:
            outside = (entries < 0) | (entries >= escape)
            escapes.append(values[outside])
            entries[outside] = escape
        coder.encode_reverse(entries, model)
    escapes = np.concatenate([np.empty(0, np.int32), *reversed(escapes)])
    return coder.get_compressed(), escapes.astype(np.int32)


def decode(words, escapes, table_index, tables):
    """Inverse of `encode`: (n,) int32. Raises BadStream if the stream does not end where it must."""
    order, runs = _runs(tables, table_index)
    try:
        coder = constriction.stream.stack.AnsCoder(words)
    except ValueError as error:
        raise BadStream("the entropy-coded data is damaged") from error
    sorted_symbols = np.empty(len(order), np.int32)
    used = 0
    for start, end, escape, offset, model in runs:
        entries = coder.decode(model, int(end - start))
        values = entries + offset
        outside = np.flatnonzero(entries == escape)
        if len(outside):
            values[outside] = np.resize(escapes[used : used + len(outside)], len(outside))  # too few: refused below
            used += len(outside)
        sorted_symbols[start:end] = values
    if used != len(escapes) or not coder.is_empty():
        raise BadStream("the entropy-coded data does not end where it must")
    symbols = np.empty_like(sorted_symbols)
    symbols[order] = sorted_symbols
    return symbols
