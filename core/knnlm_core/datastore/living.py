"""A name while it is served: its ledger, and what that means for each version that is open.

add       segment and ledger on the disk  →  snapshots of open versions that begin from now on see it
delete    ledger on the disk              →  gone from every snapshot of every open version, also from older ones
refresh   the same, for what another process has written
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.documents import read_ids
from knnlm_core.datastore.entries import Section
from knnlm_core.datastore.ledger import LedgerState, ledger_lock, read_ledger
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import NewDocument, Segment, learn, open_segment
from knnlm_core.datastore.snapshot import Counts, Snapshot
from knnlm_core.datastore.tail import Tail
from knnlm_core.errors import DatastoreCorrupt, DocumentExists, DocumentNotFound
from knnlm_core.types import EntryRange

logger = logging.getLogger(__name__)


def document_exists(document_id: str, name: str) -> DocumentExists:
    """The error of learning what is there."""
    return DocumentExists(
        f"document {document_id[:200]!r} is in datastore {name!r} already; `update` replaces it", param="documents"
    )


class _OpenVersion:
    """A version that is served, with what was learned beside it."""

    def __init__(self, datastore: Datastore) -> None:
        self.datastore = datastore
        self.tail = Tail(datastore.entries)
        self.snapshot: Snapshot
        self.num_documents = datastore.manifest.documents.count  # without dead ones
        self.num_learned = 0  # of them, those of the tail
        self._dead: set[tuple[int, str]] = set()  # revision and id of every dead copy

    @property
    def sections(self) -> Sequence[Section]:
        """Of the version and of the tail."""
        return (*self.datastore._sections(), *self.tail.sections)

    def append(self, segment: Segment) -> None:
        """Show what a segment holds."""
        self.tail.append(segment)
        self.num_documents += len(segment.documents)
        self.num_learned += len(segment.documents)

    def hide(self, section: Section, document_id: str) -> None:
        """Hide a dead copy of a document; hiding it again does nothing."""
        if (copy := (section.revision, document_id)) in self._dead:
            return
        self._dead.add(copy)
        self.num_documents -= 1
        first, stop = section.documents.entries_of(document_id)
        entries = EntryRange(first + section.first_entry, stop + section.first_entry)
        if section.first_entry:
            self.num_learned -= 1
            self.tail.hide(entries)
            return
        for part in self.datastore._parts():
            first, stop = entries.first - part.first_entry, entries.stop - part.first_entry
            part.shard.hide(max(first, 0), min(stop, part.shard.entries))


class LivingName:
    """What a name has learned and deleted, kept in step with every open version. Thread-safe.

    Raises: DatastoreCorrupt, DatastoreMismatch: its ledger is damaged or of another format.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self.name = name
        self._lock = threading.Lock()
        self._open: dict[Datastore, _OpenVersion] = {}
        self._file = self._stat()
        self._state = read_ledger(root, name)
        self._num_bytes = 0

    @property
    def state(self) -> LedgerState:
        """As of the last operation or refresh."""
        return self._state

    @property
    def num_bytes(self) -> int:
        """Memory that learned keys take; waits for nobody."""
        return self._num_bytes

    def snapshot(self, datastore: Datastore) -> Snapshot:
        """What a request that begins now sees of an open version.

        Raises: DatastoreCorrupt, DatastoreMismatch: at a version's first call, where a segment is damaged or was made
            with another language model.
        """
        with self._lock:
            if (version := self._open.get(datastore)) is not None:
                return version.snapshot
        try:
            return self._attach(datastore)
        except DatastoreCorrupt:
            # Another process may have dropped a segment since the ledger was read.
            before = self._state
            self._reread()
            if self._state.segments == before.segments:
                raise
            return self._attach(datastore)

    def detach(self, datastore: Datastore) -> None:
        """Forget an open version that is about to be closed."""
        with self._lock:
            self._open.pop(datastore, None)
            self._count()

    def add(
        self, documents: Sequence[NewDocument], into: Snapshot, *, replace: bool = False, actor: str | None = None
    ) -> LedgerState:
        """Learn documents; when this returns they are on the disk and in every snapshot taken from now on.

        Args:
            documents: with keys made by the LM of ``into``.
            into: of the version that serves, whose LM, windows and documents count.
            replace: an older copy of a document is deleted; without it, an id that is there is refused.
            actor: for the audit log.
        Raises:
            DocumentExists: naming the first id that an open version shows already.
            InvalidParameter: no document, or two of the same id.
            BuildError: a key is not finite or exceeds float16.
            DatastoreBusy, DatastoreConflict, DatastoreReadOnly: see `ledger_lock`.
        """
        with ledger_lock(self._root, self.name) as writer:
            self._apply(writer.state)
            if not replace:
                shown = [into, *self._snapshots()]
                for new in documents:
                    if any(snapshot.has_document(new.document.id) for snapshot in shown):
                        raise document_exists(new.document.id, self.name)
            manifest = into.manifest
            try:
                learn(writer, manifest.lm, manifest.context, documents, actor=actor)
            finally:  # what was committed counts, whatever happened after it
                self._apply(writer.state)
            return writer.state

    def delete(self, document_ids: Sequence[str], *, actor: str | None = None) -> LedgerState:
        """Delete documents from every version, open or not; when this returns no search finds them.

        Raises:
            DocumentNotFound: naming the first id that no published version has and that was never learned, or which is
                deleted already.
            DatastoreBusy, DatastoreConflict, DatastoreReadOnly: see `ledger_lock`.
        """
        with ledger_lock(self._root, self.name) as writer:
            self._apply(writer.state)
            alive = set(self.alive_among(document_ids))
            for document_id in document_ids:
                if document_id not in alive:
                    raise DocumentNotFound(
                        f"no document {document_id[:200]!r} in datastore {self.name!r}", param="document"
                    )
            try:
                writer.delete(document_ids, actor=actor)
            finally:
                self._apply(writer.state)
            return writer.state

    def alive_among(self, document_ids: Sequence[str]) -> list[str]:
        """Those that are not deleted, and that some version or segment holds."""
        published = _PublishedDocuments(self._root, self.name)
        return [
            document_id
            for document_id in document_ids
            if document_id in self._state.learned or self._holds(document_id, published)
        ]

    def refresh(self) -> bool:
        """Read the ledger again if another process has changed it; whether it did.

        Raises: DatastoreCorrupt, DatastoreMismatch: it is damaged now; what is served stays as it was.
        """
        file = self._stat()
        if file == self._file:
            return False
        before = self._state
        try:
            self._reread()
        except DatastoreCorrupt:  # or another process has dropped a segment meanwhile
            again = self._stat()
            if again == file:
                raise
            file = again
            self._reread()
        self._file = file
        return self._state.revision != before.revision

    def close(self) -> None:
        """Forget every open version."""
        with self._lock:
            self._open.clear()

    def _stat(self) -> tuple[int, ...] | None:
        try:
            status = os.stat(layout.name_folder(self._root, self.name) / layout.LEDGER)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _snapshots(self) -> list[Snapshot]:
        with self._lock:
            return [version.snapshot for version in self._open.values()]

    def _holds(self, document_id: str, published: _PublishedDocuments) -> bool:
        """Whether some version has a copy that lives."""
        if self._state.is_deleted(document_id):
            return False
        if any(snapshot.has_document(document_id) for snapshot in self._snapshots()):
            return True
        return document_id in published

    def _attach(self, datastore: Datastore) -> Snapshot:
        with self._lock:
            if (known := self._open.get(datastore)) is not None:  # another thread was faster
                return known.snapshot
            version = _OpenVersion(datastore)
            segments = self._read(self._state, datastore.manifest.revision, [datastore])
            self._show(version, segments, self._state.killed)
            self._open[datastore] = version
            self._count()
            return version.snapshot

    def _reread(self) -> None:
        # Under the lock: what this process commits meanwhile cannot be newer than what is read.
        with self._lock:
            self._change(read_ledger(self._root, self.name))

    def _apply(self, state: LedgerState) -> None:
        """Bring every open version to a state of the ledger, whose lock is held."""
        with self._lock:
            self._change(state)

    def _change(self, state: LedgerState) -> None:
        """Under the lock: all open versions, or none if that fails."""
        before = self._state
        if state.revision < before.revision:
            raise DatastoreCorrupt(
                f"the ledger of {self.name!r} went back from revision {before.revision} to {state.revision}"
            )
        segments = self._read(state, before.revision, self._open)
        self._state = state
        touched = [document_id for document_id, revision in state.killed.items() if revision > before.revision]
        for version in self._open.values():
            self._show(version, segments, touched)
        self._count()

    def _count(self) -> None:
        self._num_bytes = sum(version.tail.num_bytes for version in self._open.values())

    def _read(self, state: LedgerState, after: int, beside: Iterable[Datastore]) -> list[Segment]:
        """The segments after a revision that hold a document which lives, checked in full."""
        living = set(state.learned.values())
        records = [record for record in state.segments if record.revision > after and record.revision in living]
        segments = [open_segment(self._root, self.name, record, checksums=True) for record in records]
        for datastore in beside:
            for segment in segments:
                segment.require_fits(datastore.manifest.lm.identity())
        return segments

    def _show(self, version: _OpenVersion, segments: Iterable[Segment], touched: Collection[str]) -> None:
        """Make learned documents visible beside a version, and hide what the ledger says is dead."""
        for segment in segments:
            if segment.revision > version.datastore.manifest.revision:  # else the version holds it already
                version.append(segment)
        self._hide(version, touched)
        tail = version.tail
        version.snapshot = Snapshot(
            version.datastore,
            (tail.parts, tail.sections),
            Counts(version.num_documents, version.num_learned, len(self._state.deleted)),
            self._state.revision,
            lambda: self._state,
        )

    def _hide(self, version: _OpenVersion, touched: Collection[str]) -> None:
        for section in version.sections:
            ids = section.documents.ids() if len(section.documents) < len(touched) else touched
            for document_id in ids:
                dead = self._state.killed_before(document_id) > section.revision
                if dead and document_id in section.documents:
                    version.hide(section, document_id)


class _PublishedDocuments:
    """The ids in all published versions of a name, held-out ones included, read when first asked for."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self._name = name

    def __contains__(self, document_id: str) -> bool:
        return document_id in self._ids

    @cached_property
    def _ids(self) -> frozenset[str]:
        ids = set[str]()
        for version in layout.published_versions(self._root, self._name):
            folder = layout.version_folder(self._root, self._name, version)
            for table in (layout.DOCUMENTS, layout.HELD_OUT):
                try:
                    ids.update(read_ids(folder / table) if (folder / table).exists() else ())
                except DatastoreCorrupt as error:  # a damaged version must not keep others from being deleted from
                    logger.warning("documents not read name=%s version=%s %s", self._name, version, error.message)
        return frozenset(ids)
