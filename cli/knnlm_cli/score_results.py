"""What a run of `knnlm score` gathers: arrays of float32, and a few numbers per document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_core.scores import Loss, loss, total_nll

Floats = NDArray[np.float32]


class DocumentScores(NamedTuple):
    """One document, scored: natural log-probabilities of its T − 1 tokens that have a context."""

    id: str
    num_bytes: int  # UTF-8, of the scored tokens
    searched: int
    followed: int
    excluded_itself: bool
    base: Floats
    mixed: Floats
    longest_match: NDArray[np.uint8] | None  # tokens, ending at and including the scored one; see `longest_matches`
    per_token: Sequence[Mapping[str, Any]] | None  # as `/v1/score` gives them; None unless asked for


class DocumentRow(NamedTuple):
    """What is kept of a document."""

    id: str
    tokens: int
    num_bytes: int
    searched: int
    followed: int
    excluded_itself: bool
    base: Loss
    mixed: Loss

    @property
    def change(self) -> float | None:
        """Relative change of perplexity by retrieval; negative is better."""
        return change(self.base, self.mixed)


def change(base: Loss, mixed: Loss) -> float | None:
    """mixed / base − 1 of the perplexities."""
    if base.perplexity is None or mixed.perplexity is None:
        return None
    return mixed.perplexity / base.perplexity - 1


@dataclass(slots=True)
class Scores:
    """All documents of a run, in order; the arrays are their tokens, document after document."""

    rows: list[DocumentRow] = field(default_factory=list)
    _base: list[Floats] = field(default_factory=list)
    _mixed: list[Floats] = field(default_factory=list)
    _matches: list[NDArray[np.uint8]] = field(default_factory=list)

    def add(self, document: DocumentScores) -> None:
        """Keep a document's scores."""
        tokens, num_bytes = len(document.base), document.num_bytes
        self.rows.append(
            DocumentRow(
                document.id,
                tokens,
                num_bytes,
                document.searched,
                document.followed,
                document.excluded_itself,
                loss(total_nll(document.base), tokens, num_bytes),
                loss(total_nll(document.mixed), tokens, num_bytes),
            )
        )
        self._base.append(document.base)
        self._mixed.append(document.mixed)
        if document.longest_match is not None:
            self._matches.append(document.longest_match)

    @property
    def base(self) -> Floats:
        """(N,) log p_lm."""
        return _joined(self._base)

    @property
    def mixed(self) -> Floats:
        """(N,) log p of the mixture."""
        return _joined(self._mixed)

    @property
    def longest_match(self) -> NDArray[np.uint8] | None:
        """(N,) tokens, or None where overlap was not measured."""
        return np.concatenate(self._matches) if self._matches else None

    def positions(self) -> NDArray[np.int64]:
        """(N,) how many tokens of its document were scored before each one."""
        return np.concatenate([np.arange(row.tokens) for row in self.rows] or [np.arange(0)])

    def blocks(self, size: int) -> NDArray[np.int64]:
        """(N,) stretches of ``size`` neighbouring tokens of one document, numbered through."""
        sizes = [row.tokens for row in self.rows]
        first = np.cumsum([0, *(-(-tokens // size) for tokens in sizes)])[:-1]
        return np.repeat(first, sizes) + self.positions() // size


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
