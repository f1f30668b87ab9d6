"""What a document may have left, and how to find it again: its text, rows of its keys, runs of its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from knnlm_core.datastore.canaries import canaries_of
from knnlm_core.datastore.maintenance.carried import TAIL_SUFFIX, whole_document
from knnlm_core.datastore.maintenance.copies import Keep, Source
from knnlm_core.datastore.reader import Datastore

RUN_TOKENS = 16  # that follow each other in the document
MIN_RUN_TOKENS = 4  # shorter ones stand everywhere and tell nothing
_BLOCK_ROWS = 16_384

ByteRows = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]


class Rows:
    """Distinct rows of bytes, all of one width, that can be found among others."""

    def __init__(self, rows: ByteRows) -> None:
        self.width = rows.shape[1]
        self._rows = frozenset(row.tobytes() for row in rows)
        self._hashes = np.unique(_hashes(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._rows)

    def find(self, rows: ByteRows) -> list[int]:
        """Which of some rows (n, width) are among these."""
        near = np.flatnonzero(np.isin(_hashes(rows), self._hashes))
        return [row for row in near.tolist() if rows[row].tobytes() in self._rows]


@dataclass(frozen=True)
class Traces:
    """Everything that is known of some documents.

    Attributes:
        ids: of the documents.
        texts: theirs, held-out parts included.
        keys: rows of 2·D bytes, by D.
        runs: rows of 4·L bytes, by L: L token ids that follow each other; L = `RUN_TOKENS`, or less of a short one.
        queries: rows of 4·D bytes: canaries from held-out text, by D.
    """

    ids: frozenset[str]
    texts: frozenset[str]
    keys: Mapping[int, Rows]
    runs: Mapping[int, Rows]
    queries: Mapping[int, Rows]

    def are_of(self, document_id: str) -> bool:
        """Whether an id is that of one of the documents, or of its held-out end."""
        return is_among(self.ids, document_id)


class Gathering:
    """Gathers the traces of some documents from where copies of them lie."""

    def __init__(self, ids: Collection[str]) -> None:
        self._ids = frozenset(ids)
        self._texts: set[str] = set()
        self._keys = defaultdict[int, list[ByteRows]](list)
        self._runs = defaultdict[int, list[ByteRows]](list)
        self._queries = defaultdict[int, list[ByteRows]](list)

    def add_source(self, source: Source) -> None:
        """What a version or a segment holds of them."""
        for document, entries in source.documents(lambda document_id, _: document_id in self._ids):
            self._texts.add(document.text)
            for block in source.blocks([entries]):
                self._keys[block.keys.shape[1]].append(as_bytes(block.keys))
            values = source.values(entries)
            if len(values) >= MIN_RUN_TOKENS:
                windows = sliding_window_view(values, min(RUN_TOKENS, len(values)))
                self._runs[windows.shape[1]].append(as_bytes(windows))

    def add_held_out(self, store: Datastore) -> None:
        """What a version keeps of them for calibration and self-tests."""
        self._texts |= {d.text for d in store.held_out_documents() if is_among(self._ids, d.id)}
        canaries = canaries_of(store)
        if canaries is not None:
            rows = [row for row, document in enumerate(canaries.documents) if is_among(self._ids, document)]
            self._queries[store.dim].append(as_bytes(canaries.queries[rows].numpy()))

    def held_out_by(self, store: Datastore) -> set[str]:
        """Which of the documents a version keeps, in part or whole, for calibration and self-tests."""
        canaries = canaries_of(store)
        named = {d.id for d in store.held_out_documents()} | set(canaries.documents if canaries is not None else ())
        return {id_ for id_ in self._ids if id_ in named or id_ + TAIL_SUFFIX in named}

    def traces(self) -> Traces:
        """All that was gathered."""
        keys, runs, queries = (
            {size: Rows(np.concatenate(parts)) for size, parts in gathered.items()}
            for gathered in (self._keys, self._runs, self._queries)
        )
        return Traces(self._ids, frozenset(self._texts), keys, runs, queries)


def is_among(ids: Collection[str], document_id: str) -> bool:
    """Whether an id is one of some, or that of the held-out end of one of them."""
    return document_id in ids or whole_document(document_id) in ids


def find_keys(source: Source, keep: Keep, rows: Rows | None) -> Positions:
    """Which of the entries to be kept, counted as they will be without the others, have one of some keys."""
    found: list[int] = []
    first = 0
    if rows is not None:
        for block in source.blocks(source.ranges(keep), _BLOCK_ROWS):
            found += [first + row for row in rows.find(as_bytes(block.keys))]
            first += len(block.keys)
    return np.array(found, dtype=np.int64)


def find_runs(source: Source, keep: Keep, runs: Mapping[int, Rows]) -> Positions:
    """Where, counted likewise, some runs of tokens begin within a document; a place counts once for each length."""
    found: list[int] = []
    first = 0
    for document_id in source.ids(keep) if runs else ():
        values = source.values(source.table.entries_of(document_id))
        for length, rows in runs.items():
            windows = sliding_window_view(values, length) if length <= len(values) else np.empty((0, length), np.int32)
            for at in range(0, len(windows), _BLOCK_ROWS):
                found += [first + at + row for row in rows.find(as_bytes(windows[at : at + _BLOCK_ROWS]))]
        first += len(values)
    return np.array(found, dtype=np.int64)


def as_bytes(rows: npt.NDArray[Any]) -> ByteRows:
    """Rows of numbers as rows of bytes."""
    return np.ascontiguousarray(rows).view(np.uint8)


def _hashes(rows: ByteRows) -> npt.NDArray[np.uint64]:
    """One number per row: Σ wordᵢ · weightᵢ mod 2⁶⁴; equal rows have equal ones."""
    if spare := rows.shape[1] % 8:
        rows = np.pad(rows, ((0, 0), (0, 8 - spare)))
    words = np.ascontiguousarray(rows).view(np.uint64)
    weights = np.random.default_rng(rows.shape[1]).integers(0, 2**64, words.shape[1], dtype=np.uint64) | np.uint64(1)
    return np.einsum("ij,j->i", words, weights)
