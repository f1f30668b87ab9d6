"""What the engine does in whole windows, without a sequence of its own: scoring, and looking up neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.mixture import Timings
from knnlm_server.telemetry.timeline import Timeline


class Searches(NamedTuple):
    """What a pass did at the rows that have a datastore."""

    searched: int
    followed: int
    skipped: int
    forward_seconds: float = 0.0  # that the language model took; 0 where nobody measures
    timings: Timings | None = None  # of finding and mixing; None where nothing was mixed


class WindowWork(Protocol):
    """A request that the engine's thread advances pass by pass, each such request in turn.

    Attributes:
        kind: as metrics call it.
        timeline: when it was where.
        on_end: called exactly once when the request leaves the engine: with None, or with why it failed.
    """

    kind: ClassVar[str]

    @property
    def request_id(self) -> str: ...

    @property
    def timeline(self) -> Timeline: ...

    @property
    def on_end(self) -> Callable[[KnnlmError | None], None]: ...

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        ...

    def run(self, lm: CausalLM, token_budget: int) -> Searches:
        """One pass over the next windows: at least one, of together at most ``token_budget`` padded tokens if possible.

        Returns: for how many rows it was decided to search, to follow pointers instead, and to do neither.
        Raises: KnnlmError: the request cannot go on.
        """
        ...
