"""The documents of a version: which entries each one made, where it came from, and its text."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from knnlm_core.durable import part_of, replace_file
from knnlm_core.errors import DatastoreCorrupt, DatastoreNotFound, DuplicateDocument
from knnlm_core.types import EntryRange

ROW_GROUP_CHARS = 1_000_000  # of text; what is read to get at one document
ROW_GROUP_DOCUMENTS = 4_096
_CACHED_ROW_GROUPS = 8

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("title", pa.string()),
        pa.field("licence", pa.string()),
        pa.field("tags", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field("first_entry", pa.int64(), nullable=False),
        pa.field("entries", pa.int64(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
    ]
)
_LOADED = ["id", "uri", "title", "licence", "first_entry", "entries"]


@dataclass(frozen=True, slots=True)
class Document:
    """A document and its text; character spans of entries refer to exactly this text."""

    id: str
    text: str
    uri: str | None = None
    title: str | None = None
    licence: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EntryLocation:
    """Where an entry's value stands: ``text[char_start:char_end]`` of its document."""

    entry_id: int
    document_id: str
    uri: str | None
    title: str | None
    licence: str | None
    token_offset: int  # of the value among the document's own tokens, BOS not counted
    char_start: int
    char_end: int


class DocumentsWriter:
    """Streams documents, in entry order, into a Parquet file; holds one row group in memory.

    The file appears under its name on `close`, and not at all if the writer is left by an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: set[str] = set()
        self._pending: list[dict[str, Any]] = []
        self._pending_chars = 0
        self._entries = 0
        self._writer = pq.ParquetWriter(str(part_of(path)), _SCHEMA, compression="zstd")

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._ids)

    @property
    def entries(self) -> int:
        """Entries of the documents added so far; the next document's first entry."""
        return self._entries

    def add(self, document: Document, entries: int) -> EntryRange:
        """Append a document that made the next ``entries`` entries, perhaps none.

        Raises: DuplicateDocument: its id was added before.
        """
        if entries < 0:
            raise ValueError(f"`entries` must not be negative, got {entries}")
        if document.id in self._ids:
            raise DuplicateDocument(f"two documents share the id {document.id!r}")
        self._ids.add(document.id)
        made = EntryRange(self._entries, self._entries + entries)
        self._pending.append(
            {
                "id": document.id,
                "uri": document.uri,
                "title": document.title,
                "licence": document.licence,
                "tags": list(document.tags),
                "first_entry": made.first,
                "entries": entries,
                "text": document.text,
            }
        )
        self._entries = made.stop
        self._pending_chars += len(document.text)
        if self._pending_chars >= ROW_GROUP_CHARS or len(self._pending) >= ROW_GROUP_DOCUMENTS:
            self._flush()
        return made

    def close(self) -> None:
        """Write what is left, put the file on the disk and give it its name."""
        self._flush()
        self._writer.close()
        replace_file(part_of(self._path), self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()
            part_of(self._path).unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=_SCHEMA))
            self._pending, self._pending_chars = [], 0


