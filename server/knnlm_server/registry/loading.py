"""From a published version to one that may serve: opened, fitting, affordable, whole, in memory, tested.

Nothing here knows what serves now, so a load that fails changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore.canaries import SelfTest, self_test
from knnlm_core.datastore.checksums import is_verified, remember_verified, verify_files
from knnlm_core.datastore.maintenance.stages import StageProgress, counted
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreCorrupt
from knnlm_core.retrieval import check_rules
from knnlm_core.types import LMIdentity
from knnlm_server.registry.budget import Budget
from knnlm_server.registry.progress import Stage
from knnlm_server.registry.warming import files_to_warm, warm

LATER_QUERIES = 8  # canaries asked of a version that has passed with all of them


class Prepared(NamedTuple):
    """A version that may serve; its bytes are taken from the budget."""

    datastore: Datastore
    self_test: SelfTest


class Loader:
    """Prepares versions under one root.

    Args:
        identity: of the running LM; a version that does not fit it is refused.
        verified: folder that remembers which versions were read in full and tested on this machine; None compares
            sizes only, and remembers in memory what was tested.
        numerics: of the running LM; None does not ask what a calibration was measured with.
    """

    def __init__(
        self,
        root: Path,
        identity: LMIdentity,
        budget: Budget,
        verified: Path | None,
        numerics: str | None = None,
    ) -> None:
        self._root = root
        self._identity = identity
        self._budget = budget
        self._verified = verified
        self._numerics = numerics
        self._tested: set[str] = set()  # digests of manifests

    def prepare(self, name: str, version: str | None, report: StageProgress) -> Prepared:
        """Open a version and do whatever can be done before it serves.

        Raises:
            DatastoreNotFound, DatastoreMismatch, DatastoreCorrupt: as `Datastore.open` and its checks.
            DatastoreBudget: it would be too much.
        """
        with _readable(name):
            report(Stage.OPEN, 0, 1)
            datastore = Datastore.open(self._root, name, version)
            taken = 0
            try:
                datastore.require_fits(self._identity)
                if datastore.calibration is not None and self._numerics is not None:
                    datastore.calibration.require_numerics(name, self._numerics)
                check_rules(datastore.calibration, name)
                self._budget.take(f"datastore {name!r} version {datastore.version}", datastore.num_bytes)
                taken = datastore.num_bytes
                report(Stage.OPEN, 1, 1)
                return Prepared(datastore, self._examine(datastore, report))
            except BaseException:
                datastore.close()
                self._budget.give_back(taken)
                raise

    def discard(self, datastore: Datastore) -> None:
        """Close a version that was prepared, and give its bytes back."""
        datastore.close()
        self._budget.give_back(datastore.num_bytes)

    def _examine(self, datastore: Datastore, report: StageProgress) -> SelfTest:
        folder, manifest = datastore.folder, datastore.manifest
        known = manifest.digest in self._tested
        if self._verified is not None:
            known = is_verified(folder, manifest, self._verified)
            if not known:
                verify_files(folder, manifest, counted(report, Stage.VERIFY, manifest.num_bytes))
        files = files_to_warm(manifest)
        warmed = counted(report, Stage.WARM, sum(manifest.files[file].bytes for file in files))
        for file in files:
            warm(folder / file, warmed)
        report(Stage.TEST, 0, 1)
        tested = self_test(datastore, queries=LATER_QUERIES if known else None)
        report(Stage.TEST, 1, 1)
        self._tested.add(manifest.digest)
        if self._verified is not None and not known:
            remember_verified(folder, manifest, self._verified)
        return tested


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatastoreCorrupt(f"datastore {name!r} cannot be read: {error}") from error
