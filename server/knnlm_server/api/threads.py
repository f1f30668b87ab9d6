"""Threads for work that can take seconds: asyncio's own stay free for what every request needs for a moment."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

READING_THREADS = 4
OVERLAP_THREADS = 2
LOADING_THREADS = 4
CHANGING_THREADS = 4
MAINTENANCE_THREADS = 2


class _InContext(ThreadPoolExecutor):
    """Work knows what it is done for, as a task does: its log lines carry the request's id."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return super().submit(partial(copy_context().run, fn, *args, **kwargs))


class Threads:
    """Small sets of threads; work beyond the number of a set waits its turn, and holds up no other set.

    Started when first used.

    Attributes:
        reading: tokenises texts of any length, and renders the answers that are as long.
        overlap: searches through whole datastores.
        loading: loads and drains datastores.
        changing: writes what is learned and deleted.
        maintenance: compacts, purges, verifies and compares, which can take minutes.
    """

    def __init__(self) -> None:
        self.reading = _InContext(READING_THREADS, "reading")
        self.overlap = _InContext(OVERLAP_THREADS, "overlap")
        self.loading = _InContext(LOADING_THREADS, "loading")
        self.changing = _InContext(CHANGING_THREADS, "changing")
        self.maintenance = _InContext(MAINTENANCE_THREADS, "maintenance")

    def close(self) -> None:
        """Drop the work that waits and take no more; the process ends when what runs has ended."""
        for executor in (self.reading, self.overlap, self.loading, self.changing, self.maintenance):
            executor.shutdown(wait=False, cancel_futures=True)
