"""What is known of an HTTP request when it is over: for its line in the log, its metrics and its spans."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from knnlm_server.telemetry.timeline import Timeline

OTHER = "other"  # the route of what reached none


class WorkReport(NamedTuple):
    """What the engine did for a request, so far. Numbers and names alone: never a text."""

    model: str
    datastores: str  # name:version:generation.revision of each, joined by +
    prompt_tokens: int
    tokens: int  # generated, or scored
    retrievals: Mapping[str, int]  # searched, followed, …; empty without a datastore
    working: str  # what its timelines call the time before a first token
    timelines: Sequence[Timeline]  # of its engine requests
    error: str | None = None  # code of what ended it


@dataclass(slots=True)
class RequestRecord:
    """One HTTP request. Routes set ``work`` once the engine has taken it.

    Attributes:
        route: the route's path, with names instead of values, or ``other``.
        status: of the answer; 0 if none was sent.
    """

    request_id: str
    method: str
    route: str = OTHER
    status: int = 0
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0
    work: Callable[[], WorkReport] | None = None

    @property
    def seconds(self) -> float:
        """From the request's head to the end of its answer."""
        return self.ended_s - self.started_s
