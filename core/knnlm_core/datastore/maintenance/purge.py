"""Making a name forget documents for good: no file of it holds their text, their keys or their tokens any more.

    delete in the ledger → write every version that holds a copy anew → CURRENT and HISTORY → the tail → prove → remove

Whatever interrupts this, the documents are deleted from the first step on, and the next run completes it: until the
proof has succeeded nothing is removed that tells what to look for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import calibrations_of
from knnlm_core.datastore.history import revise_history
from knnlm_core.datastore.layout import Current
from knnlm_core.datastore.ledger import append_audit, check_document_ids, ledger_lock
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.maintenance.carried import copy_calibration
from knnlm_core.datastore.maintenance.copies import Keep, Source, entries_in
from knnlm_core.datastore.maintenance.purge_proof import Own, Proof, own_traces, prove
from knnlm_core.datastore.maintenance.purge_tail import rewrite_tail
from knnlm_core.datastore.maintenance.removal import orphaned_calibrations, remove_calibration, remove_version
from knnlm_core.datastore.maintenance.rewrite import Rewriting, discard_leftover, rewrite
from knnlm_core.datastore.maintenance.stages import StageProgress, silent
from knnlm_core.datastore.maintenance.traces import Gathering, Traces
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import open_segment
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
    root: Path,
    name: str,
    document_ids: Sequence[str],
    *,
    progress: StageProgress = silent,
    actor: str | None = None,
    before_removal: Callable[[], None] = lambda: None,
) -> PurgeReport:
    """Forget documents for good. Unfinished builds of the name are discarded: nobody knows what they hold.

    A server that has an old version open holds what it has mapped until it changes to another one. A document that is
    learned again before the purge ends is purged too.

    Args:     before_removal: called when all is proven and nothing is removed yet, for whoever reads the tail.

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
        return _Purge(root, name, home, frozenset(document_ids), progress, actor, before_removal).run()


