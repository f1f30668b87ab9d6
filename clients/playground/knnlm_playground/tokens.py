"""The tokens of a text, each with the characters that it put there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from knnlm_client import CompletionChoice, TraceEntry


@dataclass(frozen=True, slots=True)
class Generated:
    """A generated token.

    Attributes:
        text: its characters; a character of several tokens belongs to the last of them, and the others have none.
    """

    text: str
    trace: TraceEntry


@dataclass(slots=True)
class Generation:
    """A completion as far as it has come.

    Attributes:
        error: why it came no further.
    """

    text: str = ""
    offsets: list[int] = field(default_factory=list)
    traces: list[TraceEntry] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    def add(self, piece: CompletionChoice) -> None:
        """Take in a piece of a stream; it must have log-probabilities and a trace."""
        self.text += piece.text
        if piece.logprobs is not None:
            self.offsets += piece.logprobs.text_offset
        self.traces += piece.knn or []
        self.finish_reason = piece.finish_reason or self.finish_reason

    def tokens(self) -> list[Generated]:
        """The tokens so far."""
        texts = pieces(self.text, self.offsets)
        return [Generated(text, trace) for text, trace in zip(texts, self.traces, strict=False)]


def pieces(text: str, offsets: Sequence[int]) -> list[str]:
    """Cut a text into its tokens' pieces.

    Args:     offsets: the character at which each token begins, ascending; equal ones share a character, which the last
              of them gets.
    Returns:  as many pieces; together they are the text from the first offset on.
    """
    ends = [*offsets[1:], len(text)] if offsets else []
    return [text[start:end] for start, end in zip(offsets, ends, strict=True)]
