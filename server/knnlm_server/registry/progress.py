"""How far a load has come."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Stage(StrEnum):
    """What a load does, in this order; `VERIFY` only at a version's first load on a machine."""

    OPEN = "open"
    VERIFY = "verify"  # in bytes
    WARM = "warm"  # in bytes
    TEST = "test"
    SWAP = "swap"


# Gets the stage, how much of it is done, and how much there is; may raise to end the load.
Report = Callable[[Stage, int, int], None]


def ignore(stage: Stage, done: int, total: int) -> None:
    """For whoever does not want to know."""


class Counted:
    """Adds up the parts of one stage."""

    def __init__(self, report: Report, stage: Stage, total: int) -> None:
        self._report = report
        self._stage = stage
        self._total = total
        self._done = 0
        report(stage, 0, total)

    def __call__(self, part: int) -> None:
        """So much more is done."""
        self._done += part
        self._report(self._stage, self._done, self._total)
