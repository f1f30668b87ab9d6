"""The ledger of a name: the one commit point of learning and deleting, its lock, and the log of who did what.

Writers hold ``ledger.lock``; readers take no lock, since LEDGER is replaced whole:

    lock → read LEDGER → remove leftovers of a crash → write the segment → replace LEDGER → audit.jsonl → unlock
                                                                           ╰ from here on it has happened
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from knnlm_core.datastore import layout
from knnlm_core.datastore.ledger_file import (
    MAX_ID_CHARACTERS,
    MAX_LEDGER_BYTES,
    LedgerState,
    SegmentRecord,
    encode_ledger,
    read_ledger,
    segment_folders,
)
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.durable import sync_folder, try_lock, write_text
from knnlm_core.errors import (
    DatastoreBusy,
    DatastoreConflict,
    DatastoreError,
    DatastoreNotFound,
    DatastoreReadOnly,
    InvalidParameter,
)

__all__ = [
    "LedgerState",
    "LedgerWriter",
    "SegmentRecord",
    "append_audit",
    "check_document_ids",
    "ledger_lock",
    "read_ledger",
]

LOCK_TIMEOUT_S = 30.0
_POLL_S = 0.005
_ADD_LIMIT = MAX_LEDGER_BYTES * 3 // 4  # whatever was learned can still be deleted

Operation = Literal["add", "delete", "compact", "purge", "publish", "rollback"]


class LedgerWriter:
    """Changes the ledger of a name whose lock is held; made by `ledger_lock` alone.

    Attributes:
        state: as it is on the disk. After an error it may be the one before or after the change: lock again.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self._folder = layout.name_folder(root, name)
        self._locked = True
        self.state = read_ledger(root, name)
        # A version that came from elsewhere may be ahead: what is done from now on comes after it.
        revision = max(self.state.revision, _last_revision(root, name))
        # Segments and audit.jsonl testify that there was a ledger, so it has to come first.
        if revision > self.state.revision or not os.path.lexists(self._folder / layout.LEDGER):
            self.commit(replace(self.state, revision=revision))
        self.remove_leftovers()

    @property
    def next_revision(self) -> int:
        """That of the next add or delete."""
        return self.state.revision + 1

    def add(self, record: SegmentRecord, document_ids: Sequence[str], *, actor: str | None = None) -> LedgerState:
        """Commit a segment that `write_segment` has put on the disk; `segments.learn` does both.

        Raises: DatastoreConflict, DatastoreReadOnly: as `commit`, which here leaves room for deletions.
        """
        self.commit(self.state.after_add(record, document_ids), limit=_ADD_LIMIT)
        append_audit(self.root, self.name, "add", self.state.revision, document_ids, actor)
        return self.state

    def delete(self, document_ids: Sequence[str], *, actor: str | None = None) -> LedgerState:
        """Delete documents by id, whether or not a version or segment holds a copy of them.

        Raises:
            InvalidParameter: no id, the same id twice, or a string that cannot be an id.
            DatastoreConflict, DatastoreReadOnly: as `commit`.
        """
        check_document_ids(document_ids)
        self.commit(self.state.after_delete(document_ids))
        append_audit(self.root, self.name, "delete", self.state.revision, document_ids, actor)
        return self.state

    def commit(self, state: LedgerState, *, limit: int = MAX_LEDGER_BYTES) -> None:
        """Replace the ledger; when this returns the state is on the disk and every reader sees it.

        Raises:
            DatastoreConflict: it would be larger than the format allows; nothing was changed.
            DatastoreReadOnly: the folder cannot be written.
        """
        assert self._locked, f"the ledger of {self.name!r} is changed without its lock. This is a bug."
        if state.revision < self.state.revision:
            raise ValueError(f"`revision` must not go back from {self.state.revision}, got {state.revision}")
        text = encode_ledger(state)
        if (size := len(text.encode())) > limit:
            raise DatastoreConflict(
                f"the ledger of {self.name!r} must have at most {limit} bytes, it would have {size}; it has learned "
                "and deleted too many documents: build a datastore of another name from the current text"
            )
        with writing(self._folder):
            write_text(self._folder / layout.LEDGER, text)
        self.state = state

    def remove_leftovers(self) -> None:
        """Remove the folders of segments that the ledger does not list: of a crash, or of `without_segments`."""
        assert self._locked, f"segments of {self.name!r} are removed without its lock. This is a bug."
        listed = {f"{record.revision:016d}" for record in self.state.segments}
        with writing(self._folder):
            for path in segment_folders(self._folder):
                if path.name not in listed:
                    shutil.rmtree(path)

    def close(self) -> None:
        """Refuse later changes, which the lock would no longer protect."""
        self._locked = False


