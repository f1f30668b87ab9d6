"""How a build shows what it is doing, without the stages knowing on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Reporter(Protocol):
    """Where stages report to."""

    def stage(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """A stage of ``total`` units (None: not known yet); call the result with how many were done."""
        ...

    def say(self, message: str) -> None:
        """One line for people."""
        ...


class SilentReporter:
    """Reports nothing; for tests and for callers that show progress themselves."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Ignore what is done."""
        yield lambda done: None

    def say(self, message: str) -> None:
        """Ignore the message."""
