"""Searching any file for traces of documents: its bytes at every offset, unpacked if gzipped, its cells if a table."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knnlm_core.datastore.maintenance.traces import Rows, Traces
from knnlm_core.errors import VerifyFailed

MIN_TEXT_BYTES = 16  # shorter ones stand everywhere
MIN_BARE_ID_BYTES = 8  # a shorter id is sought in quotation marks only
_BLOCK_BYTES = 4 * 1024 * 1024
_WORD = 8  # bytes that a row is recognised by before it is compared


class Counts(NamedTuple):
    """Traces in a file."""

    found: int
    shared: int  # of them keys that other documents have too


class RawSearch:
    """Searches files that are no part of the format, or whose format has no place for what is sought.

    Args:     with_ids: also look for the documents' ids.
    """

    def __init__(self, traces: Traces, *, with_ids: bool) -> None:
        self._traces = traces
        texts = {t for t in traces.texts if len(t.encode()) >= MIN_TEXT_BYTES}
        self._words = {form for text in texts for form in (text.encode(), *_as_json(text, quoted=False))}
        if with_ids:
            for id_ in traces.ids:
                self._words.update(_as_json(id_, quoted=True))
                if len(id_.encode()) >= MIN_BARE_ID_BYTES:
                    self._words.add(id_.encode())
        self._with_ids = with_ids
        self._rows = [_Anywhere(rows) for kind in (traces.keys, traces.queries) for rows in kind.values()]
        self._overlap = max([len(w) for w in self._words] + [r.rows.width for r in self._rows] + [1]) - 1

    def count(self, path: Path, shared: Mapping[int, frozenset[bytes]]) -> Counts:
        """What a file holds.

        Args:     shared: keys that other documents have too, by their width in bytes.
        Raises:   VerifyFailed: it is gzipped and cannot be unpacked.
        """
        found = in_common = 0
        for block, new in _blocks(path, self._overlap):
            found += sum(at + len(word) > new for word in self._words for at in _places(block, word))
            for rows in self._rows:
                for at, row in rows.find(block):
                    if at + len(row) > new:
                        found += 1
                        in_common += row in shared.get(len(row), ())
        return Counts(found + (self._count_cells(path) if path.suffix == ".parquet" else 0), in_common)

    def _count_cells(self, path: Path) -> int:
        try:
            with pq.ParquetFile(str(path)) as file:
                return sum(self._count_in(file.read_row_group(n)) for n in range(file.num_row_groups))
        except (pa.ArrowInvalid, OSError):
            return 0  # not a table after all: its bytes have been searched

    def _count_in(self, table: pa.Table) -> int:
        sought = self._traces.texts | (self._traces.ids if self._with_ids else frozenset())
        strings = [c for c in table.columns if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
        return sum(cell in sought for column in strings for cell in column.to_pylist())


class _Anywhere:
    """Finds rows at any offset."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._all = frozenset(rows)
        self._starts = np.unique(np.array([int.from_bytes(row[:_WORD], "little") for row in self._all], "<u8"))

    def find(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The rows that stand in some data, and where."""
        width = self.rows.width
        if width < _WORD:
            yield from ((at, row) for row in self._all for at in _places(data, row))
            return
        for phase in range(min(_WORD, len(data))):
            words = np.frombuffer(data, "<u8", (len(data) - phase) // _WORD, phase)
            for word in np.flatnonzero(np.isin(words, self._starts)).tolist():
                at = phase + word * _WORD
                if (row := data[at : at + width]) in self._all:
                    yield at, row


def _places(data: bytes, word: bytes) -> Iterator[int]:
    at = data.find(word)
    while at >= 0:
        yield at
        at = data.find(word, at + 1)


def _blocks(path: Path, overlap: int) -> Iterator[tuple[bytes, int]]:
    """The file's content; each block begins with the end of the one before, and says where what is new begins."""
    with path.open("rb") as plain:
        is_gzipped = plain.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if is_gzipped else path.open("rb") as file:
            kept = b""
            while block := file.read(_BLOCK_BYTES):
                yield kept + block, len(kept)
                kept = (kept + block)[-overlap:] if overlap else b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VerifyFailed(f"{path} cannot be unpacked, so nobody knows what it holds: {error}") from error


def _as_json(text: str, *, quoted: bool) -> tuple[bytes, bytes]:
    forms = (json.dumps(text, ensure_ascii=ascii_only).encode() for ascii_only in (True, False))
    first, second = forms if quoted else (form[1:-1] for form in forms)
    return first, second
