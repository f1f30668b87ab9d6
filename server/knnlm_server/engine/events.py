"""What the engine tells a request's owner: its prompt's scores, then tokens of any choice, then exactly one end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from knnlm_core.errors import KnnlmError
from knnlm_server.engine.attribution import Attributions

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TracedNeighbor:
    """One neighbour behind a token."""

    source: int  # which one of the retrieval's
    entry_id: int
    distance: float  # squared L2
    weight: float  # share of p_knn
    token_id: int


@dataclass(frozen=True, slots=True)
class TracedSource:
    """What one of several datastores had to do with a token: p = (1 − Σ w λ) p_lm + Σ w λ p_knn."""

    weight: float  # of the request; where neighbours are merged, the store's share of their softmax
    lmbda: float  # 0 where it found nothing
    p_knn: float


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """How one token's probability came about."""

    searched: bool
    followed: bool  # pointers, instead of a search
    decision: str  # which gate decided, or `base` without a datastore
    gate_score: float | None  # what it held against its threshold
    gate_threshold: float | None  # of the one datastore
    num_pointers: int  # that could have been followed
    lmbda: float
    p_lm: float
    p_knn: float
    p: float
    neighbors: Sequence[TracedNeighbor]  # nearest first; of several datastores, those of the largest weight
    sources: Sequence[TracedSource] = ()  # one for each of several datastores
    attribution: Attributions | None = None  # of this one token, where it was asked for


TopTokens = Sequence[tuple[int, float]]  # token id and log-probability, most probable first


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities of the next few prompt tokens, in order from the second on; the first one has no context."""

    log_probs: Sequence[float]  # natural log, of the mixture
    tops: Sequence[TopTokens]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One more token of one choice."""

    choice: int
    token_id: int
    text: str  # what can be shown now; may lag behind the tokens
    text_offset: int  # characters of completion that the tokens before this one make
    log_prob: float  # natural log, of the mixture, before penalties and temperature
    top: TopTokens = ()
    trace: TokenTrace | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class RetrievalCounts:
    """`usage.knn`: what happened at the request's tokens."""

    searched: int = 0
    followed: int = 0
    skipped: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices are complete."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends without an answer."""

    error: KnnlmError


Event = PromptEvent | TokenEvent | Finished | Failed