def normalise_newlines(text: str) -> str:
    """Turn ``\\r\\n`` and a lone ``\\r`` into ``\\n``, as every document's text has them; nothing else is touched."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_documents(path: Path) -> Iterator[Document]:
    """Every document of a table in order, one row group in memory at a time. Raises DatastoreCorrupt."""
    with _open(path) as file:
        for number in range(file.num_row_groups):
            for row in _read(file, path, [number]).to_pylist():
                yield _document(row)


def read_ids(path: Path) -> list[str]:
    """The id of every document of a table, in order. Raises DatastoreCorrupt."""
    with _open(path) as file:
        ids: list[str] = _read(file, path, range(file.num_row_groups), ["id"])["id"].to_pylist()
        return ids


class DocumentTable:
    """The documents of an open version: ids and entry ranges in memory, texts read when asked for. Thread-safe.

    Attributes:
        starts: ascending, the entries with which a document begins.

    Args:   keep_open: hold the file's descriptor, for tables of which there are few; else it is opened for each text.
    Raises: DatastoreCorrupt: not the table that the manifest describes.
    """

    def __init__(self, path: Path, *, documents: int, entries: int, keep_open: bool = True) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        file = _open(path)
        self._file = file if keep_open else None
        try:
            if file.metadata.num_rows != documents:
                have = file.metadata.num_rows
                raise DatastoreCorrupt(f"{path} has {have} documents, the manifest needs {documents}")
            groups = file.num_row_groups
            sizes = [file.metadata.row_group(number).num_rows for number in range(groups)]
            self._group_ends = np.cumsum(np.array(sizes, dtype=np.int64))
            self._table = _read(file, path, range(groups), _LOADED)
            self._first_entries = self._check_entries(entries)
            self._rows = {document_id: row for row, document_id in enumerate(self._table["id"].to_pylist())}
            if len(self._rows) != documents:
                raise DatastoreCorrupt(f"{path} has two documents with the same id")
        except BaseException:
            file.close()
            raise
        if not keep_open:
            file.close()
        self._entries = entries
        self.starts = np.unique(self._first_entries[self._first_entries < entries])

    def _check_entries(self, entries: int) -> npt.NDArray[np.int64]:
        first = self._table["first_entry"].to_numpy()
        counts = self._table["entries"].to_numpy()
        ends = np.cumsum(counts)
        if (counts < 0).any() or not np.array_equal(first, ends - counts):
            raise DatastoreCorrupt(f"{self._path}: first_entry and entries are not contiguous ranges from 0")
        if ends[-1] != entries:
            raise DatastoreCorrupt(f"{self._path} covers {ends[-1]} entries, the manifest needs {entries}")
        return first

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, document_id: str) -> bool:
        return document_id in self._rows

    def ids(self) -> list[str]:
        """Every document's id, in entry order."""
        return list(self._rows)

    def document(self, document_id: str) -> Document:
        """A document with its text. Raises DatastoreNotFound: no such document."""
        row = self._row(document_id)
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        table = self._row_group(group)
        offset = row - (int(self._group_ends[group]) - table.num_rows)
        document = _document(table.slice(offset, 1).to_pylist()[0])
        if document.id != document_id:
            raise DatastoreCorrupt(
                f"{self._path} has changed: document {document.id!r} stands where {document_id!r} was"
            )
        return document

    def entries_of(self, document_id: str) -> EntryRange:
        """The entries that a document made. Raises DatastoreNotFound: no such document."""
        row = self._row(document_id)
        first = int(self._first_entries[row])
        return EntryRange(first, first + int(self._table["entries"][row].as_py()))

    def next_entry(self, entry_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The entry that follows each one in its document; −1 after the last, and for −1."""
        following = entry_ids + 1
        at = np.searchsorted(self.starts, following)
        starts_document = self.starts[np.minimum(at, len(self.starts) - 1)] == following
        return np.where((entry_ids < 0) | starts_document | (following >= self._entries), -1, following)

    def locate(self, entry_ids: npt.NDArray[np.int64]) -> list[tuple[dict[str, Any], int]]:
        """Per entry the id, uri, title and licence of its document, and how many of its entries come before."""
        # Documents without entries share their first entry with the next one: the last of them owns it.
        rows = np.searchsorted(self._first_entries, entry_ids, side="right") - 1
        table = self._table.select(["id", "uri", "title", "licence"]).take(pa.array(rows))
        return list(zip(table.to_pylist(), (entry_ids - self._first_entries[rows]).tolist(), strict=True))

    def close(self) -> None:
        """Give back the file descriptor; texts can no longer be read."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._cache.clear()

    def _row(self, document_id: str) -> int:
        try:
            return self._rows[document_id]
        except KeyError:
            raise DatastoreNotFound(f"no document {document_id[:200]!r} in this datastore", param="document") from None

    def _row_group(self, number: int) -> pa.Table:
        with self._lock:
            if (table := self._cache.pop(number, None)) is None:
                table = self._read_group(number)
            self._cache[number] = table
            if len(self._cache) > _CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
            return table

    def _read_group(self, number: int) -> pa.Table:
        if self._file is not None:
            return _read(self._file, self._path, [number])
        with _open(self._path) as file:
            return _read(file, self._path, [number])


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(str(path))
    except FileNotFoundError:
        raise DatastoreCorrupt(f"{path} is missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DatastoreCorrupt(f"{path} is not a whole Parquet file: {error}") from error
    if not file.schema_arrow.equals(_SCHEMA):
        have = ", ".join(str(field) for field in file.schema_arrow)
        file.close()
        raise DatastoreCorrupt(f"{path} has the columns {have}; needs {', '.join(str(field) for field in _SCHEMA)}")
    return file


def _read(file: pq.ParquetFile, path: Path, groups: Sequence[int], columns: list[str] | None = None) -> pa.Table:
    try:
        table = file.read_row_groups(list(groups), columns=columns, use_threads=False)
        table.validate(full=True)  # Parquet does not promise that strings are UTF-8
        return table
    except (pa.ArrowInvalid, OSError) as error:
        raise DatastoreCorrupt(f"{path}: a row group does not decode: {error}") from error


def _document(row: dict[str, Any]) -> Document:
    return Document(row["id"], row["text"], row["uri"], row["title"], row["licence"], tuple(row["tags"]))
