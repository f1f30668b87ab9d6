"""Rolling windows: how a long text is cut so that each token is scored exactly once, with left context.

For window 8, stride 4 over 14 tokens (positions 0 … 13; `T` = scored, `c` = context only):

    position   0 1 2 3 4 5 6 7 8 9 10 11 12 13
    window 0   c T T T T T T T
    window 1           c c c c T T T  T
    window 2                   c c c  c  T  T

The first token of a text has no context and is never scored (unless a BOS token precedes it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from knnlm_core.errors import InvalidParameter

DEFAULT_WINDOW = 1024  # tokens


class WindowSizes(NamedTuple):
    """How texts are cut, in tokens; see `rolling_windows`."""

    window: int
    stride: int


class Window(NamedTuple):
    """A slice ``[begin, end)`` of a text whose tokens ``[first_target, end)`` are scored in it."""

    begin: int
    end: int
    first_target: int

    @property
    def num_targets(self) -> int:
        """How many tokens are scored in this window."""
        return self.end - self.first_target


def check_window(window: int, stride: int, max_length: int | None = None) -> None:
    """Refuse window and stride that cannot give every scored token some context.

    Raises: InvalidParameter: unless 2 ≤ window ≤ max_length and 1 ≤ stride < window.
    """
    if window < 2:
        raise InvalidParameter(f"`window` must be at least 2 tokens, got {window}", param="window")
    if max_length is not None and window > max_length:
        raise InvalidParameter(
            f"`window` must be at most the model's context of {max_length} tokens, got {window}", param="window"
        )
    if not 1 <= stride < window:
        raise InvalidParameter(
            f"`stride` must be at least 1 and less than `window` ({window}), got {stride}", param="stride"
        )


def settle_windows(window: int | None, stride: int | None, *, max_length: int) -> WindowSizes:
    """Window and stride for an LM with a context of ``max_length`` tokens, where None is given the defaults.

    By default the window is DEFAULT_WINDOW or the context if that is shorter, and the stride is half the window.

    Raises: InvalidParameter: see `check_window`.
    """
    window = min(DEFAULT_WINDOW, max_length) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    check_window(window, stride, max_length)
    return WindowSizes(window, stride)


def rolling_windows(num_tokens: int, window: int, stride: int, first: int = 1) -> Iterator[Window]:
    """Cut ``num_tokens`` tokens into windows that together score positions ``first`` … num_tokens − 1 once each.

    The first window scores up to ``window − 1`` tokens, each later one up to ``stride``, with at least
    ``window − stride`` tokens of context. Windows lie where they would lie for ``first`` = 1; those that score nothing
    are left out.
    """
    check_window(window, stride)
    end = min(window, num_tokens)
    first_target = 1
    while first_target < num_tokens:
        if end > first:
            # The last window keeps the full left context that its length allows.
            yield Window(max(0, end - window), end, max(first, first_target))
        first_target, end = end, min(end + stride, num_tokens)


def context_length(position: int, num_tokens: int, window: int, stride: int) -> int:
    """How many tokens the LM saw when it predicted ``position`` of a text cut by `rolling_windows`."""
    if not 1 <= position < num_tokens:
        raise InvalidParameter(f"`position` must be in 1 … {num_tokens - 1}, got {position}", param="position")
    if position < window:
        return position
    first_target = window + (position - window) // stride * stride
    end = min(first_target + stride, num_tokens)
    return position - max(0, end - window)
