"""How many bytes of datastores a server may have open."""

from __future__ import annotations

import threading
from collections.abc import Callable

from knnlm_core.errors import DatastoreBudget


class Budget:
    """Counts the bytes of every open generation, those that drain and those that load included, and what was learned.

    Args:
        limit: in bytes; None for none.
        learned: bytes of what all loaded names have learned. That is counted when something is to be loaded or
            learned; it is never taken away to make room.
    """

    def __init__(self, limit: int | None, learned: Callable[[], int]) -> None:
        self.limit = limit
        self._learned = learned
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes."""
        return self._learned() + self._taken

    def take(self, what: str, needed: int) -> None:
        """Count so many bytes more, until `give_back`. Raises DatastoreBudget: they would be too many."""
        learned = self._learned()
        with self._lock:
            self._require(what, needed, learned + self._taken)
            self._taken += needed

    def give_back(self, taken: int) -> None:
        """Bytes of a generation that is closed."""
        with self._lock:
            self._taken -= taken
            assert self._taken >= 0, "more bytes were given back than taken. This is a bug."

    def require(self, what: str, needed: int) -> None:
        """Raises DatastoreBudget: so many bytes more would be too many."""
        self._require(what, needed, self.used)

    def _require(self, what: str, needed: int, used: int) -> None:
        if self.limit is not None and used + needed > self.limit:
            raise DatastoreBudget(
                f"{what} needs {needed} bytes, but of `datastore_bytes` = {self.limit} bytes {used} are used"
            )
