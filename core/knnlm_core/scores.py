"""From log-probabilities of tokens to the numbers that are reported: loss, perplexity, bits per byte, overlap.

    nll = −Σ log p        perplexity = exp(nll / tokens)        bits per byte = nll / ln 2 / bytes

Whoever reports one of these has it from here, so that the server and the command line mean the same by it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_core.datastore.overlap import LENGTHS

# Longest matches from … to, both included; None for no bound.
BUCKETS: tuple[tuple[int, int | None], ...] = (
    (0, 0),
    *((low, beyond - 1) for low, beyond in pairwise(LENGTHS)),
    (LENGTHS[-1], None),
)
_LN2 = math.log(2)
_MAX_EXPONENT = 700.0  # e^709.8 is the largest float64

LogProbs = NDArray[np.float32]
Matches = NDArray[np.uint8]


class Loss(NamedTuple):
    """How well tokens were predicted; None where a token had probability zero, or there is nothing to divide by."""

    nll: float | None  # nats, summed
    perplexity: float | None
    bits_per_byte: float | None


def total_nll(log_probs: LogProbs) -> float:
    """−Σ log p in nats; +inf where a token has probability zero, never −0.

    In float64: a long text has many small terms.
    """
    return 0.0 - float(log_probs.sum(dtype=np.float64))


def loss(nll: float, tokens: int, num_bytes: int = 0) -> Loss:
    """The measures of ``tokens`` tokens that make up ``num_bytes`` bytes of UTF-8.

    Args:     nll: of all of them together, see `total_nll`. Sums of it may be added up before.
    Returns:  None for all three where nll is infinite, which JSON cannot carry.
    """
    if not math.isfinite(nll):
        return Loss(None, None, None)
    return Loss(
        nll=nll,
        perplexity=math.exp(min(nll / tokens, _MAX_EXPONENT)) if tokens else None,
        bits_per_byte=nll / _LN2 / num_bytes if num_bytes else None,
    )


class Bucket(NamedTuple):
    """Tokens that end a run of ``low … high`` tokens which also stands in the datastore; no bound where high is None.

    Bytes are not counted by token, so the losses have no bits per byte.
    """

    low: int
    high: int | None
    tokens: int
    base: Loss
    mixed: Loss

    @property
    def label(self) -> str:
        """``0``, ``2–3``, ``32+``."""
        if self.high is None:
            return f"{self.low}+"
        return f"{self.low}–{self.high}" if self.high > self.low else f"{self.low}"

    def to_json(self) -> dict[str, Any]:
        """As `/v1/score` names it."""
        return {
            "longest_match": [self.low, self.high],
            "tokens": self.tokens,
            "base": {"nll": self.base.nll, "perplexity": self.base.perplexity},
            "mixed": {"nll": self.mixed.nll, "perplexity": self.mixed.perplexity},
        }


def bucket_of(longest_match: Matches) -> NDArray[np.int64]:
    """(N,) which of BUCKETS each token is in."""
    return np.searchsorted(LENGTHS, longest_match, side="right")


def no_overlap() -> NDArray[np.float64]:
    """`overlap_sums` of no tokens."""
    return np.zeros((3, len(BUCKETS)))


def overlap_sums(longest_match: Matches, base: LogProbs, mixed: LogProbs) -> NDArray[np.float64]:
    """(3, len(BUCKETS)) number of tokens, nll under the base LM and nll under the mixture; sums may be added up.

    Args:
        longest_match: (N,) tokens, see `longest_matches`.
        base, mixed: (N,) log-probabilities.
    """
    which = bucket_of(longest_match)
    sums = no_overlap()
    sums[0] = np.bincount(which, minlength=len(BUCKETS))
    for row, log_probs in ((1, base), (2, mixed)):
        sums[row] = 0.0 - np.bincount(which, log_probs, len(BUCKETS))  # adds in float64
    return sums


def buckets(sums: NDArray[np.float64]) -> list[Bucket]:
    """The measures of each bucket, empty ones too.

    Args:   sums: see `overlap_sums`.
    """
    return [
        Bucket(low, high, int(tokens), loss(base, int(tokens)), loss(mixed, int(tokens)))
        for (low, high), (tokens, base, mixed) in zip(BUCKETS, sums.T.tolist(), strict=True)
    ]
