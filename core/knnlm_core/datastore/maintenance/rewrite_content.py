"""The entries and documents of a rewritten version, streamed from where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import ValueColumns
from knnlm_core.datastore.documents import DocumentsWriter
from knnlm_core.datastore.maintenance.copies import Block, Keep, Source, entries_in
from knnlm_core.datastore.maintenance.stages import StageProgress, counted
from knnlm_core.datastore.manifest import ShardSection
from knnlm_core.datastore.writer import ShardWriter


def copy_entries(
    folder: Path, sources: Sequence[Source], keep: Keep, shard_entries: int, progress: StageProgress
) -> tuple[ShardSection, ...]:
    """Write the entries to be kept as shards of one size; one block of keys is in memory at a time."""
    ranges = [source.ranges(keep) for source in sources]
    total = sum(map(entries_in, ranges))
    advance = counted(progress, "copy entries", total)
    stream = _Stream(block for source, kept in zip(sources, ranges, strict=True) for block in source.blocks(kept))
    shards: list[ShardSection] = []
    for first in range(0, total, shard_entries):
        entries = min(shard_entries, total - first)
        shard = ShardSection(name=layout.shard_name(len(shards)), first_entry=first, entries=entries)
        with ShardWriter(folder / shard.name, sources[0].arrays[0].keys.shape[1]) as writer:
            for keys, columns in stream.take(entries):
                writer.append(keys, columns.values, np.column_stack([columns.char_starts, columns.char_ends]))
                advance(len(keys))
            writer.finish()
        shards.append(shard)
    return tuple(shards)


def copy_documents(folder: Path, sources: Sequence[Source], keep: Keep, progress: StageProgress) -> int:
    """Write the table of the documents to be kept, and return how many they are."""
    advance = counted(progress, "copy documents", sum(len(source.ids(keep)) for source in sources))
    with DocumentsWriter(folder / layout.DOCUMENTS) as writer:
        for source in sources:
            for document, (first, stop) in source.documents(keep):
                writer.add(document, stop - first)
                advance(1)
        return writer.documents


class _Stream:
    """Blocks cut where shards end."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks
        self._left: Block | None = None

    def take(self, entries: int) -> Iterator[Block]:
        """The next entries, so many in all."""
        while entries:
            block = self._left or next(self._blocks)
            head, self._left = _cut(block, entries)
            entries -= len(head.keys)
            yield head


def _cut(block: Block, at: int) -> tuple[Block, Block | None]:
    if len(block.keys) <= at:
        return block, None
    (keys, more_keys), columns = (block.keys[:at], block.keys[at:]), block.columns
    head = ValueColumns(*(column[:at] for column in columns))
    return Block(keys, head), Block(more_keys, ValueColumns(*(column[at:] for column in columns)))
