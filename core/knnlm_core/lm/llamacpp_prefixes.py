"""Prompts' beginnings that llama.cpp's cache still holds, under sequence numbers of their own. Pure bookkeeping.

A kept beginning shares its cells with the sequence that it came from, so keeping it copies nothing; it takes room of
its own only once that sequence is gone. Room is given up, the beginning used longest ago first, as soon as live
sequences need it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from knnlm_core.lm.prefix_cache import BLOCK_TOKENS


class Match(NamedTuple):
    """The longest known beginning of some tokens."""

    sequence: int  # that holds it; −1 if none does
    length: int


class KeptPrefixes:
    """Which sequence number holds which tokens.

    Args:
        sequences: numbers that may be given out.
        max_tokens: bound on what all of them hold together.
    """

    def __init__(self, sequences: Sequence[int], max_tokens: int) -> None:
        self._free = list(sequences)
        self._max_tokens = max_tokens
        self._kept: OrderedDict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = OrderedDict()  # oldest use first
        self.asked_tokens = self.reused_tokens = 0

    @property
    def tokens(self) -> int:
        """Held by all together; those that several hold are counted several times."""
        return sum(map(len, self._kept.values()))

    @property
    def max_tokens(self) -> int:
        """What all together may hold."""
        return self._max_tokens if self._free or self._kept else 0

    def length(self, sequence: int) -> int:
        """Tokens that a number holds."""
        return len(self._kept[sequence])

    def find(self, tokens: Sequence[int]) -> Match:
        """Who holds the longest beginning of ``tokens``, in whole blocks."""
        self.asked_tokens += len(tokens)
        matches = (Match(sequence, _common(kept, tokens)) for sequence, kept in self._kept.items())
        best = max(matches, key=_length, default=Match(-1, 0))
        if not best.length:
            return Match(-1, 0)
        self._kept.move_to_end(best.sequence)
        self.reused_tokens += best.length
        return best

    def keep(self, tokens: Sequence[int]) -> tuple[int | None, list[int]]:
        """Make room for the whole blocks of ``tokens``.

        Returns: the number that is to hold them, None if they need not or cannot be held, and the numbers to empty
            first.
        """
        length = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if not length or length > self.max_tokens:
            return None, []
        beginning = np.asarray(tokens[:length], dtype=np.int64)
        for sequence, kept in self._kept.items():
            if len(kept) >= length and np.array_equal(kept[:length], beginning):
                self._kept.move_to_end(sequence)
                return None, []
        # What only goes on where another ends replaces it.
        dropped = [s for s, kept in self._kept.items() if np.array_equal(kept, beginning[: len(kept)])]
        for sequence in dropped:
            self._drop(sequence)
        while self._kept and (not self._free or self.tokens + length > self._max_tokens):
            dropped.append(self._drop(next(iter(self._kept))))
        sequence = self._free.pop()
        self._kept[sequence] = beginning
        return sequence, dropped

    def release(self, tokens: int) -> list[int]:
        """Give up beginnings until ``tokens`` or fewer are held; returns the numbers to empty."""
        dropped = []
        while self._kept and self.tokens > tokens:
            dropped.append(self._drop(next(iter(self._kept))))
        return dropped

    def _drop(self, sequence: int) -> int:
        del self._kept[sequence]
        self._free.append(sequence)
        return sequence


def _length(match: Match) -> int:
    return match.length


def _common(kept: np.ndarray[tuple[int], np.dtype[np.int64]], tokens: Sequence[int]) -> int:
    """Length of the common beginning, rounded down to whole blocks."""
    length = min(len(kept), len(tokens))
    differ = np.flatnonzero(kept[:length] != np.asarray(tokens[:length], dtype=np.int64))
    return (int(differ[0]) if len(differ) else length) // BLOCK_TOKENS * BLOCK_TOKENS