@dataclass
class _Purge:
    root: Path
    name: str
    home: Path
    ids: frozenset[str]
    progress: StageProgress
    actor: str | None
    before_removal: Callable[[], None]
    own: dict[Path, Own] = field(default_factory=dict)

    def run(self) -> PurgeReport:
        discard_leftover(self.root, self.name)
        holders, traces = self._holders()
        self._delete()
        for leftover in self.home.glob(f"*{layout.BUILDING_SUFFIX}"):
            if leftover.is_dir():  # a stray file is for the proof
                shutil.rmtree(leftover)
        versions: dict[str, str | None] = {}
        calibrations: dict[str, str] = {}
        for version in holders:
            versions[version] = self._rewritten(version, traces) if holders[version] else None
            calibrations |= self._copied_calibrations(version, versions[version])
        self._retarget(versions, calibrations)
        with ledger_lock(self.root, self.name) as writer:
            segments = rewrite_tail(writer, self.ids, partial(self._noted, traces))
            revision = writer.state.revision
        doomed = self._doomed(versions, segments)
        proof = prove(self.root, self.name, traces, self.own, doomed, self.progress)
        _require_nothing_left(self.name, proof)
        self.before_removal()
        self._remove(versions, segments)
        append_audit(self.root, self.name, "purge", revision, sorted(self.ids), self.actor)
        removed = tuple(sorted(folder.relative_to(self.home).as_posix() for folder in doomed))
        return PurgeReport(tuple(sorted(self.ids)), revision, versions, segments, proof, _sought(traces), removed)

    def _holders(self) -> tuple[dict[str, int], Traces]:
        """Versions that hold a copy → how many entries they have besides; and all that is known of the documents."""
        state = read_ledger(self.root, self.name)
        gathering, holders = Gathering(self.ids), dict[str, int]()
        known = {document_id for document_id in self.ids if document_id in state.killed}
        for version in layout.published_versions(self.root, self.name):
            with Datastore.open_folder(layout.version_folder(self.root, self.name, version)) as store:
                source = Source.of_version(store)
                held = {id_ for id_ in self.ids if id_ in source.table} | gathering.held_out_by(store)
                # Lists may have come from a version that held a copy, perhaps one that is gone: they are means of keys.
                inherited = store.manifest.parent_version is not None and store.manifest.index.is_trained
                if held or inherited:
                    holders[version] = entries_in(source.ranges(self._keep))
                if held:
                    gathering.add_source(source)
                    gathering.add_held_out(store)
                    known |= held
        for record in state.segments:
            with open_segment(self.root, self.name, record) as segment:
                gathering.add_source(Source.of_segment(segment))
        self._check(holders, known)
        return holders, gathering.traces()

    def _check(self, holders: Mapping[str, int], known: Collection[str]) -> None:
        if unknown := sorted(self.ids.difference(known)):
            raise DocumentNotFound(
                f"no version of {self.name!r} has a document {unknown[0][:200]!r}, and none was learned or deleted",
                param="documents",
            )
        current = layout.read_current(self.root, self.name).version
        if holders.get(current) == 0:
            raise DatastoreConflict(
                f"version {current}, which {self.name!r} means now, has no entry but those of the documents to be "
                "purged, and a version has at least one; remove the datastore instead"
            )

    def _delete(self) -> None:
        with ledger_lock(self.root, self.name) as writer:
            alive = sorted(document_id for document_id in self.ids if not writer.state.is_deleted(document_id))
            if alive:
                writer.delete(alive, actor=self.actor)

    def _keep(self, document_id: str, revision: int) -> bool:
        return document_id not in self.ids

    def _rewritten(self, version: str, traces: Traces) -> str:
        with Datastore.open_folder(layout.version_folder(self.root, self.name, version)) as store:
            rewriting = Rewriting(version, store.manifest.revision, self._keep, forget=True)
            new = rewrite(self.root, self.name, rewriting, progress=self.progress)
            self.own[self.home / new] = own_traces(Source.of_version(store), self._keep, traces)
        return new

    def _copied_calibrations(self, version: str, new: str | None) -> dict[str, str]:
        # From the oldest on: the newest of a version is the one that counts where nothing else says so.
        ids = calibrations_of(self.root, self.name, version) if new is not None else []
        return {id_: copy_calibration(self.root, self.name, id_, str(new), without=self.ids) for id_ in ids}

    def _retarget(self, versions: Mapping[str, str | None], calibrations: Mapping[str, str]) -> None:
        def revised(entry: Current) -> Current | None:
            new = versions.get(entry.version, entry.version)
            if new is None or new == entry.version:
                return None if new is None else entry
            return Current(new, calibrations.get(entry.calibration) if entry.calibration else None)

        now = layout.read_current(self.root, self.name)
        if (then := revised(now)) is None:
            raise DatastoreConflict(f"{self.name!r} was made to mean version {now.version} meanwhile; purge again")
        revise_history(self.root, self.name, revised)
        if then != now:
            layout.write_current(self.root, self.name, then)

    def _noted(self, traces: Traces, revision: int, source: Source, keep: Keep) -> None:
        self.own[layout.segment_folder(self.root, self.name, revision)] = own_traces(source, keep, traces)

    def _doomed(self, versions: Mapping[str, str | None], segments: Collection[int]) -> list[Path]:
        """What is to be removed once nothing is left elsewhere."""
        calibrations = orphaned_calibrations(self.root, self.name, frozenset(versions))
        folders = [layout.version_folder(self.root, self.name, version) for version in versions]
        folders += [layout.segment_folder(self.root, self.name, revision) for revision in segments]
        return folders + [layout.calibration_folder(self.root, self.name, calibration) for calibration in calibrations]

    def _remove(self, versions: Collection[str], segments: Collection[int]) -> None:
        for version in versions:
            remove_version(self.root, self.name, version)
        for calibration in orphaned_calibrations(self.root, self.name):
            remove_calibration(self.root, self.name, calibration)
        with ledger_lock(self.root, self.name) as writer:
            writer.commit(writer.state.without_segments(segments))
            writer.remove_leftovers()


def _require_nothing_left(name: str, proof: Proof) -> None:
    left = [search for search in proof.searches if search.left]
    if left:
        more = f", and in {len(left) - 1} more files" if len(left) > 1 else ""
        raise VerifyFailed(
            f"purging documents of {name!r} left {left[0].left} {left[0].sought} in {left[0].path}{more}; the "
            "documents are deleted, but their old versions are not removed yet, since they tell what to look for: "
            "remove the file if it is not the datastore's, and purge again"
        )


def _sought(traces: Traces) -> dict[str, int]:
    return {
        "texts": len(traces.texts),
        "keys": sum(map(len, traces.keys.values())),
        "runs of tokens": sum(map(len, traces.runs.values())),
    }
