"""Compaction: what was learned and deleted while serving becomes part of a new version."""

from __future__ import annotations

from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.ledger import append_audit
from knnlm_core.datastore.ledger_file import LedgerState, read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.maintenance.carried import copy_calibration
from knnlm_core.datastore.maintenance.copies import Source
from knnlm_core.datastore.maintenance.rewrite import Rewriting, discard_leftover, rewrite
from knnlm_core.datastore.maintenance.stages import StageProgress, silent
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreConflict


def compact(root: Path, name: str, *, progress: StageProgress = silent, actor: str | None = None) -> str:
    """Fold what was learned and deleted into a new version and make it current; returns its number.

    What happens to the ledger meanwhile is not lost: additions stay in the tail, deletions hold for the new version as
    for any other. The number of the current version is returned where there is nothing to fold.

    Raises:
        DatastoreNotFound: nothing of the name is published.
        DatastoreConflict: nothing would be left, or the name was made to mean another version meanwhile.
        DatastoreBusy, DatastoreReadOnly: see `lock_versions`.
        DatastoreCorrupt, DatastoreMismatch: a file is damaged, or a document was learned with another language model.
        VerifyFailed: the new version does not find its own keys.
    """
    with lock_versions(root, name):
        current = layout.read_current(root, name)
        discard_leftover(root, name)
        ledger = read_ledger(root, name)
        rewriting = _folding(root, name, current.version, ledger)
        if rewriting is None:
            return current.version
        new = rewrite(root, name, rewriting, progress=progress)
        if (now := layout.read_current(root, name)) != current:
            raise DatastoreConflict(
                f"{name!r} was made to mean version {now.version} while {current.version} was compacted; the result, "
                f"{new}, is published but not current"
            )
        calibration = current.calibration and copy_calibration(root, name, current.calibration, new)
        set_current(root, name, new, calibration)
        append_audit(root, name, "compact", ledger.revision, [], actor)
        return new


def _folding(root: Path, name: str, version: str, ledger: LedgerState) -> Rewriting | None:
    def keep(document_id: str, revision: int) -> bool:
        return ledger.killed_before(document_id) <= revision

    alive = set(ledger.learned.values())  # revisions of segments that hold a document which is alive
    with Datastore.open(root, name, version) as store:
        folded = store.manifest.revision
        segments = tuple(record for record in ledger.segments if folded < record.revision and record.revision in alive)
        if not segments and not Source.of_version(store).left_out(keep):
            return None
        return Rewriting(version, ledger.revision, keep, segments)
