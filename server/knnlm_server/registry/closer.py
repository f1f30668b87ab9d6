"""Closing what nobody uses any more, away from whoever gave it back last."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from knnlm_server.registry.generation import Generation

logger = logging.getLogger(__name__)


class Closer:
    """Closes generations on a thread of its own: unmapping gigabytes takes longer than streams should wait.

    Args:     close: for one generation.
    """

    def __init__(self, close: Callable[[Generation], None]) -> None:
        self._close_one = close
        self._thread = ThreadPoolExecutor(1, "close-datastores")

    def close(self, generation: Generation) -> None:
        """Close it soon; after `stop`, at once."""
        try:
            self._thread.submit(self._close, generation)
        except RuntimeError:  # stopped
            self._close(generation)

    def wait(self) -> None:
        """Until everything that was to be closed before is closed."""
        try:
            self._thread.submit(lambda: None).result()
        except RuntimeError:
            return

    def stop(self) -> None:
        """Close what is to be closed, and end the thread."""
        self._thread.shutdown()

    def _close(self, generation: Generation) -> None:
        try:
            self._close_one(generation)
        except Exception:
            logger.exception("datastore not closed name=%s generation=%d", generation.name, generation.number)
