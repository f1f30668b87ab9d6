"""One `LivingName` per name, shared by the name's open generations."""

from __future__ import annotations

import threading
from pathlib import Path

from knnlm_core.datastore.living import LivingName


class Livings:
    """Opened when a name is first needed, closed with its last user. Thread-safe.

    Args:     root: folder that holds the datastores by name.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._shared: dict[str, tuple[LivingName, int]] = {}  # … and its users
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory of everything that was learned."""
        with self._lock:
            livings = [living for living, _ in self._shared.values()]
        return sum(living.num_bytes for living in livings)

    def get(self, name: str) -> LivingName:
        """That of a name which somebody uses."""
        with self._lock:
            return self._shared[name][0]

    def use(self, name: str) -> LivingName:
        """One user more, until `leave`. Two threads that may each be a name's first user must take turns.

        Raises: DatastoreCorrupt, DatastoreMismatch: the name's ledger cannot be read.
        """
        with self._lock:
            if name in self._shared:
                living, users = self._shared[name]
                self._shared[name] = (living, users + 1)
                return living
        living = LivingName(self._root, name)
        with self._lock:
            assert name not in self._shared, f"{name!r} was opened twice at once. This is a bug."
            self._shared[name] = (living, 1)
        return living

    def leave(self, name: str) -> None:
        """One user less."""
        with self._lock:
            living, users = self._shared.pop(name)
            if users > 1:
                self._shared[name] = (living, users - 1)
                return
        living.close()
