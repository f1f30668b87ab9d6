"""The answer of `POST /v1/chat/completions`."""

from __future__ import annotations

from knnlm_client.responses.common import AnswerAttribution, GenerationAnswer, ResponsePart, TraceEntry, Usage


class AssistantMessage(ResponsePart):
    """What the model says; may be sent back as a message of the next request."""

    role: str
    content: str
    refusal: str | None = None


class TopLogprob(ResponsePart):
    """A token that could have come, and its log-probability (natural) under the mixed distribution."""

    token: str
    logprob: float
    bytes: list[int] | None = None  # UTF-8; of a token that is a part of a character, that part


class TokenLogprob(TopLogprob):
    """The token that came, and the most probable ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponsePart):
    """Log-probabilities of a message's tokens."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


class ChatChoice(ResponsePart):
    """One answer of the assistant's.

    Attributes:
        knn: the trace, where it was asked for: one entry per generated token.
        attribution: which documents it came from, where that was asked for.
    """

    index: int
    message: AssistantMessage
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    knn: list[TraceEntry] | None = None
    attribution: AnswerAttribution | None = None


class ChatDelta(ResponsePart):
    """What a chunk adds to a message: first its role, then its text piece by piece, last nothing."""

    role: str | None = None
    content: str | None = None
    refusal: str | None = None


class ChatChunkChoice(ResponsePart):
    """A piece of one answer; `finish_reason` is None until it ends, and so is `attribution`."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    knn: list[TraceEntry] | None = None
    attribution: AnswerAttribution | None = None


class ChatCompletion(GenerationAnswer):
    """The answer of `POST /v1/chat/completions`."""

    object: str = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(GenerationAnswer):
    """One event of a stream; the one that carries the usage of the whole has no choices."""

    object: str = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
