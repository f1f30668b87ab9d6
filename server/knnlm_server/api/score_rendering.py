"""A score as JSON, piece by piece: a long text's tokens are never all there as Python objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.retrieval import Retrieval
from knnlm_core.scores import buckets, loss, no_overlap, overlap_sums, total_nll
from knnlm_core.walks import FOLLOWED, SEARCHED
from knnlm_server.api.attribution_rendering import AnswerAttribution
from knnlm_server.api.trace_rendering import json_log_prob
from knnlm_server.engine.scoring import TokenScores

if TYPE_CHECKING:  # for scoring offline these would be a web framework too many
    from knnlm_server.api.score_inputs import TextToScore
    from knnlm_server.api.score_job import Progress, ScoredText
    from knnlm_server.api.selection import Selection

_TOKENS_PER_PIECE, _ATTRIBUTED_PER_PIECE = 4096, 32


@dataclass(slots=True)
class _Sums:
    """What is added up over texts."""

    tokens: int = 0
    num_bytes: int = 0
    searched: int = 0
    followed: int = 0
    base: float = 0.0  # nats
    mixed: float = 0.0
    overlap: NDArray[np.float64] = field(default_factory=no_overlap)

    @classmethod
    def of(cls, text: TextToScore, scored: ScoredText) -> _Sums:
        scores, matches = scored.scores, scored.longest_match
        return cls(
            tokens=len(scores.base),
            num_bytes=text.num_bytes,
            searched=int(scores.searched.sum()),
            followed=int(scores.followed.sum()),
            base=total_nll(scores.base),
            mixed=total_nll(scores.mixed),
            overlap=no_overlap() if matches is None else overlap_sums(matches, scores.base, scores.mixed),
        )

    def add(self, other: _Sums) -> None:
        for name in ("tokens", "num_bytes", "searched", "followed", "base", "mixed", "overlap"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Reports(NamedTuple):
    """What a score reports besides sums.

    Attributes:
        per_token: every token.
        overlap: the tokens by longest match.
        attribution: which documents the tokens' probabilities came from.
    """

    per_token: bool
    overlap: bool
    attribution: bool


class ScoreRenderer:
    """Renders the results of one request, in any order, and then their total.

    Args:
        reports: what to report besides sums.
    """

    def __init__(self, tokenizer: Tokenizer, selection: Selection, reports: Reports) -> None:
        self._selection = selection
        self._tokens = TokenRenderer(tokenizer, selection.retrieval)
        self._per_token, self._overlap, self._attribution = reports
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
        yield to_json(result)[:-1]
        attributions = scored.scores.attribution
        answer = AnswerAttribution(self._selection.stores)
        if self._per_token:
            yield ',"per_token":['
            shares = answer.tokens(attributions) if attributions is not None else None
            # The documents behind a token can take a thousand times as much room as the token.
            step = _TOKENS_PER_PIECE if shares is None else _ATTRIBUTED_PER_PIECE
            for first in range(0, sums.tokens, step):
                rows = slice(first, first + step)
                entries = self._tokens.entries(text, scored.scores, scored.longest_match, rows)
                if shares is not None:
                    entries = ({**entry, "attribution": next(shares)} for entry in entries)
                yield ("," if first else "") + ",".join(map(to_json, entries))
            yield "]"
        elif attributions is not None:
            answer.add(attributions)
        if self._attribution:
            yield f',"attribution":{to_json(answer.whole())}'
        yield "}"

    def total(self) -> dict[str, Any]:
        """Sums over all texts rendered so far, in the order of the input: the same whichever was done first."""
        total = _Sums()
        for _, sums in sorted(self._sums.items()):
            total.add(sums)
        return self._measures(total)

    def _measures(self, sums: _Sums) -> dict[str, Any]:
        """Counts, and for base and mixed: nll in nats (summed), perplexity per token, bits per byte."""
        measures: dict[str, Any] = {
            "tokens": sums.tokens, "bytes": sums.num_bytes, "searched": sums.searched, "followed": sums.followed
        }  # fmt: skip
        for name, nll in (("base", sums.base), ("mixed", sums.mixed)):
            measures[name] = loss(nll, sums.tokens, sums.num_bytes)._asdict()
        if self._overlap:
            measures["overlap"] = [bucket.to_json() for bucket in buckets(sums.overlap)]
        return measures


class TokenRenderer:
    """Renders scored tokens one by one.

    Args:   retrieval: what their request retrieved with.
    """

    def __init__(self, tokenizer: Tokenizer, retrieval: Retrieval | None) -> None:
        self._tokenizer = tokenizer
        self._decision = retrieval.gate_name if retrieval is not None else "base"

    def entries(
        self, text: TextToScore, scores: TokenScores, longest_match: NDArray[np.uint8] | None, rows: slice = slice(None)
    ) -> Iterator[dict[str, Any]]:
        """What `per_token` lists of the scored tokens ``rows`` of a text."""
        ids, base, mixed, lmbda, outcomes = (column[rows].tolist() for column in (text.scored_ids, *scores.columns))
        starts = text.starts[rows].tolist() if text.starts is not None else None
        matches = longest_match[rows].tolist() if longest_match is not None else None
        for i, token_id in enumerate(ids):
            entry = {
                "id": token_id,
                "token": self._tokenizer.token_text(token_id),
                "offset": None if starts is None else starts[i],
                "base": json_log_prob(base[i]),
                "mixed": json_log_prob(mixed[i]),
                "lambda": lmbda[i],
                "decision": self._decision,
                "searched": outcomes[i] == SEARCHED,
                "followed": outcomes[i] == FOLLOWED,
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
