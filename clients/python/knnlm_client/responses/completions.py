"""The answer of `POST /v1/completions`."""

from __future__ import annotations

from knnlm_client.responses.common import AnswerAttribution, GenerationAnswer, ResponsePart, TraceEntry, Usage


class Logprobs(ResponsePart):
    """Log-probabilities (natural) of the mixed distribution, one entry per token; an echoed prompt's come first.

    Attributes:
        token_logprobs: None for an echoed first token, which has no context.
        top_logprobs: per token the most probable ones and itself; None as above.
        text_offset: character of the choice's text at which the token begins.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class CompletionChoice(ResponsePart):
    """One completion, or a piece of one; `finish_reason` is None until it ends.

    Attributes:
        knn: the trace, where it was asked for: one entry per generated token, none for echoed ones.
        attribution: which documents it came from, where that was asked for; in a stream with the last piece.
    """

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    knn: list[TraceEntry] | None = None
    attribution: AnswerAttribution | None = None


class _CompletionAnswer(GenerationAnswer):
    object: str = "text_completion"
    choices: list[CompletionChoice]


class Completion(_CompletionAnswer):
    """The answer of `POST /v1/completions`."""

    usage: Usage


class CompletionChunk(_CompletionAnswer):
    """One event of a stream; the one that carries the usage of the whole has no choices."""

    usage: Usage | None = None
