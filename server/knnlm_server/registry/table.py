"""Which generation a name means, and who uses which. Nothing here reads a file or waits, but for leases to end.

retarget     the name means a new generation at once; the old one is retired
lease        pins what the name means now, in O(1)
closed       a retired generation, exactly when its last lease ends
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from knnlm_core.datastore.canaries import SelfTest
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import Drift
from knnlm_core.errors import DatastoreBusy, DatastoreNotFound
from knnlm_server.registry.generation import Generation, Lease
from knnlm_server.registry.serving import ServedName, Serving


class DatastoreStatus(NamedTuple):
    """What is known of a loaded name."""

    datastore: Snapshot  # that a request would get now
    generation: int
    state: str  # "ready" | "draining"
    leases: int  # of all generations of the name that are still open
    draining_leases: int  # of generations that were replaced, or of a name that is being unloaded
    served: ServedName
    aliases: tuple[str, ...]
    self_test: SelfTest
    drift: Drift | None

    @property
    def name(self) -> str:
        """The datastore's name."""
        return self.datastore.name


class Table:
    """Loaded names and their open generations. Thread-safe.

    Args:
        serving: what was served before; nothing of it is loaded yet.
        close: closes a generation that nobody uses any more; called once for each, and never under the lock.
    """

    def __init__(self, serving: Serving, close: Callable[[Generation], None]) -> None:
        self._serving = serving
        self._close = close
        self._current: dict[str, Generation] = {}
        self._open: set[Generation] = set()  # current ones, and retired ones that are leased
        self._draining: set[str] = set()
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)

    @property
    def serving(self) -> Serving:
        """Names, aliases, default: a value that does not change."""
        return self._serving

    def names(self) -> list[str]:
        """Loaded names, sorted."""
        with self._lock:
            return sorted(self._current)

    def open_generations(self) -> list[Generation]:
        """Every generation that is not closed, in any order."""
        with self._lock:
            return list(self._open)

    def current(self, name: str) -> Generation | None:
        """What a name, not an alias, means now."""
        with self._lock:
            return self._current.get(name)

    def status(self, name: str) -> DatastoreStatus:
        """Of a name or alias. Raises DatastoreNotFound: not loaded."""
        with self._lock:
            return self._status(self._get(name))

    def statuses(self) -> list[DatastoreStatus]:
        """Of all loaded names, sorted."""
        with self._lock:
            return [self._status(generation) for _, generation in sorted(self._current.items())]

    def lease(self, name: str, param: str | None = None) -> Lease:
        """Pin what a name or alias means now. Raises DatastoreNotFound: not loaded, or being unloaded."""
        with self._lock:
            generation = self._get(name, param)
            if generation.name in self._draining:
                raise DatastoreNotFound(f"datastore {name!r} is being unloaded", param=param)
            generation.leases += 1
            return Lease(generation, generation.snapshot, self._give_back)

    def pin(self, snapshot: Snapshot) -> Lease | None:
        """One lease more on what somebody has leased; None once it is retired, or its name is being unloaded."""
        with self._lock:
            generation = self._current.get(snapshot.name)
            if generation is None or generation.datastore is not snapshot.datastore or snapshot.name in self._draining:
                return None
            generation.leases += 1
            return Lease(generation, snapshot, self._give_back)

    def relabel(self, serving: Serving) -> None:
        """Other aliases, or another default."""
        with self._lock:
            self._serving = serving

    def show(self, generation: Generation, snapshot: Snapshot) -> None:
        """What requests that begin now see of a generation."""
        with self._lock:
            generation.snapshot = snapshot

    def retarget(self, generation: Generation, serving: Serving) -> tuple[DatastoreStatus, bool]:
        """Let its name mean this generation; returns its status, and whether the name was loaded before."""
        with self._lock:
            old = self._current.get(generation.name)
            self._current[generation.name] = generation
            self._open.add(generation)
            self._serving = serving
            ended = self._retire(old)
            status = self._status(generation)
        self._close_all(ended)
        return status, old is not None

    @contextmanager
    def draining(self, name: str, timeout_s: float) -> Iterator[None]:
        """Give no new lease of a name, wait until its leases have ended, and give none until the block ends.

        Raises:
            DatastoreNotFound: not loaded.
            DatastoreBusy: leases remain after ``timeout_s``.
        """
        with self._lock:
            self._get(name)
            self._draining.add(name)
            try:
                self._wait(name, timeout_s)
            except BaseException:
                self._draining.discard(name)
                raise
        try:
            yield
        finally:
            with self._lock:
                self._draining.discard(name)

    def remove(self, name: str, serving: Serving) -> None:
        """Let a name mean nothing."""
        with self._lock:
            ended = self._retire(self._current.pop(name))
            self._serving = serving
        self._close_all(ended)

    def clear(self) -> None:
        """Let no name mean anything; what is leased closes with its last lease."""
        with self._lock:
            ended = [generation for old in self._current.values() for generation in self._retire(old)]
            self._current.clear()
        self._close_all(ended)

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _get(self, name: str, param: str | None = None) -> Generation:
        meant = self._serving.resolve(name)
        try:
            return self._current[meant]
        except KeyError:
            loaded = ", ".join(sorted(self._current)) or "none"
            which = f"{name!r}" if meant == name else f"{meant!r}, which {name!r} means,"
            raise DatastoreNotFound(f"datastore {which} is not loaded; loaded: {loaded}", param=param) from None

    def _leases(self, name: str) -> int:
        return sum(generation.leases for generation in self._open if generation.name == name)

    def _draining_leases(self, name: str) -> int:
        if name in self._draining:
            return self._leases(name)
        return sum(old.leases for old in self._open if old.name == name and old.retired)

    def _status(self, generation: Generation) -> DatastoreStatus:
        name = generation.name
        return DatastoreStatus(
            datastore=generation.snapshot,
            generation=generation.number,
            state="draining" if name in self._draining else "ready",
            leases=self._leases(name),
            draining_leases=self._draining_leases(name),
            served=self._serving.names[name],
            aliases=self._serving.aliases_of(name),
            self_test=generation.self_test,
            drift=generation.drift,
        )

    def _retire(self, generation: Generation | None) -> list[Generation]:
        if generation is None:
            return []
        generation.retired = True
        return self._ended(generation)

    def _ended(self, generation: Generation) -> list[Generation]:
        """The generation, if nobody can use it any more: whoever gets it here closes it."""
        if not generation.retired or generation.leases:
            return []
        self._open.remove(generation)
        return [generation]

    def _wait(self, name: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while leases := self._leases(name):
            left = deadline - time.monotonic()
            if left <= 0:
                raise DatastoreBusy(
                    f"datastore {name!r} still has {leases} leases after {timeout_s:g} s; it stays loaded"
                )
            self._released.wait(left)

    # -- without it ----------------------------------------------------------------------------------------------------

    def _give_back(self, generation: Generation) -> None:
        with self._lock:
            generation.leases -= 1
            assert generation.leases >= 0, "a lease was released twice. This is a bug."
            ended = self._ended(generation)
            self._released.notify_all()
        self._close_all(ended)

    def _close_all(self, generations: list[Generation]) -> None:
        for generation in generations:
            self._close(generation)
