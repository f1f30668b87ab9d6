"""How much of a text stands in a datastore: per token, the longest run of tokens up to it that occurs there too.

A run counts where it lies within one document and touches no entry that is excluded or hidden. Only lengths that are
powers of two are looked for, since a run of 2n tokens hashes from its halves:

    hash₂ₙ(run) = mix(hashₙ(first half), hashₙ(second half))

The runs of the texts are kept in sorted tables, one per length; the datastore's values stream past them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from knnlm_core.datastore.entries import Entries
from knnlm_core.datastore.exclusion import allowed_bitmap, allowed_mask, check_ranges
from knnlm_core.types import EntryRange

LENGTHS = (1, 2, 4, 8, 16, 32)
_LEAD = LENGTHS[-1] - 1  # tokens before a token that its longest run needs

_BLOCK_ENTRIES = 1 << 16
_BATCH_TOKENS = 1 << 18  # of the texts per pass over the datastore; about 200 bytes each
_FILTER_SLOTS = 8  # per run: so many in one are free, and a value that hits a free one needs no binary search

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.integer]


def longest_matches(
    datastore: Entries,
    texts: Sequence[Tokens],
    *,
    exclude: Sequence[EntryRange] = (),
    own: Sequence[EntryRange | None] | None = None,
    checkpoint: Callable[[], None] = lambda: None,
) -> list[npt.NDArray[np.uint8]]:
    """The largest n in LENGTHS for which the n tokens that end at a token stand in the datastore; 0 where none do.

    The values of a datastore are its documents' tokens, without the first one where the tokenizer puts no BOS. Two
    runs are taken for equal when their 64-bit hashes are: with Q tokens of texts and N entries, the probability of
    even one false match is at most about 5·Q·N/2⁶⁴ (single tokens cannot collide), 3·10⁻⁵ for 10⁶ and 10⁸.

    Time grows with N for every 262,144 tokens of texts, memory with neither beyond one byte per token.

    Args:
        texts: token ids, (T,) each.
        exclude: entries that do not count for any text.
        own: per text, entries of whole documents that do not count for this text alone, such as the document's own.
        checkpoint: called between blocks of entries; what it raises ends the search.
    Returns: (T,) per text.
    Raises: InvalidParameter: a range beyond this datastore.
    """
    owned = own if own is not None else [None] * len(texts)
    check_ranges([*exclude, *(range_ for range_ in owned if range_ is not None)], datastore.entries)
    found = [np.zeros(len(text), np.uint8) for text in texts]
    for pieces in _batches([len(text) for text in texts], _BATCH_TOKENS):
        runs = _runs_of(texts, pieces)
        tables = [_Table(hashes[runs.room[n - 1 :] >= n]) for n, hashes in _hashes(runs.tokens)]
        for block in _blocks(datastore, exclude):
            checkpoint()
            _mark(tables, block)
        longest = _longest(tables, runs, [owned[piece.text] for piece in pieces])
        for piece, part in zip(pieces, np.split(longest, runs.ends[:-1]), strict=True):
            found[piece.text][piece.begin : piece.stop] = part[piece.begin - piece.lead :]
    return found


class _Piece(NamedTuple):
    """Tokens ``begin … stop − 1`` of a text, read with those from ``lead`` on, which their runs may begin in."""

    text: int
    lead: int
    begin: int
    stop: int


class _Runs(NamedTuple):
    """Pieces of texts, one after the other."""

    tokens: Hashes  # (T,)
    room: Positions  # (T,) tokens of its piece up to each, itself included
    ends: Positions  # where each piece stops


class _Block(NamedTuple):
    """Consecutive entries, of which those before ``begin`` are there for the runs of later ones only."""

    first_entry: int
    begin: int
    values: Hashes  # (n,)
    room: Positions  # (n,) entries that a run which ends here may have, as far as the block shows


class _Table:
    """The runs of one length in the texts, and the first and the last entry at which each ends in the datastore."""

    def __init__(self, hashes: Hashes) -> None:
        ordered = np.sort(hashes)  # np.unique would take ten times as long
        self.hashes = ordered[np.diff(ordered, prepend=~ordered[:1]) != 0]
        self.first = np.full(len(self.hashes), np.iinfo(np.int64).max)
        self.last = np.full(len(self.hashes), -1)
        bits = max(1, (_FILTER_SLOTS * len(self.hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, np.bool_)
        self._filter[self.hashes >> self._shift] = True

    def at(self, hashes: Hashes) -> Positions:
        """Where known hashes stand."""
        return np.searchsorted(self.hashes, hashes)

    def known(self, hashes: Hashes) -> tuple[Positions, Positions]:
        """Which of some hashes are known, and where those stand."""
        maybe = np.flatnonzero(self._filter[hashes >> self._shift])
        at = np.searchsorted(self.hashes, hashes[maybe])
        equal = self.hashes[np.minimum(at, len(self.hashes) - 1)] == hashes[maybe]
        return maybe[equal], at[equal]


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[_Piece]]:
    """Cut texts into pieces, and these into batches of at most ``limit`` tokens, leads not counted."""
    pieces: list[_Piece] = []
    left = limit
    for text, length in enumerate(lengths):
        begin = 0
        while begin < length:
            stop = min(length, begin + left)
            pieces.append(_Piece(text, max(0, begin - _LEAD), begin, stop))
            left -= stop - begin
            begin = stop
            if not left:
                yield pieces
                pieces, left = [], limit
    if pieces:
        yield pieces


def _runs_of(texts: Sequence[Tokens], pieces: Sequence[_Piece]) -> _Runs:
    sizes = [piece.stop - piece.lead for piece in pieces]
    return _Runs(
        tokens=np.concatenate([texts[piece.text][piece.lead : piece.stop] for piece in pieces]).astype(np.uint64),
        room=np.concatenate([np.arange(1, size + 1) for size in sizes]),
        ends=np.cumsum(sizes),
    )


def _blocks(datastore: Entries, exclude: Sequence[EntryRange]) -> Iterator[_Block]:
    """All entries in order, block by block."""
    for begin in range(0, datastore.entries, _BLOCK_ENTRIES):
        first, stop = max(0, begin - _LEAD), min(begin + _BLOCK_ENTRIES, datastore.entries)
        ids = torch.arange(first, stop)
        here = np.arange(stop - first)
        # The position after which room is counted:    entry   . . | d d d x x d     | begins a document, x is excluded
        #                                              room    1 2   1 2 3 0 0 1
        after = np.full(stop - first, -1)
        starts = 1 + np.flatnonzero(datastore.next_entry(ids[:-1]).numpy() < 0)
        after[starts] = starts - 1
        bitmap = allowed_bitmap(exclude, first, stop - first)
        allowed = datastore.is_visible(first, stop)
        if bitmap is not None:
            allowed &= allowed_mask(bitmap, 0, stop - first)
        excluded = np.flatnonzero(~allowed)
        after[excluded] = excluded
        room = here - np.maximum.accumulate(after)
        yield _Block(first, begin - first, datastore.values(ids).numpy().astype(np.uint64), room)


def _mark(tables: Sequence[_Table], block: _Block) -> None:
    """Note which runs of the tables end in the block."""
    ends = np.arange(block.begin, len(block.values))
    for table, (n, hashes) in zip(tables, _hashes(block.values), strict=True):
        # A run can only be known if its second half is, so each length looks at what the one before has left.
        ends = ends[block.room[ends] >= n]
        which, at = table.known(hashes[ends - (n - 1)])
        ends = ends[which]
        if not len(ends):
            return
        np.minimum.at(table.first, at, ends + block.first_entry)
        np.maximum.at(table.last, at, ends + block.first_entry)


def _longest(tables: Sequence[_Table], runs: _Runs, own: Sequence[EntryRange | None]) -> npt.NDArray[np.uint8]:
    """What the tables have found for each token of the pieces."""
    nothing = EntryRange(np.iinfo(np.int64).max, np.iinfo(np.int64).max)
    ranges = np.array([range_ if range_ is not None else nothing for range_ in own])  # (P, 2)
    of_token = np.repeat(ranges, np.diff(runs.ends, prepend=0), axis=0)  # (T, 2)
    longest = np.zeros(len(runs.tokens), np.uint8)
    ends = np.arange(len(runs.tokens))
    for table, (n, hashes) in zip(tables, _hashes(runs.tokens), strict=True):
        ends = ends[runs.room[ends] >= n]
        at = table.at(hashes[ends - (n - 1)])
        # If any place at all lies outside a range, then the first or the last one does.
        outside = (table.first[at] < of_token[ends, 0]) | (table.last[at] >= of_token[ends, 1])
        ends = ends[outside]
        longest[ends] = n
    return longest


def _hashes(tokens: Hashes) -> Iterator[tuple[int, Hashes]]:
    """Per length n the hashes of all n consecutive tokens, (T − n + 1,), by where they begin."""
    hashes = _mix(tokens + np.uint64(0x9E3779B97F4A7C15))
    yield 1, hashes
    for n in LENGTHS[:-1]:
        hashes = _mix(hashes[:-n] * np.uint64(0xD1342543DE82EF95) + hashes[n:])
        yield 2 * n, hashes


def _mix(numbers: Hashes) -> Hashes:
    """Scramble in place, without collisions: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers ^= numbers >> np.uint64(shift)
        numbers *= np.uint64(factor)
    numbers ^= numbers >> np.uint64(31)
    return numbers
