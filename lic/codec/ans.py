"""The entropy coder: integers to words and back, by tables of integer counts. NumPy alone.

Symbols are sorted by table (stable, so the order within a table stays) and each table codes its
run of symbols in one call: a loop over tables, not over symbols.

The stream is an asymmetric numeral system (Duda, arXiv:1311.2540) with a state of 64 bits, words
of 32 and counts of 24. `LibraryAns` leaves it to constriction, `PlainAns` is the same in Python:
the same words, a hundred times slower, for machines that constriction has no build for, and for
readers. docs/bitstream.md describes it once more, for other languages.
"""

import bisect
import functools
import sys

import numpy as np

from lic.files import BadStream

PRECISION = 24  # bits; fixed by constriction's default ANS coder
WORD = 32  # bits


class PlainAns:
    """A stack of symbols: what is pushed last is popped first.

    words: an array, as `words()` gives it. ValueError if the last is 0, which no coder writes.
    """

    def __init__(self, words=None):
        self.stack = [] if words is None else words.tolist()
        if self.stack and self.stack[-1] == 0:
            raise ValueError("the last word is 0")
        self.state = 0
        for _ in range(2):
            self._refill()

    def _refill(self):
        if self.stack:
            self.state = (self.state << WORD) | self.stack.pop()

    def push(self, entries, counts):
        """Code entries (n,) of the table `counts`, the last one first."""
        starts = np.cumsum(counts) - counts
        for entry in reversed(entries.tolist()):
            count, start = int(counts[entry]), int(starts[entry])
            if (self.state >> (64 - PRECISION)) >= count:  # the state would outgrow its 64 bits
                self.stack.append(self.state % 2**WORD)
                self.state >>= WORD
            quotient, remainder = divmod(self.state, count)
            self.state = (quotient << PRECISION) + start + remainder

    def pop(self, n, counts):
        """The next n entries of the table `counts`, (n,) int32."""
        ends = np.cumsum(counts).tolist()
        entries = np.empty(n, np.int32)
        for i in range(n):
            slot = self.state % 2**PRECISION
            entry = bisect.bisect_right(ends, slot)  # the entry whose counts hold this slot
            count = int(counts[entry])
            self.state = (self.state >> PRECISION) * count + slot - (ends[entry] - count)
            if self.state < 2**WORD:
                self._refill()
            entries[i] = entry
        return entries

    def words(self):
        """(words,) uint32."""
        words, state = list(self.stack), self.state
        while state:
            words.append(state % 2**WORD)
            state >>= WORD
        return np.array(words, np.uint32)

    def is_empty(self):
        return self.state == 0 and not self.stack


class LibraryAns:
    """The same by constriction."""

    def __init__(self, words=None):
        self.constriction = import_constriction()
        self.coder = self.constriction.stream.stack.AnsCoder(words)

    def _model(self, counts):
        # Of n probabilities p constriction makes integers of its own, of which each entry gets
        # one beforehand and a share of the other 2^24 - n by p. So p = counts - 1, which adds up
        # to 2^24 - n, gives back exactly our counts; but only without `perfect`, which would
        # distribute roundings.
        p = (counts - 1).astype(np.float64)
        return self.constriction.stream.model.Categorical(p, perfect=False, lazy=False)

    def push(self, entries, counts):
        self.coder.encode_reverse(entries, self._model(counts))

    def pop(self, n, counts):
        return self.coder.decode(self._model(counts), n)

    def words(self):
        return self.coder.get_compressed()

    def is_empty(self):
        return self.coder.is_empty()


@functools.cache
def import_constriction():
    """The library, or None, with a warning, where it is not installed."""
    try:
        import constriction
    except ImportError:
        print(
            "warning: constriction is not installed; entropy coding in Python, slowly",
            file=sys.stderr,
        )
        return None
    return constriction


def new_coder(words=None):
    """A coder with these words, or without any."""
    return LibraryAns(words) if import_constriction() else PlainAns(words)


def runs_of(tables, table_index):
    """Order that sorts the symbols by table, and (start, end, counts, offset) of each run in it."""
    order = np.argsort(table_index, kind="stable")
    lengths = np.bincount(table_index, minlength=len(tables.sizes))
    ends = np.cumsum(lengths)
    table_ends = np.cumsum(tables.sizes)
    runs = []
    for t in np.flatnonzero(lengths):
        counts = tables.counts[table_ends[t] - tables.sizes[t] : table_ends[t]]
        runs.append((ends[t] - lengths[t], ends[t], counts, tables.offsets[t]))
    return order, runs


def encode(symbols, table_index, tables):
    """Code integers: symbols (n,) int32, table_index (n,) -> words uint32, escapes int32.

    tables: tables.Tables. escapes: the values outside their tables, in the order in which they are
    decoded.
    """
    order, runs = runs_of(tables, table_index)
    sorted_symbols = symbols[order]
    coder, escapes = new_coder(), []
    for start, end, counts, offset in reversed(runs):  # a stack: coded last, decoded first
        values = sorted_symbols[start:end]
        entries = values - offset
        escape = len(counts) - 1
        outside = (entries < 0) | (entries >= escape)
        escapes.append(values[outside])
        entries[outside] = escape
        coder.push(entries, counts)
    return coder.words(), np.concatenate([np.empty(0, np.int32), *reversed(escapes)])


def decode(words, escapes, table_index, tables):
    """Inverse of `encode`: (n,) int32. BadStream if the stream does not end where it must.

    Not every damage shows so: whoever calls this compares a checksum of the symbols.
    """
    order, runs = runs_of(tables, table_index)
    try:
        coder = new_coder(words)
    except ValueError as error:
        raise BadStream("the entropy-coded data is damaged") from error
    sorted_symbols = np.empty(len(order), np.int32)
    used = 0
    for start, end, counts, offset in runs:
        entries = coder.pop(int(end - start), counts)
        values = entries + offset
        escaped = np.flatnonzero(entries == len(counts) - 1)
        following = escapes[used : used + len(escaped)]
        if len(following) < len(escaped):
            raise BadStream("the entropy-coded data does not end where it must")
        values[escaped] = following
        used += len(escaped)
        sorted_symbols[start:end] = values
    if used != len(escapes) or not coder.is_empty():
        raise BadStream("the entropy-coded data does not end where it must")
    symbols = np.empty_like(sorted_symbols)
    symbols[order] = sorted_symbols
    return symbols
