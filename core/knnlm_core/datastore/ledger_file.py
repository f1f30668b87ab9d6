"""What the file LEDGER says: every document that was learned or deleted while serving, and the segments on disk."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from knnlm_core.datastore import layout
from knnlm_core.datastore.manifest import (
    FORMAT_VERSION,
    Count,
    Positive,
    Sha256,
    read_json,
    require_format,
    validate,
)
from knnlm_core.datastore.sealed import SEAL, canonical
from knnlm_core.errors import DatastoreCorrupt, DatastoreNotFound

MAX_LEDGER_BYTES = 16 * 1024 * 1024  # some 300,000 documents; parsed, the worst JSON takes fifty times its size
MAX_REVISION = 10**16 - 1  # a segment's folder has 16 digits
MAX_ID_CHARACTERS = 4096

Revision = Annotated[int, Field(strict=True, ge=1, le=MAX_REVISION)]


class SegmentRecord(NamedTuple):
    """What the ledger says about a segment."""

    revision: Revision
    entries: Count
    documents: Positive
    sha256: Sha256  # of its segment.json


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What a name has learned and deleted; the default is that of a name which never did.

    Every document that was ever learned or deleted is in one of the two maps, by its last operation, and stays there:
    a version built from old text must not bring an old copy back. A segment with a revision that no value of
    ``learned`` has holds no document that is alive.

    Attributes:
        revision: of the last operation; 0 before the first.
        segments: those on disk, in ascending order of revision.
        learned: id → revision at which it was learned, for the last time.
        deleted: id → revision at which it was deleted, for the last time and not learned since.
        killed: both in one: id → revision before which every copy of the document is dead.
    Raises: ValueError: these contradict each other.
    """

    revision: int = 0
    segments: tuple[SegmentRecord, ...] = ()
    learned: Mapping[str, int] = field(default_factory=dict)
    deleted: Mapping[str, int] = field(default_factory=dict)
    killed: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, revisions in (("learned", self.learned), ("deleted", self.deleted)):
            if revisions and not 1 <= min(revisions.values()) <= max(revisions.values()) <= self.revision:
                raise ValueError(
                    f"{name} must have revisions in 1 … {self.revision}, it has "
                    f"{min(revisions.values())} … {max(revisions.values())}"
                )
            object.__setattr__(self, name, MappingProxyType(dict(revisions)))
        if both := self.learned.keys() & self.deleted.keys():
            raise ValueError(f"a document must be learned or deleted, {min(both)[:100]!r} is both")
        object.__setattr__(self, "killed", MappingProxyType({**self.learned, **self.deleted}))
        before = 0
        for record in self.segments:
            if not before < record.revision <= self.revision:
                raise ValueError(
                    f"segments must ascend within 1 … {self.revision}, revision {record.revision} follows {before}"
                )
            before = record.revision

    def killed_before(self, document_id: str) -> int:
        """The revision before which every copy of the document is dead: that of its last operation, 0 without one."""
        return self.killed.get(document_id, 0)

    def is_deleted(self, document_id: str) -> bool:
        """Whether the last operation on the document deleted it, so that no copy made until now is alive."""
        return document_id in self.deleted

    def after_add(self, record: SegmentRecord, document_ids: Iterable[str]) -> LedgerState:
        """The state in which a new segment taught these documents. Raises ValueError: it is not the next revision."""
        if record.revision != self.revision + 1:
            raise ValueError(f"the segment must have revision {self.revision + 1}, it has {record.revision}")
        ids = dict.fromkeys(document_ids, record.revision)
        deleted = {known: revision for known, revision in self.deleted.items() if known not in ids}
        return LedgerState(record.revision, (*self.segments, record), {**self.learned, **ids}, deleted)

    def after_delete(self, document_ids: Iterable[str]) -> LedgerState:
        """The state in which these documents are deleted, whichever version or segment holds them."""
        ids = dict.fromkeys(document_ids, self.revision + 1)
        learned = {known: revision for known, revision in self.learned.items() if known not in ids}
        return LedgerState(self.revision + 1, self.segments, learned, {**self.deleted, **ids})

    def without_segments(self, revisions: Iterable[int]) -> LedgerState:
        """The state without some segments, of the same revision.

        What only they taught is no longer known as learned: the versions that hold it speak for themselves. What is
        deleted stays so.
        """
        gone = set(revisions)
        segments = tuple(record for record in self.segments if record.revision not in gone)
        learned = {document_id: revision for document_id, revision in self.learned.items() if revision not in gone}
        return replace(self, segments=segments, learned=learned)


