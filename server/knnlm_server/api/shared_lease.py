"""A lease with several holders: the route, its engine request, and threads that read the datastore."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Releasable(Protocol):
    """A lease, or a selection that holds several."""

    def release(self) -> None:
        """Give it back."""
        ...


class SharedLease:
    """Gives a lease back when the last holder lets go; the maker is the first. On the event loop only."""

    def __init__(self, lease: Releasable) -> None:
        self._lease = lease
        self._holders = 1

    def hold(self) -> None:
        """One holder more."""
        self._holders += 1

    def drop(self) -> None:
        """One holder less."""
        self._holders -= 1
        assert self._holders >= 0, "a lease was dropped twice. This is a bug."
        if not self._holders:
            self._lease.release()

    async def in_thread(self, function: Callable[..., T], *args: Any, executor: Executor | None = None) -> T:
        """Call a function on a thread that holds the lease until it returns, also where nobody waits any more.

        Args:   executor: whose threads; asyncio's own, unless it can take seconds.
        """
        task = asyncio.get_running_loop().run_in_executor(executor, function, *args)
        self.hold()
        task.add_done_callback(self._thread_ended)
        return await asyncio.shield(task)

    def _thread_ended(self, task: asyncio.Future[Any]) -> None:
        self.drop()
        if not task.cancelled():
            task.exception()  # seen, whether or not somebody still waits
