"""Walk through held-out tokens as serving would, with what one search has found for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from knnlm_builder.stages.fit import Evidence, Known
from knnlm_builder.stages.fit_lambda import apply_rule
from knnlm_core.knn.gates import Context, Decisions, GateMode, Pointers
from knnlm_core.knn.lambdas import LambdaRule
from knnlm_core.replay import Trail, follow
from knnlm_core.retrieval import Source
from knnlm_core.types import Neighbors
from knnlm_core.walks import FOLLOWED, SEARCHED, SKIPPED, START

# A walk over a long document is as many walks as answers of this length would be.
RUN_TOKENS = 256


class Held(NamedTuple):
    """Held-out tokens in the order of their documents, N in all."""

    evidence: Evidence  # with the k neighbours that are used
    keys: Tensor  # (N, D)
    runs: Sequence[range]  # rows of one document each, token after token, RUN_TOKENS at most
    log_probs: Tensor | None = None  # (N,) of the tokens where all are searched, once that is known

    def searched(self, source: Source) -> Tensor:
        """`log_probs_of_search`, worked out once."""
        return log_probs_of_search(self.evidence, source) if self.log_probs is None else self.log_probs

    @classmethod
    def of(cls, evidence: Evidence, keys: Tensor, documents: Tensor) -> Self:
        """Rows of one document are next to each other.

        Args:   documents: (N,) which one each token is of.
        """
        edges = [0, *((documents[1:] != documents[:-1]).nonzero()[:, 0] + 1).tolist(), len(documents)]
        starts = [start for a, b in pairwise(edges) for start in range(a, b, RUN_TOKENS)]
        return cls(evidence, keys, [range(a, b) for a, b in pairwise([*starts, len(documents)])])

    def joined(self, other: Held) -> Held:
        """These documents and then the others."""
        count = len(self.keys)
        moved = [range(run.start + count, run.stop + count) for run in other.runs]
        keys = torch.cat([self.keys, other.keys])
        return Held(self.evidence.joined(other.evidence), keys, [*self.runs, *moved])

    def split(self, share: float) -> tuple[slice, slice]:
        """The rows of the runs at the front, and of those at the end that hold this share of the tokens, about."""
        cut = max(run.start for run in self.runs if run.start <= (1 - share) * len(self.keys))
        return slice(0, cut), slice(cut, len(self.keys))

    def take(self, rows: slice) -> Held:
        """Rows that are whole runs."""
        first, stop = rows.start, rows.stop
        kept = [range(r.start - first, r.stop - first) for r in self.runs if first <= r.start < stop]
        return Held(self.evidence.take(torch.arange(first, stop)), self.keys[rows], kept)


class Walked(NamedTuple):
    """How N tokens came out under a gate."""

    log_probs: Tensor  # (N,) float64
    outcomes: Tensor  # (N,) int8

    @property
    def searched(self) -> float:
        """Share of the tokens."""
        return float((self.outcomes == SEARCHED).double().mean())

    @property
    def followed(self) -> float:
        """Share of the tokens."""
        return float((self.outcomes == FOLLOWED).double().mean())


def walk(held: Held, source: Source) -> Walked:
    """Score held-out tokens with a gate, as generation and scoring do.

    Args:   source: the datastore that the neighbours were found in, and how it is used.
    """
    positions = torch.cat([torch.arange(1, len(run) + 1) for run in held.runs])
    context = Context(held.evidence.signals, positions)
    if source.gate.follows:
        trail = _follow(held, source, context)
        outcomes, pointers = trail.outcomes, trail.pointers.neighbors
        rest = log_probs_of_fallback(held.evidence, pointers, source)
    else:
        outcomes = torch.where(source.gate(held.keys, context).search, SEARCHED, SKIPPED)
        rest = held.evidence.base.double()
    return Walked(torch.where(outcomes == SEARCHED, held.searched(source), rest), outcomes)


def log_probs_of_search(evidence: Evidence, source: Source) -> Tensor:
    """Log p of each token (N,) float64 where all are searched."""
    return Known.of(evidence, source.knn_temperature).log_probs(_lmbda(evidence, source, source.lambda_rule))


def log_probs_of_fallback(evidence: Evidence, pointers: Neighbors, source: Source) -> Tensor:
    """Log p of each token (N,) float64 where all follow pointers (N, P), as far as there are any."""
    followed = evidence._replace(neighbors=pointers)
    rule = source.follow_rule or source.lambda_rule
    return Known.of(followed, source.knn_temperature).log_probs(_lmbda(followed, source, rule))


def _lmbda(evidence: Evidence, source: Source, rule: LambdaRule | None) -> Tensor:
    if rule is None:
        return torch.full((len(evidence.base),), source.lmbda, dtype=torch.float64)
    return apply_rule(rule, evidence, source.knn_temperature)


def _follow(held: Held, source: Source, context: Context) -> Trail:
    evidence = held.evidence
    begun = [(run, START) for run in held.runs]
    return follow(source, begun, held.keys, evidence.targets, context, evidence.neighbors)


class _AtRandom:
    """Searches where it is told to; rows are told apart by their ``positions``."""

    mode: ClassVar[GateMode] = GateMode.LEARNED
    threshold: ClassVar[None] = None
    needs_context: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def __init__(self, search: Tensor) -> None:
        self._search = search

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """See `Gate`."""
        assert context is not None
        return Decisions(self._search[context.positions], torch.full((len(keys),), torch.nan))


def explore(held: Held, source: Source, *, share: float, seed: int) -> Pointers:
    """What a gate would see at each of N tokens, in a walk that searches at random and so comes to see everything.

    Args:   share: of the tokens to search at.
    """
    search = torch.rand(len(held.keys), generator=torch.Generator().manual_seed(seed)) < share
    context = Context(held.evidence.signals, torch.arange(len(held.keys)))
    return _follow(held, replace(source, gate=_AtRandom(search)), context).pointers
