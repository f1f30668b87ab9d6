"""Answers of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from knnlm_server.api.schemas.answers import Answer, AnswerAttribution, TokenTraceEntry, Usage
from knnlm_server.api.schemas.events import event_stream
from knnlm_server.engine.events import FinishReason
from knnlm_server.engine.sampling_params import MAX_LOGPROBS


class TokenLogProb(Answer):
    """A token that might have been."""

    token: str
    logprob: float = Field(description="Natural log, of the mixture, before penalties and temperature.")
    bytes: list[Annotated[int, Field(ge=0, le=255)]] = Field(description="Of the token alone; none in padded ids.")


class ChosenLogProb(TokenLogProb):
    """A token of the answer."""

    top_logprobs: list[TokenLogProb] = Field(max_length=MAX_LOGPROBS, description="Most probable first.")


class ChatLogProbs(Answer):
    """Log-probabilities of a choice's tokens, one that ended it included."""

    content: list[ChosenLogProb]
    refusal: None


class ChatMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One answer to the conversation."""

    index: int = Field(ge=0)
    message: ChatMessage
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason
    knn: list[TokenTraceEntry] | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.trace` or `knn.attribution`."
    )
    attribution: AnswerAttribution | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.attribution`."
    )


class ChatCompletion(Answer):
    """The answer in one piece."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(ge=0)
    model: str
    system_fingerprint: str
    choices: list[ChatChoice] = Field(min_length=1)
    usage: Usage


class ChatDelta(Answer):
    """What is new of a message; a choice begins with its role."""

    role: Literal["assistant"] | SkipJsonSchema[None] = None
    content: str | SkipJsonSchema[None] = None


class ChatPiece(Answer):
    """What is new of a choice."""

    index: int = Field(ge=0)
    delta: ChatDelta
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason | None
    knn: list[TokenTraceEntry] | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.trace` or `knn.attribution`."
    )
    attribution: AnswerAttribution | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.attribution`, in the choice's last chunk."
    )


class ChatChunk(Answer):
    """An event of a stream; the one that carries the usage of the whole has no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int = Field(ge=0)
    model: str
    system_fingerprint: str
    choices: list[ChatPiece] = Field(max_length=1)
    usage: Usage | None = None


RESPONSES: dict[int | str, dict[str, Any]] = {200: {"model": ChatCompletion, "content": event_stream(ChatChunk)}}
