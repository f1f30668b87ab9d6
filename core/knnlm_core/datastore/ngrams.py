"""What followed what in a datastore: counts of short runs of tokens, looked up before any search.

A run counts where it lies within one document. The first token of a document is no value where the tokenizer puts no
BOS, so runs that begin with it are not known. What was learned while serving is left out, and what was deleted stays
counted until `compact` or `purge` writes a new version: counts only help to decide whether to search.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from knnlm_core.datastore.reader import DocumentTokens

Tokens = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]

MAX_VOCAB_SIZE = 2_000_000  # a run of three tokens must fit in 63 bits


class Followed(NamedTuple):
    """Of Q runs of tokens."""

    times: Counts  # (Q,) how often something followed the run
    fertility: Counts  # (Q,) how many different tokens did


class _Runs(NamedTuple):
    """Distinct runs of one length."""

    codes: npt.NDArray[np.int64]  # (R,) ascending
    before: npt.NDArray[np.int64]  # (R + 1,) occurrences of all runs before each

    @classmethod
    def of(cls, codes: npt.NDArray[np.int64]) -> Self:
        """Count them."""
        distinct, counts = np.unique(codes, return_counts=True)
        return cls(distinct, np.concatenate([[0], counts.cumsum()]))


class NgramTable:
    """How often runs of two and three tokens occur.

    Args:
        tokens: what the entries hold.
        vocab_size: V, at most `MAX_VOCAB_SIZE`.
    """

    def __init__(self, tokens: DocumentTokens, vocab_size: int) -> None:
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"`vocab_size` must be at most {MAX_VOCAB_SIZE}, got {vocab_size}")
        values, starts = tokens
        self._vocab = vocab_size
        first, second = np.zeros(len(values), np.bool_), np.zeros(len(values), np.bool_)
        first[starts] = True
        second[1:] = first[:-1]
        pairs = values[:-1] * vocab_size + values[1:]
        self._pairs = _Runs.of(pairs[~first[1:]])
        triples = pairs[:-1] * vocab_size + values[2:]
        self._triples = _Runs.of(triples[~(first | second)[2:]])

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return sum(column.nbytes for runs in (self._pairs, self._triples) for column in runs)

    def after(self, *tokens: Tokens) -> Followed:
        """What followed runs of one or two tokens; nothing follows a run with −1, a token that is not there.

        Args:   tokens: one or two arrays (Q,), the earlier token first.
        """
        codes, known = self._codes(tokens)
        runs = self._pairs if len(tokens) == 1 else self._triples
        low, high = np.searchsorted(runs.codes, np.stack([codes, codes + 1]) * self._vocab)
        return Followed(np.where(known, runs.before[high] - runs.before[low], 0), np.where(known, high - low, 0))

    def count(self, *tokens: Tokens) -> Counts:
        """How often runs of two or three tokens occur, (Q,). Arguments as `after`."""
        codes, known = self._codes(tokens)
        runs = self._pairs if len(tokens) == 2 else self._triples
        low, high = np.searchsorted(runs.codes, codes), np.searchsorted(runs.codes, codes, side="right")
        return np.where(known, runs.before[high] - runs.before[low], 0)

    def _codes(self, tokens: tuple[Tokens, ...]) -> tuple[Tokens, npt.NDArray[np.bool_]]:
        codes = np.zeros(len(tokens[0]), np.int64)
        known = np.ones(len(codes), np.bool_)
        for column in tokens:
            codes = codes * self._vocab + column
            known &= column >= 0
        return np.where(known, codes, 0), known
