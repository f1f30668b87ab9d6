"""Names → loaded datastores, with leases that pin what a request sees for its whole life.

load(name)          prepares the new version beside the old one, then retargets the name (generation + 1)
lease(name)         pins what the name means now; released exactly once
change(name)        learns and deletes; what requests that begin then see is replaced
old generation      closes when its last lease ends
unload(name)        no new leases; returns when the last one has ended

A name may be an alias everywhere. Files are read with no lock held that a lease would wait for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore import layout
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.maintenance.stages import StageProgress, silent
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreNotFound, KnnlmError
from knnlm_core.types import LMIdentity
from knnlm_server.registry.budget import Budget
from knnlm_server.registry.config import RegistryConfig
from knnlm_server.registry.generation import Lease
from knnlm_server.registry.progress import Stage
from knnlm_server.registry.serving import AS_THEY_ARE, Labels, Serving, check_aliases
from knnlm_server.registry.swaps import Swaps
from knnlm_server.registry.table import DatastoreStatus
from knnlm_server.registry.turns import Turns
from knnlm_server.telemetry.datastore_metrics import DatastoreMetrics

logger = logging.getLogger(__name__)

CHANGE_WAIT_S = 30.0  # until it is a change's turn


class Loaded(NamedTuple):
    """Outcome of `Registry.load`."""

    status: DatastoreStatus
    created: bool  # False when the name was loaded before


Reload = Callable[[str | None], Loaded]


@dataclass(frozen=True, slots=True)
class Change:
    """What is learned or deleted in a block of `Registry.change`.

    Attributes:
        living: of the name; what it has changed is shown to new requests at the end of the block.
        lease: of the generation that served at its beginning.
    """

    name: str
    living: LivingName
    lease: Lease
    budget: Budget

    def require_room(self, needed: int) -> None:
        """Raises DatastoreBudget: so many bytes of learned keys would be too many."""
        self.budget.require(f"learning in datastore {self.name!r}", needed)


class Registry:
    """Loaded datastores under one root. Thread-safe.

    Args:
        root: folder that holds published datastores by name; None for a server without any.
        identity: of the running LM; a store that does not fit it is refused.
    Raises: DatastoreCorrupt: the file of state is damaged.
    """

    def __init__(self, root: Path | None, identity: LMIdentity, config: RegistryConfig | None = None) -> None:
        self.root = root
        self.metrics = DatastoreMetrics()
        # Without a root nothing is ever loaded.
        self._swaps = Swaps(root or Path(), identity, config or RegistryConfig())
        self._table = self._swaps.table
        self._changes = Turns()  # of what learns and deletes

    # -- what there is -------------------------------------------------------------------------------------------------

    def published(self) -> list[str]:
        """Names under the root that have a published version, loaded or not."""
        return layout.published_names(self.root) if self.root is not None else []

    def names(self) -> list[str]:
        """Loaded names, sorted; no aliases."""
        return self._table.names()

    @property
    def serving(self) -> Serving:
        """Names, aliases and default, loaded or not."""
        return self._table.serving

    @property
    def is_persistent(self) -> bool:
        """Whether a restart finds what is served now."""
        return self._swaps.state.is_persistent

    @property
    def budget(self) -> Budget:
        """Bytes that are used, and how many may be."""
        return self._swaps.budget

    def resolve(self, name: str) -> str:
        """The name that a name or alias means; whether it is loaded is another question."""
        return self.serving.resolve(name)

    def status(self, name: str) -> DatastoreStatus:
        """Raises DatastoreNotFound: the name is not loaded."""
        return self._table.status(name)

    def statuses(self) -> list[DatastoreStatus]:
        """All loaded names, sorted."""
        return self._table.statuses()

    def home(self, name: str) -> tuple[Path, str]:
        """The root, and the name that a loaded name or alias means. Raises DatastoreNotFound: not loaded."""
        meant = self.status(name).name
        assert self.root is not None, "a datastore is loaded without a root. This is a bug."
        return self.root, meant

    def lease(self, name: str, param: str | None = None) -> Lease:
        """Pin what the name means now.

        Args:   param: the request's field that names it, if it is one.
        Raises: DatastoreNotFound: not loaded, or being unloaded.
        """
        return self._table.lease(name, param=param)

    def pin(self, snapshot: Snapshot) -> Lease | None:
        """A lease of its own on a snapshot, for whoever wants to look at what a request has just searched.

        Returns: None where it would hold up a swap or an unload: what the snapshot is of serves no more.
        """
        return self._table.pin(snapshot)

    # -- what a name means ---------------------------------------------------------------------------------------------

    def load(
        self, name: str, version: str | None = None, *, labels: Labels = AS_THEY_ARE, report: StageProgress = silent
    ) -> Loaded:
        """Load a published version, or swap the name to it; a failure leaves everything as it was.

        Args:
            version: None for the one that CURRENT names; then the name follows it, where a `Watcher` looks.
            labels: aliases and default, which change with the name.
            report: gets the load's progress; may raise to end it.
        Raises:
            DatastoreNotFound: no such name or version under the root.
            DatastoreMismatch: built for another LM, or the running one's keys have drifted too far from the stored.
            DatastoreCorrupt: a file contradicts the manifest, or the self-test fails.
            DatastoreBudget: too many bytes.
            DatastoreBusy: another load or unload of the name is under way.
            InvalidParameter, DatastoreConflict: an alias cannot be one.
            ShuttingDown: the registry was closed meanwhile.
            Overloaded, EngineFailure: no keys can be had to compare with a version's at its first load.
        """
        name = self._check_name(name)
        with self._turn(name):
            if labels.aliases is not None:
                check_aliases(labels.aliases, {*self.serving.names, *self.published(), name})
            return self._load(name, version, labels, report)

    def roll_back(self, name: str, *, report: StageProgress = silent) -> Loaded:
        """Swap a name to the version that served before; it stays there until it is loaded anew.

        Raises:
            DatastoreNotFound: not loaded, or the version is gone.
            DatastoreConflict: no other version has served.
            DatastoreMismatch, DatastoreCorrupt, DatastoreBudget, DatastoreBusy, ShuttingDown: as `load`.
        """
        name = self._check_name(name)
        with self._turn(name):
            return self._load(name, self.serving.previous_of(name), AS_THEY_ARE, report)

    def unload(self, name: str, timeout_s: float) -> None:
        """Take the name away, wait until its leases have ended, close it. Its aliases mean it again once it is loaded.

        Raises:
            DatastoreNotFound: not loaded.
            DatastoreBusy: leases remain after ``timeout_s``, or another load or unload is under way; the name serves
                again.
        """
        name = self.resolve(name)
        with self._turn(name):
            self._swaps.unload(name, timeout_s)
        logger.info("datastore unloaded name=%s", name)

    @contextmanager
    def rewriting(self, name: str) -> Iterator[Reload]:
        """Nobody else loads or unloads the name, or removes versions of it, in the block.

        Yields: what loads a version of the name, None for the current one, as `load` does.
        Raises: DatastoreBusy: somebody does.
        """
        name = self._check_name(name)
        with self._turn(name):
            yield lambda version: self._load(name, version, AS_THEY_ARE, silent)

    def relabel(self, serving: Serving) -> None:
        """Replace aliases and default, for a server that starts."""
        self._swaps.relabel(lambda _: serving)

    def replaced(self, name: str, versions: Mapping[str, str | None]) -> None:
        """Versions of a name were written anew under other numbers: a rollback or a restart goes to those.

        Args:     versions: old → new, or None where nothing was left to write.
        """
        self._swaps.relabel(lambda serving: serving.with_replaced(serving.resolve(name), versions))

    # -- what a name has learned ---------------------------------------------------------------------------------------

    @contextmanager
    def change(self, name: str, wait_s: float = CHANGE_WAIT_S) -> Iterator[Change]:
        """Learn or delete in the block; at its end, however it ends, new requests see what was done.

        Loads and swaps of the name go on meanwhile.

        Raises:
            DatastoreNotFound: not loaded, or being unloaded.
            DatastoreBusy: another change still runs after ``wait_s``.
        """
        name = self.resolve(name)
        with self._changes.take(name, wait_s):
            lease = self._table.lease(name)
            try:
                yield Change(name, self._swaps.livings.get(name), lease, self.budget)
            finally:
                self._swaps.show(name)
                lease.release()

    def refresh(self, name: str) -> bool:
        """Show what another process has learned or deleted; whether there was anything.

        Raises:
            DatastoreNotFound, DatastoreBusy: as `change`; nobody is waited for.
            DatastoreCorrupt, DatastoreMismatch: the ledger is damaged; what is served stays as it was.
        """
        with self.change(name, wait_s=0.0) as change:
            return change.living.refresh()

    def close(self) -> None:
        """Close everything that no lease holds; the rest closes with its last lease. A load under way fails."""
        self._swaps.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        try:
            with self._swaps.turns.take(name):
                yield
        finally:
            self._swaps.end_turn(name)

    def _check_name(self, name: str) -> str:
        if self.root is None:
            raise DatastoreNotFound(f"datastore {name!r} cannot be loaded: the server was started without --datastores")
        return layout.check_name(self.resolve(name))

    def _load(self, name: str, version: str | None, labels: Labels, report: StageProgress) -> Loaded:
        started = time.monotonic()
        try:
            status, swapped = self._swaps.load(name, version, labels, self._unless_closing(report))
        except KnnlmError as error:
            self.metrics.count_refused(name if name in self.serving.names else "", error.code)
            raise
        seconds = time.monotonic() - started
        self.metrics.count_load(name, seconds, swapped=swapped)
        datastore = status.datastore
        logger.info(
            "datastore loaded name=%s version=%s generation=%d revision=%d entries=%d seconds=%.3f",
            name, datastore.version, status.generation, datastore.revision, datastore.entries, seconds,
        )  # fmt: skip
        report(Stage.SWAP, 1, 1)
        return Loaded(status, created=not swapped)

    def _unless_closing(self, report: StageProgress) -> StageProgress:
        def checked(stage: str, done: int, total: int) -> None:
            self._swaps.require_open()
            report(stage, done, total)

        return checked
