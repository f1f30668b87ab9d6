"""One change of a name at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from knnlm_core.errors import DatastoreBusy


class Turns:
    """Whose turn it is to change which name. Thread-safe."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, name: str, wait_s: float = 0.0) -> Iterator[None]:
        """Hold the turn for the block. Raises DatastoreBusy: somebody else still has it after ``wait_s``."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while name in self._taken:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DatastoreBusy(f"datastore {name!r} is being changed by another request")
                self._changed.wait(left)
            self._taken.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._taken.discard(name)
                self._changed.notify_all()
