"""Segments of the tail: documents learned by one request, in a folder that never changes once LEDGER lists it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import KeyArray, ValueColumns, map_keys, map_values
from knnlm_core.datastore.checksums import check_sizes, hash_file, record_files, verify_files
from knnlm_core.datastore.documents import Document, DocumentsWriter, DocumentTable
from knnlm_core.datastore.ledger import LedgerState, LedgerWriter, SegmentRecord, check_document_ids, writing
from knnlm_core.datastore.ledger_file import Revision
from knnlm_core.datastore.manifest import (
    ContextSection,
    Count,
    FileRecord,
    LMSection,
    read_json,
    require_format,
    validate,
)
from knnlm_core.datastore.writer import ShardWriter
from knnlm_core.durable import sync_folder, write_text
from knnlm_core.errors import (
    BuildError,
    DatastoreConflict,
    DatastoreCorrupt,
    DatastoreNotFound,
    InvalidParameter,
)
from knnlm_core.types import LMIdentity

MAX_SEGMENT_BYTES = 4 * 1024 * 1024  # of segment.json: some 50,000 documents


class NewDocument(NamedTuple):
    """A document to be learned and the n entries that it makes, perhaps none."""

    document: Document
    keys: Tensor | npt.NDArray[Any]  # (n, D), stored as float16
    values: Tensor | npt.NDArray[Any]  # (n,) token ids
    char_spans: Tensor | npt.NDArray[Any]  # (n, 2), where each value's text begins and ends in the document


class DocumentEntries(BaseModel):
    """How many entries a document made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(min_length=1)]
    entries: Count


