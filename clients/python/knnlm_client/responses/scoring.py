"""The answer of `POST /v1/score`, whole or as events."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AliasChoices, Field, RootModel

from knnlm_client.responses.common import AnswerAttribution, ResponsePart, TokenAttribution


class TokenLoss(ResponsePart):
    """How well a distribution predicts tokens; None where that is infinite or there are none."""

    nll: float | None  # nats, summed
    perplexity: float | None


class Loss(TokenLoss):
    """How well a distribution predicts the scored tokens, per token and per byte."""

    bits_per_byte: float | None


class OverlapBucket(ResponsePart):
    """The scored tokens that the datastore holds within runs of about the same length.

    Attributes:
        longest_match: (low, high), both included, high None for "and more": tokens in the longest run that ends at the
            scored token, includes it, and stands in the datastore within one document.
    """

    longest_match: tuple[int, int | None]
    tokens: int
    base: TokenLoss
    mixed: TokenLoss


class ScoredToken(ResponsePart):
    """One scored token: what the base LM and the mixture gave it."""

    id: int
    token: str
    offset: int | None  # characters of its text before it; None where token ids were given
    base: float  # log-probability, natural
    mixed: float
    lmbda: float = Field(validation_alias=AliasChoices("lambda", "lmbda"), serialization_alias="lambda")
    decision: str
    searched: bool | None = None  # None: a server that does not say
    followed: bool = False  # whether entries next to those found before were used instead
    longest_match: int | None = None  # with `overlap`; see `OverlapBucket`
    attribution: TokenAttribution | None = None  # with `KnnOptions.attribution`


class _Sums(ResponsePart):
    tokens: int
    bytes: int
    searched: int
    followed: int = 0
    base: Loss
    mixed: Loss
    overlap: list[OverlapBucket] | None = None


class ScoreTotal(_Sums):
    """Sums over all texts; tokens and bytes count scored tokens only."""


class ScoreResult(_Sums):
    """The score of one text; `index` is its place in the input."""

    index: int
    document_id: str | None = None
    per_token: list[ScoredToken] | None = None
    attribution: AnswerAttribution | None = None  # with `KnnOptions.attribution`


class ScoreResponse(ResponsePart):
    """The answer of `POST /v1/score`; the results are in the order of the input."""

    object: str
    model: str
    system_fingerprint: str | None
    results: list[ScoreResult]
    total: ScoreTotal


class ScoreProgress(ResponsePart):
    """How far a streamed score has come."""

    object: Literal["score.progress"]
    texts: int
    texts_done: int
    tokens: int
    tokens_done: int


class ScoreResultEvent(ScoreResult):
    """The score of one text, sent as soon as it is known: in any order."""

    object: Literal["score.result"]


class ScoreTotalEvent(ResponsePart):
    """The last event of a streamed score."""

    object: Literal["score.total"]
    model: str
    system_fingerprint: str | None
    total: ScoreTotal


ScoreEvent: TypeAlias = ScoreProgress | ScoreResultEvent | ScoreTotalEvent


class ScoreLine(RootModel[Annotated[ScoreEvent, Field(discriminator="object")]]):
    """One line of a streamed score."""
