"""Runs that documents share with held-out ones: what a model is tested on must not stand in what it is trained on.

A symbol is a byte or a token id. No token is shorter than a byte, so texts that share no run of 50 bytes share no run
of 50 tokens, whatever the tokenizer. Runs are compared by 64-bit hashes.
"""

from collections.abc import Iterable

import numpy as np

RUN_LENGTH = 50
TABLE_BITS = 26
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(symbols: np.ndarray, length: int) -> np.ndarray:
    """Hashes, uint64 [N - length + 1], of every run of `length` symbols of an integer array [N]."""
    if len(symbols) < length:
        return np.empty(0, np.uint64)
    hashes, width = (symbols.astype(np.uint64) + np.uint64(1)) * MULTIPLIER, 1
    while width < length:
        # Of two shorter runs side by side, at last of two that overlap.
        step = min(width, length - width)
        hashes ^= hashes >> np.uint64(29)
        hashes = hashes[:-step] * MULTIPLIER + hashes[step:]
        width += step
    return hashes


class HeldOut:
    """The runs of `length` symbols in held-out documents, integer arrays [N]."""

    def __init__(self, documents: Iterable[np.ndarray], length: int = RUN_LENGTH) -> None:
        self.length, self.shift = length, np.uint64(64 - TABLE_BITS)
        none = np.empty(0, np.uint64)
        self.known = np.unique(np.concatenate([none, *(run_hashes(symbols, length) for symbols in documents)]))
        # The first bits of a hash rule out nearly all runs before a search.
        self.table = np.zeros(2**TABLE_BITS, bool)
        self.table[self.known >> self.shift] = True

    def shared(self, symbols: np.ndarray) -> np.ndarray:
        """bool [N]: which of the `symbols` [N] lie in a run that a held-out document has too."""
        hashes = run_hashes(symbols, self.length)
        starts = np.flatnonzero(self.table[hashes >> self.shift])
        found = hashes[starts]
        starts = starts[self.known[np.searchsorted(self.known[:-1], found)] == found]
        edges = np.zeros(len(symbols) + 1, np.int64)
        edges[starts] += 1
        edges[starts + self.length] -= 1
        return np.cumsum(edges[:-1]) > 0

    def lines_not_shared(self, text: str) -> str:
        """`text` without the lines that touch a run of its bytes which is held out; what is left has none."""
        symbols = text_bytes(text)
        while (shared := self.shared(symbols)).any():
            is_end = symbols == ord("\n")
            line_of = np.cumsum(is_end) - is_end
            is_kept = np.ones(line_of[-1] + 1, bool)
            is_kept[line_of[shared]] = False
            symbols = symbols[is_kept[line_of]]
        return symbols.tobytes().decode()


def text_bytes(text: str) -> np.ndarray:
    """UTF-8 of `text`, uint8 [N]."""
    return np.frombuffer(text.encode(), np.uint8)
