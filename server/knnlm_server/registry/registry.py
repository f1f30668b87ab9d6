"""Names → loaded datastores, with leases that pin one version for the life of a request.

load(name)          opens and checks the new version beside the old one, then retargets the name (generation + 1)
lease(name)         pins what the name means now; released exactly once
old version         closes when its last lease ends
unload(name)        no new leases; returns when the last one has ended
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore.checksums import verify_once
from knnlm_core.datastore.layout import published_names
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreBusy, DatastoreNotFound
from knnlm_core.types import LMIdentity

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Generation:
    """One loaded version of a name."""

    datastore: Datastore
    number: int
    leases: int = 0
    retired: bool = False


class Lease:
    """The right to use one version of a datastore until `release`."""

    def __init__(self, registry: Registry, generation: _Generation) -> None:
        self._registry = registry
        self._generation: _Generation | None = generation
        self.datastore = generation.datastore
        self.generation = generation.number

    @property
    def label(self) -> str:
        """``name:version:generation.revision``, as answers carry it; nothing can be added yet, so revision is 0."""
        return f"{self.datastore.name}:{self.datastore.version}:{self.generation}.0"

    def release(self) -> None:
        """Give the lease back; further calls do nothing."""
        generation, self._generation = self._generation, None
        if generation is not None:
            self._registry._release(generation)


class DatastoreStatus(NamedTuple):
    """What the registry knows of a loaded name."""

    datastore: Datastore
    generation: int
    state: str  # "ready" | "draining"
    leases: int  # of all generations of the name that are still open


class Loaded(NamedTuple):
    """Outcome of `Registry.load`."""

    status: DatastoreStatus
    created: bool  # False when the name was loaded before


class Registry:
    """Loaded datastores under one root. Thread-safe.

    Args:
        root: folder that holds published datastores by name; None for a server without any.
        identity: of the running LM; a store that does not fit it is refused.
        verified: folder that remembers which versions' checksums were compared on this machine; a version that it does
            not know is read in full before it is used. None compares sizes only.
    """

    def __init__(self, root: Path | None, identity: LMIdentity, verified: Path | None = None) -> None:
        self._root = root
        self._identity = identity
        self._verified = verified
        self._current: dict[str, _Generation] = {}
        self._open: list[_Generation] = []  # current ones and those that drain
        self._numbers: dict[str, int] = {}  # survives unload, so that a generation number never means two things
        self._changing: set[str] = set()
        self._draining: set[str] = set()
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)

    def published(self) -> list[str]:
        """Names under the root that have a published version, loaded or not."""
        return published_names(self._root) if self._root is not None else []

    def names(self) -> list[str]:
        """Loaded names, sorted."""
        with self._lock:
            return sorted(self._current)

    def status(self, name: str) -> DatastoreStatus:
        """Raises DatastoreNotFound: the name is not loaded."""
        with self._lock:
            return self._status(name, self._get(name))

    def statuses(self) -> list[DatastoreStatus]:
        """All loaded names, sorted."""
        with self._lock:
            return [self._status(name, generation) for name, generation in sorted(self._current.items())]

    def lease(self, name: str) -> Lease:
        """Pin what the name means now. Raises DatastoreNotFound: not loaded, or being unloaded."""
        with self._lock:
            if name in self._draining:
                raise DatastoreNotFound(f"datastore {name!r} is being unloaded", param="knn.datastore")
            generation = self._get(name, param="knn.datastore")
            generation.leases += 1
            return Lease(self, generation)

    def load(self, name: str, version: str | None = None) -> Loaded:
        """Load a published version, or swap the name to it; a failure leaves the old one serving.

        Args:
            version: None for the one that CURRENT names.
        Raises:
            DatastoreNotFound: no such name or version under the root.
            DatastoreMismatch: built for another LM.
            DatastoreCorrupt: a file contradicts the manifest.
            DatastoreBusy: another change of the name is under way.
        """
        if self._root is None:
            raise DatastoreNotFound(f"datastore {name!r} cannot be loaded: the server was started without --datastores")
        with self._change(name):
            started = time.monotonic()
            datastore = Datastore.open(self._root, name, version)
            try:
                if self._verified is not None:
                    verify_once(datastore.folder, datastore.manifest, self._verified)
                datastore.require_fits(self._identity)
                datastore.prefetch()
            except BaseException:
                datastore.close()
                raise
            with self._lock:
                number = self._numbers.get(name, 0) + 1
                self._numbers[name] = number
                old = self._current.get(name)
                generation = _Generation(datastore, number)
                self._current[name] = generation
                self._open.append(generation)
                if old is not None:
                    self._retire(old)
                status = self._status(name, generation)
            logger.info(
                "datastore loaded name=%s version=%s generation=%d entries=%d seconds=%.3f",
                name, datastore.version, number, datastore.entries, time.monotonic() - started,
            )  # fmt: skip
            return Loaded(status, created=old is None)

    def unload(self, name: str, timeout_s: float) -> None:
        """Take the name away, wait until its leases have ended, close it.

        Raises:
            DatastoreNotFound: not loaded.
            DatastoreBusy: leases remain after ``timeout_s``, or another change is under way; the name serves again.
        """
        with self._change(name), self._lock:
            generation = self._get(name)
            self._draining.add(name)
            try:
                deadline = time.monotonic() + timeout_s
                while leases := self._leases(name):
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._released.wait(left):
                        if not self._leases(name):
                            break
                        raise DatastoreBusy(
                            f"datastore {name!r} still has {leases} leases after {timeout_s:g} s; it stays loaded"
                        )
                del self._current[name]
                self._retire(generation)
            finally:
                self._draining.discard(name)
        logger.info("datastore unloaded name=%s", name)

    def close(self) -> None:
        """Close everything that no lease holds; the rest closes with its last lease."""
        with self._lock:
            for generation in list(self._current.values()):
                self._retire(generation)
            self._current.clear()

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _get(self, name: str, param: str | None = None) -> _Generation:
        try:
            return self._current[name]
        except KeyError:
            loaded = ", ".join(sorted(self._current)) or "none"
            raise DatastoreNotFound(f"datastore {name!r} is not loaded; loaded: {loaded}", param=param) from None

    def _leases(self, name: str) -> int:
        return sum(g.leases for g in self._open if g.datastore.name == name)

    def _status(self, name: str, generation: _Generation) -> DatastoreStatus:
        state = "draining" if name in self._draining else "ready"
        return DatastoreStatus(generation.datastore, generation.number, state, self._leases(name))

    def _retire(self, generation: _Generation) -> None:
        generation.retired = True
        self._close_if_unused(generation)

    def _close_if_unused(self, generation: _Generation) -> None:
        if generation.retired and not generation.leases:
            self._open.remove(generation)
            generation.datastore.close()

    def _release(self, generation: _Generation) -> None:
        with self._lock:
            generation.leases -= 1
            assert generation.leases >= 0, "lease released twice. This is a bug."
            self._close_if_unused(generation)
            self._released.notify_all()

    @contextmanager
    def _change(self, name: str) -> Iterator[None]:
        with self._lock:
            if name in self._changing:
                raise DatastoreBusy(f"datastore {name!r} is being changed by another request")
            self._changing.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._changing.discard(name)
