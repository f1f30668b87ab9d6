"""A name while it is served: its ledger, and what that means for each version that is open.

add       segment and ledger on the disk  →  snapshots of open versions that begin from now on see it
delete    ledger on the disk              →  gone from every snapshot of every open version, also from older ones
refresh   the same, for what another process has written
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from knnlm_core.datastore import layout
from knnlm_core.datastore.entries import Section
from knnlm_core.datastore.ledger import LedgerState, SegmentRecord, ledger_lock, read_ledger
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import NewDocument, Segment, learn, open_segment
from knnlm_core.datastore.snapshot import Snapshot
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

    def hide(self, section: Section, document_id: str) -> None:
        first, stop = section.documents.entries_of(document_id)
        entries = EntryRange(first + section.first_entry, stop + section.first_entry)
        if section.first_entry:
            self.tail.hide(entries)
        else:
            for part in self.datastore._parts():
                part.shard.hide(
                    max(entries.first - part.first_entry, 0), min(entries.stop - part.first_entry, part.shard.entries)
                )

    @property
    def sections(self) -> Sequence[Section]:
        return (*self.datastore._sections(), *self.tail.sections)


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

    @classmethod
    def open(cls, root: Path, name: str) -> Self:
        """The same as the constructor."""
        return cls(root, name)

    @property
    def state(self) -> LedgerState:
        """As of the last operation or refresh."""
        return self._state

    @property
    def num_bytes(self) -> int:
        """Memory that learned keys take."""
        with self._lock:
            return sum(version.tail.num_bytes for version in self._open.values())

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
            self._apply(read_ledger(self._root, self.name))
            if self._state.segments == before.segments:
                raise
            return self._attach(datastore)

    def detach(self, datastore: Datastore) -> None:
        """Forget an open version that is about to be closed."""
        with self._lock:
            self._open.pop(datastore, None)

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
            DocumentExists: naming the first id that is there already.
            InvalidParameter: the documents cannot be stored: no id, twice the same, keys beyond float16.
            DatastoreBusy, DatastoreConflict, DatastoreReadOnly: see `ledger_lock`.
        """
        with ledger_lock(self._root, self.name) as writer:
            self._apply(writer.state)
            if not replace:
                for new in documents:
                    if self.snapshot(into.datastore).has_document(new.document.id):
                        raise document_exists(new.document.id, self.name)
            manifest = into.manifest
            learn(writer, manifest.lm, manifest.context, documents, actor=actor)
            self._apply(writer.state)
            return writer.state

    def delete(self, document_ids: Sequence[str], *, actor: str | None = None) -> LedgerState:
        """Delete documents from every version, whichever is open; when this returns no search finds them.

        Raises:
            DocumentNotFound: naming the first id that no open version has.
            DatastoreBusy, DatastoreConflict, DatastoreReadOnly: see `ledger_lock`.
        """
        with ledger_lock(self._root, self.name) as writer:
            self._apply(writer.state)
            with self._lock:
                snapshots = [version.snapshot for version in self._open.values()]
            for document_id in document_ids:
                if not any(snapshot.has_document(document_id) for snapshot in snapshots):
                    raise DocumentNotFound(
                        f"no document {document_id[:200]!r} in datastore {self.name!r}", param="document"
                    )
            writer.delete(document_ids, actor=actor)
            self._apply(writer.state)
            return writer.state

    def refresh(self) -> bool:
        """Read the ledger again if another process has changed it; whether it did.

        Raises: DatastoreCorrupt, DatastoreMismatch: it is damaged now; what is served stays as it was.
        """
        file = self._stat()
        if file == self._file:
            return False
        before = self._state
        state = read_ledger(self._root, self.name)
        try:
            self._apply(state)
        except DatastoreCorrupt:
            again = read_ledger(self._root, self.name)
            if again.segments == state.segments:  # nobody has dropped one meanwhile
                raise
            self._apply(again)
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

    def _attach(self, datastore: Datastore) -> Snapshot:
        with self._lock:
            version = _OpenVersion(datastore)
            beside = [r for r in self._state.segments if r.revision > datastore.manifest.revision]
            segments = self._read(beside, [datastore])
            self._show(version, segments, {*self._state.learned, *self._state.deleted})
            self._open[datastore] = version
            return version.snapshot

    def _apply(self, state: LedgerState) -> None:
        """Bring every open version to a state of the ledger, or none if that fails."""
        with self._lock:
            before = self._state
            if state.revision < before.revision:
                raise DatastoreCorrupt(
                    f"the ledger of {self.name!r} went back from revision {before.revision} to {state.revision}"
                )
            segments = self._read([r for r in state.segments if r.revision > before.revision], self._open)
            self._state = state
            touched = [
                document_id
                for revisions in (state.learned, state.deleted)
                for document_id, revision in revisions.items()
                if revision > before.revision
            ]
            for version in self._open.values():
                self._show(version, segments, touched)

    def _read(self, records: Iterable[SegmentRecord], beside: Iterable[Datastore]) -> list[Segment]:
        segments = [open_segment(self._root, self.name, record, checksums=True) for record in records]
        for datastore in beside:
            for segment in segments:
                segment.require_fits(datastore.manifest.lm.identity())
        return segments

    def _show(self, version: _OpenVersion, segments: Iterable[Segment], touched: Iterable[str]) -> None:
        """Make learned documents visible beside a version, and hide what the ledger says is dead."""
        for segment in segments:
            if segment.revision > version.datastore.manifest.revision:  # else the version holds it already
                version.tail.append(segment)
        self._hide(version, touched)
        tail = version.tail
        version.snapshot = Snapshot(
            version.datastore, (tail.parts, tail.sections), self._state.revision, lambda: self._state
        )

    def _hide(self, version: _OpenVersion, touched: Iterable[str]) -> None:
        for document_id in touched:
            killed_before = self._state.killed_before(document_id)
            for section in version.sections:
                if killed_before > section.revision and document_id in section.documents:
                    version.hide(section, document_id)
