"""The windows of a batch of texts, handed out pass by pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from knnlm_core.windows import Window, rolling_windows


class WindowOfText(NamedTuple):
    """One window and the text that it belongs to."""

    text: int
    window: Window


class WindowQueue:
    """Texts of the given lengths, cut into windows; texts without a token to score have none.

    Args:   firsts: of each text, the position of the first token to score; 1 where it is not said.
    """

    def __init__(self, lengths: Sequence[int], window: int, stride: int, firsts: Sequence[int] | None = None) -> None:
        self._pending = _windows(lengths, firsts if firsts is not None else [1] * len(lengths), window, stride)
        self._next = next(self._pending, None)

    @property
    def is_empty(self) -> bool:
        """Whether every window has been handed out."""
        return self._next is None

    def take(self, token_budget: int) -> list[WindowOfText]:
        """The next windows, at least one, of together at most ``token_budget`` padded tokens if possible."""
        taken: list[WindowOfText] = []
        widest = 0
        while self._next is not None:
            widest = max(widest, self._next.window.end - self._next.window.begin)
            if taken and widest * (len(taken) + 1) > token_budget:
                break
            taken.append(self._next)
            self._next = next(self._pending, None)
        return taken


def _windows(lengths: Sequence[int], firsts: Sequence[int], window: int, stride: int) -> Iterator[WindowOfText]:
    for text, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        for cut in rolling_windows(length, window, stride, first):
            yield WindowOfText(text, cut)
