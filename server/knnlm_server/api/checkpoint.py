"""Work on a thread that ends once nobody waits for it: a thread cannot be cancelled from outside."""

from __future__ import annotations

from knnlm_core.errors import RequestCancelled


class Checkpoint:
    """Called between the parts of some work; raises RequestCancelled once it is closed. Any thread may close it."""

    def __init__(self) -> None:
        self._is_open = True

    def close(self) -> None:
        """Let the work end at its next call."""
        self._is_open = False

    def __call__(self) -> None:
        if not self._is_open:
            raise RequestCancelled("the request was cancelled")
