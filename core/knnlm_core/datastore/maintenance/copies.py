"""The copies of documents that lie on the disk, in a version or in the tail, and their entries, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import Int32Array, KeyArray, ValueColumns
from knnlm_core.datastore.documents import Document, DocumentTable, read_documents
from knnlm_core.datastore.exclusion import merge_ranges
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import Segment
from knnlm_core.types import EntryRange

BLOCK_ROWS = 65_536  # keys copied at a time

Keep = Callable[[str, int], bool]  # whether the copy of a document (its id) made at a revision is to be kept


class Block(NamedTuple):
    """Some entries, as views of what is mapped."""

    keys: KeyArray  # (n, D)
    columns: ValueColumns  # (n,) each


class Arrays(NamedTuple):
    """Keys and values that are mapped from one folder, and which entry is the first."""

    first_entry: int
    keys: KeyArray
    columns: ValueColumns


@dataclass(frozen=True)
class Source:
    """Documents that were written together, in a version or in a segment of the tail.

    Attributes:
        revision: of the name when they were written.
        table: their ids and entry ranges.
        path: the file with their texts.
        arrays: their entries, in order.
    """

    revision: int
    table: DocumentTable
    path: Path
    arrays: Sequence[Arrays]

    @classmethod
    def of_version(cls, store: Datastore) -> Source:
        """An open version; valid as long as it is open."""
        (section,) = store._sections()
        arrays = [Arrays(part.first_entry, part.shard.keys, part.shard.columns) for part in store._parts()]
        return cls(store.manifest.revision, section.documents, store.folder / layout.DOCUMENTS, arrays)

    @classmethod
    def of_segment(cls, segment: Segment) -> Source:
        """An open segment; valid as long as it is open."""
        arrays = [Arrays(0, segment.keys, segment.columns)]
        return cls(segment.revision, segment.documents, segment.folder / layout.DOCUMENTS, arrays)

    def ids(self, keep: Keep) -> list[str]:
        """The documents to be kept, in entry order."""
        return [document_id for document_id in self.table.ids() if keep(document_id, self.revision)]

    def left_out(self, keep: Keep) -> list[str]:
        """The other ones."""
        return [document_id for document_id in self.table.ids() if not keep(document_id, self.revision)]

    def documents(self, keep: Keep) -> Iterator[tuple[Document, EntryRange]]:
        """Documents to be kept with their texts and entries, in order; one row group in memory at a time."""
        for document in read_documents(self.path):
            if keep(document.id, self.revision):
                yield document, self.table.entries_of(document.id)

    def ranges(self, keep: Keep) -> tuple[EntryRange, ...]:
        """The entries to be kept, in as few ranges as can be."""
        return merge_ranges(self.table.entries_of(document_id) for document_id in self.ids(keep))

    def blocks(self, ranges: Sequence[EntryRange], rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """The entries of some ranges in order, at most ``rows`` at a time."""
        for wanted in ranges:
            for first_entry, keys, columns in self.arrays:
                first = max(wanted.first - first_entry, 0)
                stop = min(wanted.stop - first_entry, len(keys))
                for at in range(first, stop, rows):
                    chosen = slice(at, min(at + rows, stop))
                    yield Block(keys[chosen], ValueColumns(*(column[chosen] for column in columns)))

    def values(self, entries: EntryRange) -> Int32Array:
        """The token ids of some entries, together."""
        parts = [block.columns.values for block in self.blocks([entries])]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)


def entries_in(ranges: Sequence[EntryRange]) -> int:
    """How many entries some ranges hold."""
    return sum(stop - first for first, stop in ranges)