def _check_revisions(given: object) -> dict[str, int]:
    # By hand, since pydantic would report every bad one of millions; `LedgerState` checks the numbers' range.
    if not isinstance(given, dict):
        raise ValueError("must be an object of revisions by document id")
    for document_id, revision in given.items():
        if not 1 <= len(document_id) <= MAX_ID_CHARACTERS:
            raise ValueError(f"ids must have 1 to {MAX_ID_CHARACTERS} characters, one has {len(document_id)}")
        if type(revision) is not int:
            raise ValueError(f"{document_id[:100]!r} must have an integer, it has {str(revision)[:100]!r}")
    return given


_Revisions = Annotated[dict[str, int], PlainValidator(_check_revisions)]


class _LedgerFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1]
    revision: Annotated[int, Field(strict=True, ge=0, le=MAX_REVISION)]
    segments: Annotated[tuple[SegmentRecord, ...], Field(fail_fast=True)]
    learned: _Revisions
    deleted: _Revisions
    sha256: Sha256


def read_ledger(root: Path, name: str) -> LedgerState:
    """The state of a name's ledger; that of a name without one is empty.

    Raises:
        InvalidParameter: the name cannot be one.
        DatastoreMismatch: of another format version.
        DatastoreCorrupt: LEDGER is not whole, contradicts itself, or is missing although something was learned.
    """
    folder = layout.name_folder(root, name)
    path = folder / layout.LEDGER
    try:
        return _read(path)
    except DatastoreNotFound:
        if (trace := _trace(folder)) is None:
            return LedgerState()
    # The first writer may have made both meanwhile; LEDGER comes before all else and never goes away.
    try:
        return _read(path)
    except DatastoreNotFound:
        raise DatastoreCorrupt(f"{path} is missing, but {trace} shows that there was one") from None


def encode_ledger(state: LedgerState) -> str:
    """The content of LEDGER; the same state gives the same text."""
    content = _content(state)
    return canonical({**content, SEAL: _digest(content)}).decode() + "\n"


def segment_folders(folder: Path) -> list[Path]:
    """What looks like a segment under a name's folder, finished or not, whether or not LEDGER lists it."""
    try:
        entries = list((folder / layout.TAIL).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for path in entries if re.fullmatch(r"[0-9]{16}(\.tmp)?", path.name)]


def _read(path: Path) -> LedgerState:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise DatastoreNotFound(f"there is no {path}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DatastoreCorrupt(f"{path} must be a regular file; links and devices are refused")
    if status.st_size > MAX_LEDGER_BYTES:
        raise DatastoreCorrupt(f"{path} must have at most {MAX_LEDGER_BYTES} bytes, it has {status.st_size}")
    content = read_json(path, MAX_LEDGER_BYTES)
    require_format(content, path, path.parent.name)
    file = validate(_LedgerFile, content, path)
    try:
        state = LedgerState(file.revision, file.segments, file.learned, file.deleted)
    except ValueError as error:
        raise DatastoreCorrupt(f"{path}: {error}") from None
    if (needed := _digest(_content(state))) != file.sha256:
        raise DatastoreCorrupt(f"{path} has the sha256 {file.sha256}, its content needs {needed}")
    return state


def _trace(folder: Path) -> Path | None:
    """What only a name with a ledger has."""
    if os.path.lexists(folder / layout.AUDIT):
        return folder / layout.AUDIT
    return next((path for path in segment_folders(folder) if not path.suffix), None)


def _content(state: LedgerState) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "revision": state.revision,
        "segments": [record._asdict() for record in state.segments],
        "learned": dict(state.learned),
        "deleted": dict(state.deleted),
    }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()
