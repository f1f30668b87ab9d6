"""What was learned beside one open version: blocks in memory that are searched, and where their entries come from.

Each addition is a block of its own; neighbouring blocks of similar size are joined, so that a search meets about log₂ n
of them and n entries are copied log₂ n times in all:

    sizes   8 4 1   + 1  →   8 4 2   + 2  →   8 8   →   16

A block is never changed but for what is hidden in it: a snapshot goes on with those that it was taken with.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from knnlm_core.datastore.arrays import KeyArray, ValueColumns
from knnlm_core.datastore.entries import Part, Section
from knnlm_core.datastore.exclusion import nothing_excluded
from knnlm_core.datastore.segments import Segment
from knnlm_core.datastore.shard import Shard
from knnlm_core.types import EntryRange

_ORIGIN = "the learned documents"  # in messages, where a mapped index has its path


class _Block(Shard):
    """A shard in memory that knows its place, for as long as some snapshot uses it."""

    first_entry: int


class Tail:
    """Learned documents beside a version of ``first_entry`` entries. For one thread at a time."""

    def __init__(self, first_entry: int) -> None:
        self._stop = first_entry
        self.parts: tuple[Part, ...] = ()
        self.sections: tuple[Section, ...] = ()
        self._blocks: WeakSet[_Block] = WeakSet()  # of every snapshot that still lives

    @property
    def num_bytes(self) -> int:
        """Memory of the keys that are held, those of older snapshots included."""
        return sum(block.keys.nbytes for block in list(self._blocks))

    def append(self, segment: Segment) -> Section:
        """Add what a segment holds; snapshots taken before do not see it."""
        section = Section(self._stop, segment.documents, segment.revision)
        self.sections = (*self.sections, section)
        if segment.entries:
            parts = [*self.parts, self._block(self._stop, [segment.keys], [segment.columns])]
            while len(parts) > 1 and parts[-2].shard.entries <= parts[-1].shard.entries:
                parts[-2:] = [self._joined(parts[-2], parts[-1])]
            self.parts = tuple(parts)
            self._stop += segment.entries
        return section

    def hide(self, entries: EntryRange) -> None:
        """Hide entries from every snapshot."""
        for block in list(self._blocks):
            first, stop = entries.first - block.first_entry, entries.stop - block.first_entry
            block.hide(max(first, 0), min(stop, block.entries))

    def _joined(self, left: Part, right: Part) -> Part:
        shards = (left.shard, right.shard)
        part = self._block(left.first_entry, [s.keys for s in shards], [s.columns for s in shards])
        masks = [_visible(shard) for shard in shards]
        if not all(mask.all() for mask in masks):
            part.shard.hidden = np.packbits(np.concatenate(masks), bitorder="little")
        return part

    def _block(self, first_entry: int, keys: Sequence[KeyArray], columns: Sequence[ValueColumns]) -> Part:
        together = ValueColumns(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        block = _Block.in_memory(keys, together, origin=_ORIGIN)
        block.first_entry = first_entry
        self._blocks.add(block)
        return Part(first_entry, block)


def _visible(shard: Shard) -> npt.NDArray[np.uint8]:
    hidden = shard.hidden if shard.hidden is not None else nothing_excluded(shard.entries)
    return np.unpackbits(hidden, count=shard.entries, bitorder="little")