@contextmanager
def ledger_lock(root: Path, name: str, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[LedgerWriter]:
    """Hold a name's lock against every other thread and process, and change its ledger.

    Raises:
        InvalidParameter: the name cannot be one.
        DatastoreNotFound: no such name.
        DatastoreBusy: somebody else held the lock for ``timeout_s``.
        DatastoreReadOnly: the folder cannot be written.
        DatastoreCorrupt, DatastoreMismatch: as `read_ledger`; then nothing was changed.
    """
    folder = layout.name_folder(root, name)
    if not folder.is_dir():
        raise DatastoreNotFound(f"there is no datastore {name!r} under {root}")
    with _locked(folder / layout.LEDGER_LOCK, timeout_s):
        writer = LedgerWriter(root, name)
        try:
            yield writer
        finally:
            writer.close()


def append_audit(
    root: Path, name: str, operation: Operation, revision: int, documents: Sequence[str], actor: str | None
) -> None:
    """Append a line for people to audit.jsonl and put it on the disk; no state is ever read from it.

    Raises: as `ledger_lock`.
    """
    folder = layout.name_folder(root, name)
    if not os.path.lexists(folder / layout.LEDGER):
        with ledger_lock(root, name):
            pass  # makes an empty one, whose loss audit.jsonl would otherwise testify to
    content = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "revision": revision,
        "operation": operation,
        "documents": list(documents),
        "actor": actor,
    }
    # Names from the operating system may hold half a surrogate pair: it becomes a JSON escape.
    line = (json.dumps(content, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    with _locked(folder / layout.AUDIT, LOCK_TIMEOUT_S) as descriptor:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a crash tore the last line
            line = b"\n" + line
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
        if not size:
            sync_folder(folder)


def check_document_ids(document_ids: Sequence[str]) -> None:
    """Raises InvalidParameter: no id, the same id twice, or a string that cannot be an id."""
    if not document_ids:
        raise InvalidParameter("`documents` must hold at least one id, got none", param="documents")
    commonest, times = Counter(document_ids).most_common(1)[0]
    if times > 1:
        raise InvalidParameter(
            f"`documents` must hold each id once, got {commonest[:100]!r} {times} times", param="documents"
        )
    for document_id in document_ids:
        if not 1 <= len(document_id) <= MAX_ID_CHARACTERS:
            raise InvalidParameter(
                f"`documents` must hold ids of 1 to {MAX_ID_CHARACTERS} characters, got one of {len(document_id)}",
                param="documents",
            )
        try:
            document_id.encode()
        except UnicodeEncodeError:
            raise InvalidParameter(
                f"`documents` must hold ids of whole characters, got {document_id[:100]!r}", param="documents"
            ) from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises DatastoreReadOnly: what the block does to the folder is not permitted."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise DatastoreReadOnly(f"{folder} cannot be written: {error.strerror}") from error
        raise


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[int]:
    """The descriptor of a file, made if absent and open for appending, that nobody else holds under this lock."""
    with writing(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + timeout_s
        while not try_lock(descriptor):
            if time.monotonic() >= deadline:
                raise DatastoreBusy(
                    f"another change of {path.parent.name!r} is under way: {path} was locked for {timeout_s:g} s"
                )
            time.sleep(_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)  # and with it the lock


def _last_revision(root: Path, name: str) -> int:
    """The highest revision that a published version has folded in; of those that can be read."""
    revisions = [0]
    for version in layout.published_versions(root, name):
        with suppress(DatastoreError):
            revisions.append(Manifest.read(layout.version_folder(root, name, version) / layout.MANIFEST).revision)
    return max(revisions)
