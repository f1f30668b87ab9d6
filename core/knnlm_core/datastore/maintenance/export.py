"""Writing what a datastore holds into files of other programs: documents as JSON Lines, entries as a table."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.maintenance.carried import keeps_held_out
from knnlm_core.datastore.maintenance.copies import Keep, Source
from knnlm_core.datastore.maintenance.stages import StageProgress, counted, silent
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import open_segment
from knnlm_core.durable import part_of, replace_file
from knnlm_core.errors import InvalidParameter

DOCUMENT_SUFFIXES = (".jsonl", ".jsonl.gz")
ENTRY_SUFFIXES = (".parquet",)
ROW_GROUP_ENTRIES = 65_536


def export_documents(
    root: Path,
    name: str,
    path: Path,
    *,
    version: str | None = None,
    held_out: bool = False,
    progress: StageProgress = silent,
) -> int:
    """Write every document that is alive, learned ones included, as a line that `knnlm build` reads; returns how many.

    Args:     path: ``*.jsonl`` or ``*.jsonl.gz``; appears under its name when it is whole.
              version: None for the current one; what was learned and deleted since counts for any.
              held_out: also the documents that the version keeps out of its entries.
    Raises:   InvalidParameter: the path has another suffix or cannot be written. DatastoreNotFound, DatastoreCorrupt.
    """
    _check_suffix(path, DOCUMENT_SUFFIXES)
    with _sources(root, name, version) as (store, sources, keep), _text_file(path) as file:
        total = sum(len(source.ids(keep)) for source in sources)
        advance = counted(progress, "export documents", total)
        written = 0
        for document in _documents(store, sources, keep, held_out):
            file.write(document_line(document))
            written += 1
            advance(1)
    return written


def export_entries(
    root: Path,
    name: str,
    path: Path,
    *,
    version: str | None = None,
    keys: bool = False,
    progress: StageProgress = silent,
) -> int:
    """Write every entry that is alive, learned ones included, as a row of a Parquet table; returns how many.

    Columns: ``entry_id``, as in search results; ``document_id``; ``token_id``; ``char_start``, ``char_end``; and with
    ``keys`` the stored key, ``key``. Memory: the entries of one row group.

    Raises: as `export_documents`.
    """
    _check_suffix(path, ENTRY_SUFFIXES)
    written = 0
    with _sources(root, name, version) as (store, sources, keep), _replacing(path) as part:
        schema = _entry_schema(store.dim if keys else None)
        total = sum(stop - first for source in sources for first, stop in source.ranges(keep))
        advance = counted(progress, "export entries", total)
        with _RowGroups(part, schema) as table:
            first_entry = 0
            for source in sources:
                for document_id in source.ids(keep):
                    for batch in _batches(source, document_id, first_entry, schema):
                        table.add(batch)
                        written += batch.num_rows
                        advance(batch.num_rows)
                first_entry += sum(len(arrays.keys) for arrays in source.arrays)
    return written


@contextmanager
def _sources(root: Path, name: str, version: str | None) -> Iterator[tuple[Datastore, list[Source], Keep]]:
    """What a snapshot taken now shows, in the order of its entry ids."""
    state = read_ledger(root, name)
    with ExitStack() as open_ones:
        store = open_ones.enter_context(Datastore.open(root, name, version))
        sources = [Source.of_version(store)]
        for record in state.segments:
            if record.revision > store.manifest.revision:
                segment = open_ones.enter_context(open_segment(root, name, record))
                segment.require_fits(store.manifest.lm.identity())
                sources.append(Source.of_segment(segment))
        yield store, sources, lambda document_id, revision: state.killed_before(document_id) <= revision


def _documents(store: Datastore, sources: list[Source], keep: Keep, held_out: bool) -> Iterator[Document]:
    for source in sources:
        for document, _ in source.documents(keep):
            yield document
    if held_out:
        yield from (d for d in store.held_out_documents() if keeps_held_out(keep, d.id, store.manifest.revision))


# What some readers take for the end of a line; the ASCII ones are escaped already.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def document_line(document: Document) -> str:
    """A document as a line of JSON that `knnlm build` reads; what it does not have is left out."""
    fields: Mapping[str, Any] = {
        "id": document.id,
        "text": document.text,
        "uri": document.uri,
        "title": document.title,
        "licence": document.licence,
        "tags": list(document.tags),
    }
    line = json.dumps({k: v for k, v in fields.items() if v not in (None, [])}, ensure_ascii=False)
    return line.translate(_LINE_ENDS) + "\n"


def _entry_schema(dim: int | None) -> pa.Schema:
    fields = [
        pa.field("entry_id", pa.int64(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("char_start", pa.int32(), nullable=False),
        pa.field("char_end", pa.int32(), nullable=False),
    ]
    if dim is not None:
        number = pa.field("item", pa.float16(), nullable=False)
        fields.append(pa.field("key", pa.list_(number, dim), nullable=False))
    return pa.schema(fields)


def _batches(source: Source, document_id: str, offset: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    entries = source.table.entries_of(document_id)
    first = entries.first + offset
    for block in source.blocks([entries], ROW_GROUP_ENTRIES):
        count = len(block.keys)
        columns = [
            pa.array(np.arange(first, first + count)),
            pa.repeat(document_id, count),
            *(pa.array(np.ascontiguousarray(column)) for column in block.columns),
        ]
        if "key" in schema.names:
            numbers = pa.array(np.ascontiguousarray(block.keys).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("key").type))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        first += count


class _RowGroups:
    """A Parquet file of large row groups, whatever the size of what is added."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(str(path), schema, compression="zstd")
        self._pending: list[pa.RecordBatch] = []
        self._rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self._pending.append(batch)
        self._rows += batch.num_rows
        if self._rows >= ROW_GROUP_ENTRIES:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending))
        self._pending, self._rows = [], 0


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.name.endswith(suffixes):
        raise InvalidParameter(f"`path` must end in {' or '.join(suffixes)}, got {str(path)!r}", param="path")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Where to write what appears as ``path`` when it is whole; nothing stays of what is not."""
    part = part_of(path)
    try:
        part.touch()
    except OSError as error:
        raise InvalidParameter(f"`path` {str(path)!r} cannot be written: {error.strerror}", param="path") from error
    try:
        yield part
        replace_file(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _text_file(path: Path) -> Iterator[IO[str]]:
    with _replacing(path) as part, ExitStack() as files:
        if path.suffix == ".gz":
            raw = files.enter_context(part.open("wb"))
            # Without the time in gzip's header the same documents give the same bytes.
            packed = files.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            yield files.enter_context(io.TextIOWrapper(packed, encoding="utf-8", newline="\n"))
        else:
            yield files.enter_context(part.open("w", encoding="utf-8", newline="\n"))
