"""A score as JSON, piece by piece: a long text's tokens are never all there as Python objects."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnlm_core.datastore.overlap import LENGTHS
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_server.api.score_inputs import TextToScore
from knnlm_server.api.score_job import Progress, ScoredText
from knnlm_server.api.selection import Selection
from knnlm_server.api.trace_rendering import json_log_prob

LN2 = math.log(2)
_TOKENS_PER_PIECE = 4096
# Longest matches from … to, both included.
BUCKETS = ((0, 0), *((low, beyond - 1) for low, beyond in pairwise(LENGTHS)), (LENGTHS[-1], None))


@dataclass(slots=True)
class _Sums:
    """What is added up over tokens; in float64, because a long text has many small terms."""

    tokens: int = 0
    num_bytes: int = 0
    searched: int = 0
    base: float = 0.0  # nats
    mixed: float = 0.0
    buckets: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, len(BUCKETS))))  # tokens, base, mixed

    @classmethod
    def of(cls, text: TextToScore, scored: ScoredText) -> _Sums:
        scores = scored.scores
        sums = cls(
            tokens=len(scores.base),
            num_bytes=text.num_bytes,
            searched=int(scores.searched.sum()),
            base=0.0 - float(scores.base.sum(dtype=np.float64)),  # and never −0
            mixed=0.0 - float(scores.mixed.sum(dtype=np.float64)),
        )
        if scored.longest_match is not None:
            bucket = np.searchsorted(LENGTHS, scored.longest_match, side="right")
            for row, weights in enumerate((None, scores.base, scores.mixed)):
                sums.buckets[row] = np.bincount(bucket, weights, len(BUCKETS))
            sums.buckets[1:] = 0.0 - sums.buckets[1:]
        return sums

    def add(self, other: _Sums) -> None:
        for name in ("tokens", "num_bytes", "searched", "base", "mixed", "buckets"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class ScoreRenderer:
    """Renders the results of one request, in any order, and then their total.

    Args:
        per_token: report every token.
        overlap: report the tokens by longest match.
    """

    def __init__(self, tokenizer: Tokenizer, selection: Selection, *, per_token: bool, overlap: bool) -> None:
        self._tokenizer = tokenizer
        self._selection = selection
        self._per_token = per_token
        self._overlap = overlap
        self._sums: dict[int, _Sums] = {}

    @property
    def header(self) -> dict[str, Any]:
        """What an answer says of who gave it."""
        return {"model": self._selection.model, "system_fingerprint": self._selection.system_fingerprint}

    def result(self, text: TextToScore, scored: ScoredText, **fields: Any) -> Iterator[str]:
        """Pieces of the JSON object of one text, which begins with ``fields``."""
        sums = self._sums[scored.position] = _Sums.of(text, scored)
        result = {**fields, "index": scored.position}
        if text.document_id is not None:
            result["document_id"] = text.document_id
        result |= self._measures(sums)
        if not self._per_token:
            yield to_json(result)
            return
        yield to_json(result)[:-1] + ',"per_token":['
        for first in range(0, sums.tokens, _TOKENS_PER_PIECE):
            rows = self._tokens(text, scored, slice(first, first + _TOKENS_PER_PIECE))
            yield ("," if first else "") + ",".join(map(to_json, rows))
        yield "]}"

    def total(self) -> dict[str, Any]:
        """Sums over all texts rendered so far, in the order of the input: the same whichever was done first."""
        total = _Sums()
        for _, sums in sorted(self._sums.items()):
            total.add(sums)
        return self._measures(total)

    def _measures(self, sums: _Sums) -> dict[str, Any]:
        """Counts, and for base and mixed: nll in nats (summed), perplexity per token, bits per byte."""
        measures: dict[str, Any] = {"tokens": sums.tokens, "bytes": sums.num_bytes, "searched": sums.searched}
        for name, nll in (("base", sums.base), ("mixed", sums.mixed)):
            bits = nll / LN2 / sums.num_bytes if sums.num_bytes and math.isfinite(nll) else None
            measures[name] = {**_loss(nll, sums.tokens), "bits_per_byte": bits}
        if self._overlap:
            measures["overlap"] = [
                {
                    "longest_match": bounds,
                    "tokens": int(tokens),
                    "base": _loss(base, int(tokens)),
                    "mixed": _loss(mixed, int(tokens)),
                }
                for bounds, (tokens, base, mixed) in zip(BUCKETS, sums.buckets.T.tolist(), strict=True)
            ]
        return measures

    def _tokens(self, text: TextToScore, scored: ScoredText, rows: slice) -> Iterator[dict[str, Any]]:
        retrieval = self._selection.retrieval
        decision = retrieval.gate.value if retrieval is not None else "base"
        scores = scored.scores
        ids, base, mixed, lmbda = (
            column[rows].tolist() for column in (text.token_ids[1:], scores.base, scores.mixed, scores.lmbda)
        )
        starts = text.starts[1:][rows].tolist() if text.starts is not None else None
        matches = scored.longest_match[rows].tolist() if scored.longest_match is not None else None
        for i, token_id in enumerate(ids):
            entry = {
                "id": token_id,
                "token": self._tokenizer.token_text(token_id),
                "offset": None if starts is None else starts[i],
                "base": json_log_prob(base[i]),
                "mixed": json_log_prob(mixed[i]),
                # As it was given: float32 would show 0.4 as 0.4000000059604645.
                "lambda": retrieval.lmbda if retrieval is not None and lmbda[i] > 0 else 0.0,
                "decision": decision,
            }
            if matches is not None:
                entry["longest_match"] = matches[i]
            yield entry


def progress_line(progress: Progress) -> str:
    """A line of a stream that says how far it has come."""
    return to_json({"object": "score.progress", **progress._asdict()}) + "\n"


def to_json(value: dict[str, Any]) -> str:
    """In ASCII, because some readers take U+2028 and its like for the end of a line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _loss(nll: float, tokens: int) -> dict[str, float | None]:
    # JSON has no infinity: λ = 1 can give a token probability zero.
    is_finite = math.isfinite(nll)
    return {
        "nll": nll if is_finite else None,
        "perplexity": math.exp(min(nll / tokens, 700.0)) if tokens and is_finite else None,
    }
