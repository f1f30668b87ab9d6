"""Search for many queries at once: a list is read once for all the queries that visit it, as one matrix product.

faiss scans query by query, so it decodes a key again for every query that visits the key's list. Here the pairs
(query, list) are grouped by list, and ‖q − x‖² = ‖q‖² − 2q·x + ‖x‖² costs one product per list. That cancels where keys
share a large mean (here 58–71 % of the squared norm), so it is computed in float64, whose error is below
(D + 4)·2⁻⁵²·(‖q‖ + ‖x‖)², and rounded to float32 once: a distance above 10⁻⁵·(‖q‖ + ‖x‖)² is right to 10⁻⁷ of itself.
Results differ from a scan's in the last digits of distances only, and in which entries are found only where those
digits decide. Equal keys tie, in order of id, but for that error.

Lists are short, so keys are decoded and queries gathered for a few lists at a time, as much as a core's cache holds.
faiss.contrib.big_batch_search has the same outline, but takes no selector, multiplies in float32 without centring, and
with k = 1024 spends in its heap what it saves: it took as long as the scan.

Memory, however many queries there are: `_CANDIDATES` float32, or N for a single query where that is more;
2·D·`_MAX_QUERIES` + 2·`_NUMBERS` + 3·`_PRODUCTS` float64; 8 bytes of id for each entry of the lists visited.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import torch

from knnlm_core.datastore.exclusion import Bitmap
from knnlm_core.datastore.index import keys_of_codes, stored_keys
from knnlm_core.datastore.merge import Found
from knnlm_core.errors import DatastoreCorrupt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_MAX_QUERIES = 8_192  # queries that share a reading of the lists
_CANDIDATES = 1 << 27  # distances held at a time, float32
_PRODUCTS = 1 << 20  # distances computed at a time, float64
_NUMBERS = 1 << 19  # numbers of keys, and of queries gathered for them, held at a time, float64
_ID_BITS = 32  # of a candidate, whose upper half is its distance
_MISSING = (int(np.float32(np.inf).view(np.int32)) << _ID_BITS) | ((1 << _ID_BITS) - 1)


class StoredList(NamedTuple):
    """Views of the mapped index, never to be written."""

    keys: npt.NDArray[np.float16]  # (n, D)
    ids: Ids  # (n,) local entry ids


class Lists(Protocol):
    """The lists of an index."""

    sizes: Ids  # (lists,)

    def visits(self, queries: Floats) -> Ids:
        """The lists that each query visits, (B, P), P ≥ 1."""
        ...

    def read(self, number: int) -> StoredList:
        """What a list holds."""
        ...


class IvfLists:
    """The inverted lists of a trained, mapped index; ``origin`` is its file."""

    def __init__(self, index: Any, nprobe: int, origin: str) -> None:
        self._index, self._nprobe, self._origin = index, nprobe, origin
        self.sizes = np.array([index.invlists.list_size(number) for number in range(index.nlist)], dtype=np.int64)

    def visits(self, queries: Floats) -> Ids:
        """The ``nprobe`` nearest lists, as faiss chooses them."""
        numbers: Ids = self._index.quantizer.search(queries, self._nprobe)[1]
        return numbers

    def read(self, number: int) -> StoredList:
        """As `Lists.read`. Nothing has to be released: lists of a mapped index are plain memory."""
        index, size = self._index, int(self.sizes[number])
        if not size:
            return StoredList(np.empty((0, index.d), np.float16), np.empty(0, np.int64))
        ids: Ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
        if (largest := int(ids.view(np.uint64).max())) >= index.ntotal:
            raise DatastoreCorrupt(f"{self._origin} holds entry {largest} of {index.ntotal} in list {number}")
        return StoredList(keys_of_codes(index.invlists.get_codes(number), size, index.d), ids)


class WholeIndex:
    """An index without lists, as one list that every query visits."""

    def __init__(self, index: Any) -> None:
        self._index = index
        self.sizes = np.array([index.ntotal], dtype=np.int64)

    def visits(self, queries: Floats) -> Ids:
        """The one list."""
        return np.zeros((len(queries), 1), dtype=np.int64)

    def read(self, number: int) -> StoredList:
        """As `Lists.read`."""
        index = self._index
        return StoredList(stored_keys(index), np.arange(index.ntotal))


def search_batch(lists: Lists, queries: Floats, k: int, bitmap: Bitmap | None) -> Found:
    """The k nearest by (distance, id) of what the queries' lists hold, with local ids.

    Args:
        queries: (B, D), finite.
        bitmap: see `allowed_bitmap`; None to allow all.
    Raises: DatastoreCorrupt: a list holds an id that the index does not have.
    """
    found = Found(np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64))
    for first in range(0, len(queries), _MAX_QUERIES):
        visits = lists.visits(queries[first : first + _MAX_QUERIES])
        widest = max(1, int(lists.sizes[visits].sum(axis=1).max()))
        step = -(-len(visits) // -(-len(visits) * widest // _CANDIDATES))
        for begin in range(0, len(visits), step):
            rows = slice(first + begin, first + min(begin + step, len(visits)))
            table = _Table(visits[begin : begin + step], lists.sizes)
            ids = _compute(lists, queries[rows], bitmap, table)
            _select(table, ids, Found(found.distances[rows], found.entry_ids[rows]))
    return found


class _Table:
    """Distances of a block of queries to all that their lists hold.

    query 0   │ its 1st list │ its 2nd list │ … │ +inf │        every row is as wide as the fullest one
    query 1   │ its 1st list │ its 2nd list │ …        │
    """

    def __init__(self, visits: Ids, sizes: Ids) -> None:
        lengths = sizes[visits]  # (b, P)
        ends = lengths.cumsum(axis=1)
        self.distances = np.full((len(visits), max(1, int(ends[:, -1].max()))), np.inf, dtype=np.float32)
        self.visits = visits
        # Of each list's part of a row, in the table read as one long row.
        self.ends = ends + np.arange(len(visits))[:, None] * self.distances.shape[1]
        self.begins = self.ends - lengths

    def write(self, begins: Ids, distances: Floats) -> None:
        """Write distances (c, n), each row of them at its own place."""
        flat, width = self.distances.reshape(-1), distances.shape[1]
        # All runs of n neighbouring places, overlapping: assigning to some of them copies whole runs.
        runs = np.ndarray((flat.size - width + 1, width), flat.dtype, flat, strides=flat.strides * 2)
        runs[begins] = distances


class _Ids:
    """The ids of the lists visited, one list after the other."""

    def __init__(self, lists: int) -> None:
        self.begins = np.zeros(lists, dtype=np.int64)
        self._parts: list[Ids] = []
        self._count = 0

    def add(self, number: int, ids: Ids) -> None:
        """Append those of a list."""
        self.begins[number] = self._count
        self._parts.append(ids)
        self._count += len(ids)

    def joined(self) -> Ids:
        """All of them."""
        return np.concatenate(self._parts)


class _Piece(NamedTuple):
    """Keys of one list with the queries that visit it."""

    stored: StoredList  # (n, D) keys, (n,) ids
    rows: Ids  # (c,) queries
    places: Ids  # (c,) where to write in the table


def _pieces(lists: Lists, dim: int, table: _Table, ids: _Ids) -> Iterator[_Piece]:
    """The lists visited, large ones in several pieces; their ids are left in ``ids``."""
    by_list = table.visits.ravel().argsort(kind="stable")
    counts = np.bincount(table.visits.ravel(), minlength=len(lists.sizes))
    begin = 0
    for number in np.flatnonzero(counts).tolist():
        count = int(counts[number])
        here, begin = by_list[begin : begin + count], begin + count
        rows, places = here // table.visits.shape[1], table.begins.ravel()[here]
        keys, its_ids = lists.read(number)
        ids.add(number, its_ids)
        step = max(1, min(_PRODUCTS // count, _NUMBERS // dim))
        for first in range(0, len(its_ids), step):
            part = slice(first, first + step)
            yield _Piece(StoredList(keys[part], its_ids[part]), rows, places + first)


def _groups(pieces: Iterable[_Piece], dim: int) -> Iterator[list[_Piece]]:
    """Consecutive pieces with at most `_NUMBERS` numbers of keys and as many of queries, or one piece alone."""
    group: list[_Piece] = []
    keys = rows = 0
    for piece in pieces:
        keys, rows = keys + len(piece.stored.ids), rows + len(piece.rows)
        if group and max(keys, rows) * dim > _NUMBERS:
            yield group
            group, keys, rows = [], len(piece.stored.ids), len(piece.rows)
        group.append(piece)
    if group:
        yield group


def _compute(lists: Lists, queries: Floats, bitmap: Bitmap | None, table: _Table) -> _Ids:
    """Fill in the distances, +inf where excluded, and return the ids of each list."""
    ids = _Ids(len(lists.sizes))
    dim = queries.shape[1]
    wide = torch.from_numpy(queries).double()
    norms = torch.linalg.vecdot(wide, wide)[:, None]
    for group in _groups(_pieces(lists, dim, table, ids), dim):
        # By way of float32, from which torch converts to float64 faster than from float16.
        keys = torch.from_numpy(np.concatenate([piece.stored.keys for piece in group])).float().double()
        squares = torch.from_numpy(np.einsum("nd,nd->n", keys.numpy(), keys.numpy()))  # no temporary of products
        if bitmap is not None:
            squares[torch.from_numpy(~_allowed(bitmap, np.concatenate([piece.stored.ids for piece in group])))] = np.inf
        counts, sizes = [len(piece.rows) for piece in group], [len(piece.stored.ids) for piece in group]
        rows = torch.from_numpy(np.concatenate([piece.rows for piece in group]))
        visiting = zip(wide.index_select(0, rows).split(counts), norms.index_select(0, rows).split(counts), strict=True)
        visited = zip(keys.split(sizes), squares.split(sizes), strict=True)
        for piece, (q, q_squares), (x, x_squares) in zip(group, visiting, visited, strict=True):
            distances = torch.addmm(x_squares, q, x.T, alpha=-2).add_(q_squares)
            # Rounding may leave nothing at all a hair below zero, where bits are not in order.
            table.write(piece.places, distances.float().abs_().numpy())
    return ids


def _allowed(bitmap: Bitmap, ids: Ids) -> npt.NDArray[np.bool_]:
    return (bitmap[ids >> 3] >> (ids & 7)) & 1 == 1


def _select(table: _Table, ids: _Ids, found: Found) -> None:
    """Write the k nearest of each query, in order; missing ones have id −1 and distance +inf."""
    all_ids = ids.joined()
    to_ids = ids.begins[table.visits] - table.begins  # from a place in the table to one in all_ids, per part
    step = max(1, _PRODUCTS // table.distances.shape[1])

    def select(first: int) -> None:
        rows = slice(first, first + step)
        _select_rows(table, rows, to_ids[rows], all_ids, Found(found.distances[rows], found.entry_ids[rows]))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(select, range(0, len(table.distances), step)))


def _select_rows(table: _Table, rows: slice, to_ids: Ids, all_ids: Ids, found: Found) -> None:
    distances, k = table.distances[rows], found.distances.shape[1]
    count, width = distances.shape
    near = distances < np.inf
    if k < width:  # keep the k nearest, and all that tie with the last of them
        near &= distances <= np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    at = np.flatnonzero(near)
    begin = rows.start * width
    # How many of them each part of the rows holds; places are ascending.
    parts = np.diff(np.searchsorted(at, table.ends[rows].ravel() - begin), prepend=0)
    entry_ids = all_ids[at + begin + np.repeat(to_ids.ravel(), parts)]
    # One integer, the distance's bits above the id: the order of integers is that of (distance, id).
    candidates = (distances.ravel()[at].view(np.int32).astype(np.int64) << _ID_BITS) | entry_ids
    kept = near.sum(axis=1)
    best = np.full((count, max(k, int(kept.max()))), _MISSING)
    best[np.arange(best.shape[1]) < kept[:, None]] = candidates
    best.sort(axis=1)
    best = best[:, :k]
    found.distances[:] = (best >> _ID_BITS).astype(np.int32).view(np.float32)
    found.entry_ids[:] = np.where(best == _MISSING, -1, best & ((1 << _ID_BITS) - 1))
