"""How much of a document the datastore already holds word for word.

    containment = |ngrams(candidate) ∩ ngrams(store)| / |ngrams(candidate)|        n-grams of n = 13 tokens, as sets

A held-out document of high containment would make calibration believe that retrieval finds the very text asked for.
Containment is exact, up to collisions of 64-bit hashes: among C candidate and S store n-grams about C·S / 2⁶⁴ false
matches are expected (C = 10⁷ against S = 10¹⁰: 0.005), each worth one n-gram of one candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm_core.errors import InvalidParameter

DEFAULT_N = 13
_CHUNK = 1 << 20  # n-grams hashed at a time: 8 MiB an array

Tokens = NDArray[Any]  # (T,), of any integer type
Hashes = NDArray[np.uint64]

# Odd constants of the splitmix64 generator (Steele, Lea & Flood 2014).
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, eq=False)
class NgramSet:
    """The distinct n-grams of a token sequence, as sorted 64-bit hashes; shorter than n, the sequence is one gram."""

    hashes: Hashes
    n: int

    @classmethod
    def of(cls, tokens: Tokens, n: int = DEFAULT_N) -> NgramSet:
        """Hash all n-grams of ``tokens``. Raises InvalidParameter as `NearDuplicateFilter` does."""
        _check(tokens, n)
        chunks = [np.unique(chunk) for chunk in _ngram_hashes(tokens, n)]
        return cls(np.unique(np.concatenate(chunks)) if chunks else np.empty(0, np.uint64), n)

    def __len__(self) -> int:
        return len(self.hashes)


def containment(candidate: NgramSet, store: NgramSet) -> float:
    """Share of the candidate's n-grams that the store has too; 0 for a candidate without tokens.

    Raises: InvalidParameter: the two were made with different n.
    """
    if candidate.n != store.n:
        raise InvalidParameter(f"`n` must be the same in both sets, got {candidate.n} and {store.n}", param="n")
    if not len(candidate):
        return 0.0
    return len(np.intersect1d(candidate.hashes, store.hashes, assume_unique=True)) / len(candidate)


class NearDuplicateFilter:
    """Containment of many candidates in a store whose documents stream past once, in any order.

    Memory: at most 17 bytes per candidate n-gram (hash, position, whether it was seen), three times as much while
    it is set up, and about 50 MiB to work in. What the store's documents hold is not kept.

    Candidates must not be observed themselves, or they contain themselves.
    """

    def __init__(self, candidates: Mapping[str, Tokens], n: int = DEFAULT_N) -> None:
        """Take the candidates' token ids by document id.

        Raises: InvalidParameter: n < 1, or tokens that are not a one-dimensional integer array.
        """
        self._n = n
        sets = [NgramSet.of(tokens, n).hashes for tokens in candidates.values()]
        self._ids = list(candidates)
        self._ends = np.cumsum([len(hashes) for hashes in sets], dtype=np.int64)  # of each candidate in `_positions`
        grams, positions = np.unique(np.concatenate([np.empty(0, np.uint64), *sets]), return_inverse=True)
        self._grams: Hashes = grams  # sorted, each once
        self._seen = np.zeros(len(grams), dtype=np.bool_)
        self._positions: NDArray[np.int64] = positions  # candidate after candidate: its n-grams' places in `_grams`

    def observe(self, tokens: Tokens) -> None:
        """Let a store document pass: its n-grams count as held by the store from now on."""
        _check(tokens, self._n)
        if not len(self._grams):
            return
        for hashes in _ngram_hashes(tokens, self._n):
            hashes.sort()  # neighbouring binary searches then touch neighbouring memory
            places = np.searchsorted(self._grams, hashes)
            places[places == len(self._grams)] = 0
            self._seen[places[self._grams[places] == hashes]] = True

    def containment(self) -> dict[str, float]:
        """Each candidate's containment in the documents observed so far, by document id."""
        result = {}
        begin = 0
        for document_id, end in zip(self._ids, self._ends.tolist(), strict=True):
            seen = self._seen[self._positions[begin:end]]
            result[document_id] = float(seen.mean()) if len(seen) else 0.0
            begin = end
        return result


def _check(tokens: Tokens, n: int) -> None:
    if n < 1:
        raise InvalidParameter(f"`n` must be at least 1, got {n}", param="n")
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and len(tokens)):
        raise InvalidParameter(
            f"`tokens` must be a one-dimensional integer array, got {tokens.dtype} of shape {tokens.shape}",
            param="tokens",
        )


def _ngram_hashes(tokens: Tokens, n: int) -> Iterator[Hashes]:
    """Yield the hashes of successive n-grams, in fresh arrays of at most `_CHUNK`.

    hash = mix(Σ_j mix(t_j) · B^(n−1−j)) mod 2⁶⁴, computed for all n-grams at once in n passes. Token ids are mixed
    first: small numbers that differ in few bits would make the polynomial's values collide far more often than chance,
    and a leading token 0 would add nothing, so that the gram of a short document could be taken for a longer one.
    """
    n = min(n, len(tokens))
    if n == 0:
        return
    for begin in range(0, len(tokens) - n + 1, _CHUNK):
        mixed = _mix(tokens[begin : begin + _CHUNK + n - 1].astype(np.uint64))
        count = len(mixed) - n + 1
        polynomial = np.zeros(count, np.uint64)
        for offset in range(n):
            polynomial *= _STEP
            polynomial += mixed[offset : offset + count]
        yield _mix(polynomial)


def _mix(values: Hashes) -> Hashes:
    """splitmix64's finalizer, in place: a bijection of 64 bits that spreads every input bit over all of them."""
    values += _STEP
    values ^= values >> np.uint64(30)
    values *= _MIX_1
    values ^= values >> np.uint64(27)
    values *= _MIX_2
    values ^= values >> np.uint64(31)
    return values