class SegmentManifest(BaseModel):
    """What ``segment.json`` says; `docs/datastore-format.md` explains each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    revision: Revision
    lm: LMSection
    context: ContextSection
    entries: Count
    documents: Annotated[tuple[DocumentEntries, ...], Field(min_length=1, fail_fast=True)]
    files: Annotated[dict[str, FileRecord], Field(max_length=3)]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if len({document.id for document in self.documents}) != len(self.documents):
            raise ValueError("documents has the same id twice")
        if (made := sum(document.entries for document in self.documents)) != self.entries:
            raise ValueError(f"entries must be the sum over the documents ({made}), it is {self.entries}")
        needed = {layout.DOCUMENTS} | ({layout.KEYS, layout.VALUES} if self.entries else set())
        if self.files.keys() != needed:
            raise ValueError(f"files must be {', '.join(sorted(needed))}, they are {', '.join(sorted(self.files))}")
        return self

    @classmethod
    def read(cls, path: Path, name: str) -> SegmentManifest:
        """Read and check a ``segment.json``.

        Raises:
            DatastoreNotFound: no such file.
            DatastoreMismatch: of another format version.
            DatastoreCorrupt: too large, not JSON, or a field is missing, unknown or contradicts another.
        """
        content = read_json(path, MAX_SEGMENT_BYTES)
        require_format(content, path, name)
        return validate(cls, content, path)


class Segment:
    """An open segment. Nothing in it changes, so any number of threads may use it until `close`.

    Attributes:
        keys: (n, D) float16, mapped; ``columns`` likewise.
        documents: with entry ranges from 0 on, as if the segment stood alone.
    """

    def __init__(self, name: str, folder: Path, manifest: SegmentManifest) -> None:
        """Map a folder whose sizes have been checked; `open_segment` is the way in."""
        self.name = name
        self.folder = folder
        self.manifest = manifest
        self.documents = DocumentTable(
            folder / layout.DOCUMENTS,
            documents=len(manifest.documents),
            entries=manifest.entries,
            keep_open=False,  # a name may have very many segments
        )
        try:
            self._check_documents()
            self.keys, self.columns = self._map()
        except BaseException:
            self.close()
            raise

    @property
    def revision(self) -> int:
        """That of the request which taught it."""
        return self.manifest.revision

    @property
    def entries(self) -> int:
        """n."""
        return self.manifest.entries

    @property
    def dim(self) -> int:
        """D."""
        return self.manifest.lm.key_dim

    @property
    def num_bytes(self) -> int:
        """Size of all files but ``segment.json``."""
        return sum(record.bytes for record in self.manifest.files.values())

    def require_fits(self, identity: LMIdentity) -> None:
        """Raises DatastoreMismatch: naming the first field in which the running LM is not the one of the keys."""
        self.manifest.lm.require_fits(self.name, identity)

    def close(self) -> None:
        """Drop the texts that were read; mapped arrays live as long as they are used."""
        self.documents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_documents(self) -> None:
        listed = [document.id for document in self.manifest.documents]
        if (have := self.documents.ids()) != listed:
            other = next((id_ for id_, needed in zip(have, listed, strict=True) if id_ != needed))
            raise DatastoreCorrupt(f"{self.folder / layout.DOCUMENTS} has {other[:100]!r}, {layout.SEGMENT} has not")
        for document in self.manifest.documents:
            first, stop = self.documents.entries_of(document.id)
            if stop - first != document.entries:
                raise DatastoreCorrupt(
                    f"{self.folder / layout.DOCUMENTS} has {stop - first} entries of document {document.id[:100]!r}, "
                    f"{layout.SEGMENT} needs {document.entries}"
                )

    def _map(self) -> tuple[KeyArray, ValueColumns]:
        if not self.entries:
            return np.empty((0, self.dim), np.float16), ValueColumns(*np.empty((3, 0), np.int32))
        keys = map_keys(self.folder / layout.KEYS, self.dim, self.entries)
        columns = map_values(self.folder / layout.VALUES, self.entries)
        if columns.values.min() < 0 or columns.values.max() >= self.manifest.lm.vocab_size:
            raise DatastoreCorrupt(
                f"{self.folder / layout.VALUES}: values must be in 0 … {self.manifest.lm.vocab_size - 1}, "
                f"they are in {columns.values.min()} … {columns.values.max()}"
            )
        return keys, columns


def open_segment(root: Path, name: str, record: SegmentRecord, *, checksums: bool = False) -> Segment:
    """Open a segment that the ledger lists.

    Args:     checksums: also compare the sha256 of every file; sizes, and ``segment.json`` itself, are compared always.
    Raises:
        DatastoreMismatch: of another format version.
        DatastoreCorrupt: a file is missing, unknown, or contradicts ``segment.json``, or that contradicts the ledger.
    """
    folder = layout.segment_folder(root, name, record.revision)
    path = folder / layout.SEGMENT
    try:
        manifest = SegmentManifest.read(path, name)
    except DatastoreNotFound as error:
        raise DatastoreCorrupt(f"{path} is missing; {layout.LEDGER} lists it") from error
    have = SegmentRecord(manifest.revision, manifest.entries, len(manifest.documents), hash_file(path))
    for field, has, needs in zip(SegmentRecord._fields, have, record, strict=True):
        if has != needs:
            raise DatastoreCorrupt(f"{path}: {field} is {has}, {layout.LEDGER} needs {needs}")
    if checksums:
        verify_files(folder, manifest, manifest_file=layout.SEGMENT)
    else:
        check_sizes(folder, manifest, manifest_file=layout.SEGMENT)
    return Segment(name, folder, manifest)


def write_segment(
    root: Path, name: str, revision: int, lm: LMSection, context: ContextSection, documents: Sequence[NewDocument]
) -> SegmentRecord:
    """Put a segment on the disk, for `LedgerWriter.add` to commit; whoever calls this holds the name's lock.

    A segment in which no document made an entry has neither keys nor values.

    Raises:
        InvalidParameter: no document, too many, two of the same id, or a string that cannot be an id.
        BuildError: keys, values or spans do not fit each other, their types or the LM.
        DatastoreConflict: a segment of this revision is there already.
        DatastoreReadOnly: the folder cannot be written.
    """
    check_document_ids([new.document.id for new in documents])
    final = layout.segment_folder(root, name, revision)
    if os.path.lexists(final):
        raise DatastoreConflict(f"{final} exists already; a segment is never replaced")
    part = final.with_name(final.name + layout.BUILDING_SUFFIX)
    with writing(final.parent.parent):
        final.parent.mkdir(exist_ok=True)
        sync_folder(final.parent.parent)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            manifest = _write_files(part, revision, lm, context, documents)
            write_text(part / layout.SEGMENT, _encode(manifest))
            record = SegmentRecord(revision, manifest.entries, len(documents), hash_file(part / layout.SEGMENT))
            os.rename(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync_folder(final.parent)
    return record


def learn(
    writer: LedgerWriter,
    lm: LMSection,
    context: ContextSection,
    documents: Sequence[NewDocument],
    *,
    actor: str | None = None,
) -> LedgerState:
    """Write documents into a segment of the next revision and commit it. Older copies of them are dead from then on.

    Raises: as `write_segment` and `LedgerWriter.add`.
    """
    record = write_segment(writer.root, writer.name, writer.next_revision, lm, context, documents)
    return writer.add(record, [new.document.id for new in documents], actor=actor)


def _write_files(
    folder: Path, revision: int, lm: LMSection, context: ContextSection, documents: Sequence[NewDocument]
) -> SegmentManifest:
    made: list[DocumentEntries] = []
    with DocumentsWriter(folder / layout.DOCUMENTS) as table:
        for new in documents:
            table.add(new.document, len(new.values))
            made.append(DocumentEntries(id=new.document.id, entries=len(new.values)))
    if any(len(new.keys) or len(new.values) for new in documents):
        _write_entries(folder, lm, documents)
    return SegmentManifest(
        revision=revision,
        lm=lm,
        context=context,
        entries=table.entries,
        documents=tuple(made),
        files=record_files(folder),
    )


def _encode(manifest: SegmentManifest) -> str:
    text = manifest.model_dump_json() + "\n"
    if (size := len(text.encode())) > MAX_SEGMENT_BYTES:
        raise InvalidParameter(
            f"`documents` must be listed in at most {MAX_SEGMENT_BYTES} bytes of {layout.SEGMENT}, "
            f"{len(manifest.documents)} need {size}",
            param="documents",
        )
    return text


def _write_entries(folder: Path, lm: LMSection, documents: Sequence[NewDocument]) -> None:
    with ShardWriter(folder, lm.key_dim) as arrays:
        for new in documents:
            arrays.append(new.keys, new.values, new.char_spans)
            if len(new.values) and (largest := int(new.values.max())) >= lm.vocab_size:
                raise BuildError(
                    f"document {new.document.id[:100]!r}: values must be in 0 … {lm.vocab_size - 1}, got {largest}"
                )
        arrays.finish()
