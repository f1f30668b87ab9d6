"""Which entries a search may return, as the bitmap that faiss takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from knnlm_core.errors import InvalidParameter
from knnlm_core.types import EntryRange

Bitmap = npt.NDArray[np.uint8]


def check_ranges(exclude: Sequence[EntryRange], entries: int) -> None:
    """Raises InvalidParameter: a range is not within 0 … entries, as one of another version would be."""
    for first, stop in exclude:
        if not 0 <= first <= stop <= entries:
            raise InvalidParameter(
                f"`exclude` must hold ranges within 0 … {entries}, got [{first}, {stop})", param="exclude"
            )


def merge_ranges(ranges: Iterable[EntryRange]) -> tuple[EntryRange, ...]:
    """The same entries in as few ranges as can be, in order; empty ranges are left out."""
    merged: list[EntryRange] = []
    for first, stop in sorted(ranges):
        if merged and first <= merged[-1].stop:
            merged[-1] = EntryRange(merged[-1].first, max(stop, merged[-1].stop))
        elif first < stop:
            merged.append(EntryRange(first, stop))
    return tuple(merged)


def allowed_bitmap(
    exclude: Sequence[EntryRange], first_entry: int, entries: int, hidden: Bitmap | None = None
) -> Bitmap | None:
    """One bit per entry of a shard, least significant first, cleared where excluded; None if nothing here is.

    Ranges are clipped to the shard.

    Args:     hidden: a bitmap of what is never to be found; returned itself where ``exclude`` adds nothing.
    """
    bitmap: Bitmap | None = None
    for range_ in exclude:
        first, stop = max(range_.first - first_entry, 0), min(range_.stop - first_entry, entries)
        if first >= stop:
            continue
        if bitmap is None:
            bitmap = nothing_excluded(entries) if hidden is None else hidden.copy()
        clear_bits(bitmap, first, stop)
    return hidden if bitmap is None else bitmap


def nothing_excluded(entries: int) -> Bitmap:
    """A bitmap with every bit set."""
    return np.full((entries + 7) // 8, 0xFF, dtype=np.uint8)


def allowed_mask(bitmap: Bitmap, first: int, stop: int) -> npt.NDArray[np.bool_]:
    """The bits of entries ``first … stop − 1`` of a shard as booleans."""
    return np.unpackbits(bitmap[first // 8 : (stop + 7) // 8], bitorder="little").view(np.bool_)[
        first % 8 : first % 8 + stop - first
    ]


def clear_bits(bitmap: Bitmap, first: int, stop: int) -> None:
    """Exclude entries ``first … stop − 1``, first < stop, in place."""
    #   byte       0         1         2
    #   bit    01234567  01234567  01234567        first = 5, stop = 18: keep 0-4 of byte 0, 2-7 of byte 2
    #               ^^^  ^^^^^^^^  ^^
    head, tail = first // 8, stop // 8
    keep_head, keep_tail = (1 << first % 8) - 1, 0xFF & ~((1 << stop % 8) - 1)
    if head == tail:
        bitmap[head] &= keep_head | keep_tail
        return
    bitmap[head] &= keep_head
    bitmap[head + 1 : tail] = 0
    if stop % 8:
        bitmap[tail] &= keep_tail
