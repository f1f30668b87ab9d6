"""Which generation a name means changes here, and nowhere else: on the disk first, then in the table.

prepare (seconds to minutes)  →  commit: state file, table (milliseconds)  →  the old generation drains and closes
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.maintenance.stages import StageProgress
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import Drift, require_small
from knnlm_core.errors import DatastoreBusy, ShuttingDown
from knnlm_core.types import LMIdentity
from knnlm_server.registry.budget import Budget
from knnlm_server.registry.closer import Closer
from knnlm_server.registry.config import RegistryConfig
from knnlm_server.registry.generation import Generation
from knnlm_server.registry.livings import Livings
from knnlm_server.registry.loading import Loader, Prepared
from knnlm_server.registry.progress import Stage
from knnlm_server.registry.retention import Retention
from knnlm_server.registry.serving import Labels, Serving
from knnlm_server.registry.state_file import StateFile
from knnlm_server.registry.table import DatastoreStatus, Table
from knnlm_server.registry.turns import Turns

logger = logging.getLogger(__name__)


class Swaps:
    """Changes table and file of state together. Thread-safe; changes of one name must take turns.

    Args:     root: folder that holds the datastores by name.
    Raises:   DatastoreCorrupt: the file of state is damaged.
    """

    def __init__(self, root: Path, identity: LMIdentity, config: RegistryConfig) -> None:
        self.livings = Livings(root)
        self.turns = Turns()  # whoever loads or unloads a name, or removes versions of it, has its turn
        self.budget = Budget(config.max_bytes, lambda: self.livings.num_bytes)
        self.state = StateFile(config.state)
        self._loader = Loader(root, identity, self.budget, config.verified, config.numerics)
        self._measure_drift = config.drift
        self._drifts: dict[str, Drift] = {}  # by the digest of the manifest: a folder may get another version's files
        self._retention = Retention(root, config.keep_versions)
        self._closer = Closer(self._close)
        self.table = Table(self.state.open(), self._closer.close)
        self._commits = threading.Lock()  # leases do not wait for it
        self._is_closed = False
        self._postponed: set[str] = set()  # names whose retention waits for the end of a turn

    def load(
        self, name: str, version: str | None, labels: Labels, report: StageProgress
    ) -> tuple[DatastoreStatus, bool]:
        """Prepare a version and retarget its name; returns the status, and whether the name was loaded before.

        Raises: as `Registry.load`; then everything is as it was.
        """
        self._closer.wait()  # what was given back is not counted as used
        prepared = self._loader.prepare(name, version, report)
        try:
            living = self.livings.use(name)
            try:
                living.refresh()
                snapshot = living.snapshot(prepared.datastore)  # reads what was learned: the commit need not
                drift = self._drift(snapshot)
                report(Stage.SWAP, 0, 1)
                return self._commit(prepared, drift, living, follows_current=version is None, labels=labels)
            except BaseException:
                living.detach(prepared.datastore)
                self.livings.leave(name)
                raise
        except BaseException:
            self._loader.discard(prepared.datastore)
            raise

    def unload(self, name: str, timeout_s: float) -> None:
        """Drain a name and close it. Raises: as `Registry.unload`."""
        with self.table.draining(name, timeout_s), self._commits:
            serving = self.table.serving.with_unloaded(name)
            self.state.write(serving)
            self.table.remove(name, serving)
        self._closer.wait()

    def relabel(self, change: Callable[[Serving], Serving]) -> None:
        """Other aliases, another default, other numbers of versions that do not serve now."""
        with self._commits:
            serving = change(self.table.serving)
            self.state.write(serving)
            self.table.relabel(serving)

    def show(self, name: str) -> None:
        """Let requests that begin from now on see what a name has learned."""
        with self._commits:
            generation = self.table.current(name)
            if generation is not None:
                self.table.show(generation, generation.living.snapshot(generation.datastore))

    def end_turn(self, name: str) -> None:
        """What had to wait for the end of a turn."""
        if name in self._postponed:
            self._postponed.discard(name)
            self._retain(name)

    def require_open(self) -> None:
        """Raises ShuttingDown: this was closed."""
        if self._is_closed:
            raise ShuttingDown("the server is shutting down")

    def close(self) -> None:
        """Close what no lease holds; the rest closes with its last lease. Nothing is loaded any more."""
        with self._commits:
            self._is_closed = True
        self.table.clear()
        self._closer.stop()
        self.state.close()

    def _drift(self, snapshot: Snapshot) -> Drift | None:
        """How far the running LM's keys are from the version's; None where nothing can be said.

        Raises: DatastoreMismatch: too far.
        """
        if self._measure_drift is None:
            return None
        digest = snapshot.manifest.digest
        if (known := self._drifts.get(digest)) is not None:
            return known
        drift = self._measure_drift(snapshot)
        if drift is None:
            logger.info("keys not compared name=%s version=%s: no canaries or no text", snapshot.name, snapshot.version)
            return None
        require_small(snapshot.name, drift)
        logger.info(
            "keys compared name=%s version=%s drift=%.2g distance=%.3g nearest=%.3g keys=%d",
            snapshot.name, snapshot.version, drift.ratio, drift.distance, drift.nearest, drift.keys,
        )  # fmt: skip
        self._drifts[digest] = drift
        return drift

    def _commit(
        self, prepared: Prepared, drift: Drift | None, living: LivingName, *, follows_current: bool, labels: Labels
    ) -> tuple[DatastoreStatus, bool]:
        datastore, self_test = prepared
        name = datastore.name
        with self._commits:
            self.require_open()
            serving = self.table.serving.with_loaded(name, datastore.version, follows_current=follows_current)
            serving = serving.with_labels(name, labels)
            snapshot = living.snapshot(datastore)
            generation = Generation(datastore, living, snapshot, serving.names[name].generation, self_test, drift)
            # Written first, so that no number is given twice, whenever the server dies.
            self.state.write(serving)
            return self.table.retarget(generation, serving)

    def _close(self, generation: Generation) -> None:
        name = generation.name
        generation.living.detach(generation.datastore)
        self._loader.discard(generation.datastore)
        self.livings.leave(name)
        self._retain(name)

    def _retain(self, name: str) -> None:
        """Remove versions that need not be kept, unless somebody is about to load one."""
        try:
            with self.turns.take(name):
                served = self.table.serving.names[name]
                used = {other.datastore.version for other in self.table.open_generations() if other.name == name}
                self._retention.apply(name, {served.serving, *used, *([served.previous] if served.previous else [])})
        except DatastoreBusy:
            self._postponed.add(name)
