"""Making a name forget documents for good: no file of it holds their text, their keys or their tokens any more.

    delete in the ledger → write every version that holds a copy anew → CURRENT and HISTORY → the tail → prove → remove

Whatever interrupts this, the documents are deleted from the first step on, and the next run completes it: until the
proof has succeeded nothing is removed that tells what to look for.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.carried import copy_calibration, keeps_held_out
from knnlm_core.datastore.copies import Source
from knnlm_core.datastore.history import revise_history
from knnlm_core.datastore.ledger import append_audit, check_document_ids, ledger_lock
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.purge_proof import Own, Proof, own_traces, prove
from knnlm_core.datastore.purge_tail import rewrite_tail
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.removal import orphaned_calibrations, remove_calibration, remove_version
from knnlm_core.datastore.rewrite import Rewriting, rewrite
from knnlm_core.datastore.segments import open_segment
from knnlm_core.datastore.stages import StageProgress, silent
from knnlm_core.datastore.traces import Gathering, Traces
from knnlm_core.errors import DatastoreConflict, DocumentNotFound, VerifyFailed


@dataclass(frozen=True)
class PurgeReport:
    """What was done, and what every file of the name was searched for.

    Attributes:
        documents: ids; they stay in LEDGER and audit.jsonl, so that no rebuild brings the documents back.
        revision: of the ledger afterwards.
        versions: those that held copies → those that replace them; None where nothing else was left in one.
        segments: the same, by revision.
        proof: what was searched for in which file; documents that stay although their text is that of a purged one.
        sought: how many distinct texts, keys and runs of tokens were sought. 0 keys: no copy was left to compare with,
            since an earlier run had been through its proof already.
        removed: folders, from the name's.
    """

    documents: tuple[str, ...]
    revision: int
    versions: dict[str, str | None]
    segments: dict[int, int | None]
    proof: Proof
    sought: dict[str, int]
    removed: tuple[str, ...]


def purge(
    root: Path, name: str, document_ids: Sequence[str], *, progress: StageProgress = silent, actor: str | None = None
) -> PurgeReport:
    """Forget documents for good. Unfinished builds of the name are discarded: nobody knows what they hold.

    A server that has an old version open holds what it has mapped until it changes to another one.

    Raises:
        InvalidParameter: no id, or the same twice.
        DocumentNotFound: an id that no version, no segment and no deletion has.
        DatastoreConflict: the current version would be left without entries; nothing has changed.
        DatastoreBusy, DatastoreReadOnly: see `lock_versions` and `ledger_lock`.
        DatastoreCorrupt: a file is damaged.
        VerifyFailed: something is left, and where; the documents are deleted, and nothing has been removed.
    """
    check_document_ids(document_ids)
    with lock_versions(root, name) as home:
        return _Purge(root, name, home, frozenset(document_ids), progress, actor).run()


@dataclass
class _Purge:
    root: Path
    name: str
    home: Path
    ids: frozenset[str]
    progress: StageProgress
    actor: str | None
    own: dict[Path, Own] = field(default_factory=dict)

    def run(self) -> PurgeReport:
        holders = self._holders()
        traces = self._gather(holders)
        self._check(holders)
        self._delete()
        for leftover in self.home.glob("*.tmp"):
            shutil.rmtree(leftover)
        versions = {version: self._rewritten(version, traces) for version, entries in holders.items() if entries}
        versions |= {version: None for version, entries in holders.items() if not entries}
        self._retarget(versions)
        with ledger_lock(self.root, self.name) as writer:
            segments = rewrite_tail(writer, self.ids, lambda source, keep: own_traces(source, keep, traces), self.own)
            revision = writer.state.revision
        proof = self._prove(traces, versions, segments)
        removed = self._remove(versions, segments)
        append_audit(self.root, self.name, "purge", revision, sorted(self.ids), self.actor)
        sought = {
            "texts": len(traces.texts),
            "keys": sum(map(len, traces.keys.values())),
            "runs": sum(map(len, traces.runs.values())),
        }
        return PurgeReport(tuple(sorted(self.ids)), revision, versions, segments, proof, sought, removed)
