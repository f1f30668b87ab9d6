"""When an engine request was where, and what its passes took: written on the engine's thread, read when it is over."""

from __future__ import annotations

import time
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import NamedTuple

from knnlm_core.mixture import Timings


@dataclass(slots=True)
class Spent:
    """Whole seconds of the passes that a request took part in: what the rest of a batch needs is waited for."""

    passes: int = 0
    forward: float = 0.0
    gate: float = 0.0
    search: float = 0.0
    mix: float = 0.0

    def add(self, forward: float, timings: Timings | None) -> None:
        """One pass more.

        Args:   timings: None for a request without a datastore, whatever the others did.
        """
        self.passes += 1
        self.forward += forward
        if timings is not None:
            self.add_mixing(timings)

    def add_mixing(self, timings: Timings) -> None:
        """What came after some passes."""
        self.gate += timings.gate
        self.search += timings.search
        self.mix += timings.mix


class Phase(NamedTuple):
    """A stretch of a request's life; monotonic seconds."""

    name: str
    start_s: float
    end_s: float
    spent: Spent | None  # None where it only waited


@dataclass(slots=True)
class Timeline:
    """Monotonic seconds; None for what has not happened.

    Attributes:
        context: what it was made in; what the engine logs of it, is logged in that.
    """

    submitted_s: float = field(default_factory=time.monotonic)
    begun_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    prefill: Spent = field(default_factory=Spent)  # before the first token; of windows, all there is
    decode: Spent = field(default_factory=Spent)
    context: Context = field(default_factory=copy_context)

    def begin(self) -> float:
        """The first pass is about to begin; returns how long it waited."""
        self.begun_s = time.monotonic()
        return self.begun_s - self.submitted_s

    def end(self) -> float:
        """It is over; returns how long it took."""
        self.ended_s = time.monotonic()
        return self.ended_s - self.submitted_s

    def phases(self, *, working: str, now_s: float) -> list[Phase]:
        """What it has been through, one after the other.

        Args:
            working: what the time before the first token is called.
            now_s: stands for the end of what is not over.
        """
        ended = self.ended_s if self.ended_s is not None else now_s
        if self.begun_s is None:
            return [Phase("queue", self.submitted_s, ended, None)]
        middle = self.first_token_s if self.first_token_s is not None else ended
        phases = [
            Phase("queue", self.submitted_s, self.begun_s, None),
            Phase(working, self.begun_s, middle, self.prefill),
        ]
        if self.first_token_s is not None:
            phases.append(Phase("decode", middle, ended, self.decode))
        return phases
