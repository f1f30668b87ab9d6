"""How long work on a datastore shows how far it is."""

from __future__ import annotations

from collections.abc import Callable

StageProgress = Callable[[str, int, int], None]
"""Gets the name of a stage, how much of it is done, and how much there is to do."""


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def counted(progress: StageProgress, stage: str, total: int) -> Callable[[int], None]:
    """Begin a stage; call the result with what was done since the last call."""
    done = 0
    progress(stage, done, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return advance
