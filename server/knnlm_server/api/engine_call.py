"""An engine request, seen from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from knnlm_core.errors import KnnlmError
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.engine.engine import Engine, Request


class EngineCall:
    """Carries what one request reports from the engine's thread to the event loop; holds the lease while it runs.

    Args:
        on_end: called on the event loop, once, with None or with why the request failed.
    """

    def __init__(self, engine: Engine, lease: SharedLease, on_end: Callable[[KnnlmError | None], None]) -> None:
        self._engine = engine
        self._lease = lease
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._request: Request | None = None

    def submit(self, request: Request) -> None:
        """Raises: as `Engine.submit`; then nothing is ever reported."""
        self._lease.hold()
        try:
            self._engine.submit(request)
        except BaseException:
            self._lease.drop()
            raise
        self._request = request

    def report(self, function: Callable[..., None], *args: Any) -> None:
        """From the engine's thread: have a function called on the event loop, unless that is gone."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the server is shutting down
            return

    def end(self, error: KnnlmError | None) -> None:
        """What the request's `on_end` is to be."""
        try:
            self._loop.call_soon_threadsafe(self._end, error)
        except RuntimeError:
            self._lease.drop()

    def _end(self, error: KnnlmError | None) -> None:
        self._lease.drop()
        self._on_end(error)

    def abort(self) -> None:
        """End the request if it still runs."""
        if self._request is not None:
            self._engine.abort(self._request)
