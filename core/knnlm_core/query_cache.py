"""Search results kept for contexts that come again: a prompt asked once more, a greedy retry, samples that still agree.

query ──signs of a random projection──► name ──► result kept ──the same query?──► nothing hidden since? ──► a hit

Keys of one context, computed in another batch or by another split of its tokens, differ in their last bits, so that no
exact hash would find them. The signs tell where to look, and the two queries themselves whether it is the same context.
A sign that flips is a miss, never a wrong answer.

What was found stays true as long as none of it is hidden: entries of a snapshot are never added or changed, and hiding
others does not change which are nearest. So every hit is held against what is hidden now, and a deletion reaches
kept results in the moment in which it reaches searches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from knnlm_core.datastore.entries import Entries
from knnlm_core.errors import InvalidParameter
from knnlm_core.retrieval import Searchable
from knnlm_core.types import EntryRange, Neighbors

MAX_ROWS = 64  # of one search; larger ones are scoring, which reads each context once
# Of the largest number in a query. Between batches, and between prefill and decoding, keys of SmolLM2-135M in float32
# differ by 2e-6 of it at most, those of different contexts by 1e-3 at least. In bfloat16 both are 1e-3 to 1e-2: there
# only a pass of the same shape gives a hit.
TOLERANCE = 1e-4
_SIGNS = 256  # with 64, contexts of text that repeats itself often share all of them, and push each other out
_OVERHEAD_BYTES = 2048  # of a result beside its numbers
_RANGE_BYTES = 128  # of an excluded range

_Name = tuple[int, tuple[EntryRange, ...], bytes]  # number of the datastore, what was excluded, signs


class QueryCacheUse(NamedTuple):
    """How much the cache holds and has spared."""

    hits: int  # rows that were not searched
    misses: int  # rows that were
    used_bytes: int
    max_bytes: int


class _Result(NamedTuple):
    query: Tensor  # (D,) float32
    neighbors: Neighbors  # (K,) each
    num_bytes: int


class QueryCache:
    """The results of single rows, the least recently used ones dropped first. For one thread, the engine's.

    Keeps no datastore alive; the results of one that is gone are dropped when the next row is looked up.

    Args:   max_bytes: bound on what is kept, copies of the queries included.
    Raises: InvalidParameter: a negative bound.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise InvalidParameter(
                f"`query_cache_bytes` must be at least 0, got {max_bytes}", param="query_cache_bytes"
            )
        self._max_bytes = max_bytes
        self._used_bytes = self._hits = self._misses = 0
        self._results: OrderedDict[_Name, _Result] = OrderedDict()  # least recently used first
        self._numbers: WeakKeyDictionary[Entries, int] = WeakKeyDictionary()
        self._next_number = 0
        self._num_numbered = 0  # datastores that have a number; more than there are in `_numbers` once one is gone
        self._projections: dict[int, Tensor] = {}

    @property
    def use(self) -> QueryCacheUse:
        """How much the cache holds now, and has spared since it was made; may be read by any thread."""
        return QueryCacheUse(self._hits, self._misses, self._used_bytes, self._max_bytes)

    def names(self, datastore: Entries, queries: Tensor, exclude: Sequence[EntryRange]) -> list[_Name]:
        """Under which name the result of each query (B, D) is kept."""
        number, excluded = self._number(datastore), tuple(exclude)
        signs = (queries @ self._projection(queries.shape[1]) >= 0).numpy()
        return [(number, excluded, bits.tobytes()) for bits in np.packbits(signs, axis=1)]

    def find(
        self, datastore: Entries, names: Sequence[_Name], queries: Tensor, k: int
    ) -> tuple[list[int], Neighbors | None]:
        """The H rows that need no search and their k nearest entries (H, k), which are the caller's own."""
        rows, kept = [], []
        for row, name in enumerate(names):
            result = self._results.get(name)
            if result is not None and len(result.neighbors.values) >= k:
                rows.append(row)
                kept.append(result)
        if not rows:
            return [], None
        found = Neighbors(
            *(
                torch.stack([part[:k] for part in column])
                for column in zip(*(result.neighbors for result in kept), strict=True)
            )
        )
        hit = is_same(queries[rows], torch.stack([result.query for result in kept]))
        hit &= datastore.are_visible(found.entry_ids).all(dim=1)
        if not bool(hit.all()):
            rows = [row for row, stays in zip(rows, hit.tolist(), strict=True) if stays]
            found = Neighbors(*(column[hit] for column in found))
        for row in rows:
            self._results.move_to_end(names[row])
        return rows, found

    def keep(self, name: _Name, query: Tensor, neighbors: Neighbors) -> None:
        """Keep copies of a query (D,) and of what was found for it, (K,) each, in place of what has the same name."""
        numbers = sum(column.nbytes for column in (query, *neighbors))
        num_bytes = numbers + _OVERHEAD_BYTES + _RANGE_BYTES * len(name[1])
        if num_bytes > self._max_bytes:
            return
        self._drop(name)
        while self._used_bytes + num_bytes > self._max_bytes:
            self._drop(next(iter(self._results)))
        self._results[name] = _Result(query.clone(), Neighbors(*(column.clone() for column in neighbors)), num_bytes)
        self._used_bytes += num_bytes

    def count(self, hits: int, misses: int) -> None:
        """Rows of a search that succeeded."""
        self._hits += hits
        self._misses += misses

    def _drop(self, name: _Name) -> None:
        if (result := self._results.pop(name, None)) is not None:
            self._used_bytes -= result.num_bytes

    def _number(self, datastore: Entries) -> int:
        if len(self._numbers) < self._num_numbered:
            alive = set(self._numbers.values())
            for name in [name for name in self._results if name[0] not in alive]:
                self._drop(name)
            self._num_numbered = len(alive)
        number = self._numbers.get(datastore)
        if number is None:
            number = self._numbers[datastore] = self._next_number
            self._next_number += 1
            self._num_numbered += 1
        return number

    def _projection(self, dim: int) -> Tensor:
        if dim not in self._projections:
            self._projections[dim] = torch.randn(dim, _SIGNS, generator=torch.Generator().manual_seed(0))
        return self._projections[dim]


class Cached:
    """A datastore whose repeated searches are answered from a cache. Equal where the datastore is the same one.

    A kept result is that of the query it was found for: distances differ from a search's as the two queries do.

    Args:
        searched: where to search; it sees only the rows that the cache does not answer.
        datastore: what that searches; tells which entries are hidden.
        cache: shared by all searches of a thread.
    """

    def __init__(self, searched: Searchable, datastore: Entries, cache: QueryCache) -> None:
        self._searched = searched
        self._datastore = datastore
        self._cache = cache

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """As the datastore's; more than MAX_ROWS rows do not touch the cache."""
        fits = queries.ndim == 2 and 1 <= len(queries) <= MAX_ROWS and queries.shape[1] == self._datastore.dim
        if not fits or k < 1:
            return self._searched.search(queries, k, exclude=exclude)
        queries = queries.detach().to("cpu", torch.float32)
        names = self._cache.names(self._datastore, queries, exclude)
        hits, known = self._cache.find(self._datastore, names, queries, k)
        if known is not None and len(hits) == len(queries):
            self._cache.count(len(hits), 0)
            return known
        missing = [row for row in range(len(queries)) if row not in hits]
        searched, answers = _searched_for(names, queries, missing)
        everything = len(searched) == len(queries)  # as most often: nothing to put together
        new = self._searched.search(queries if everything else queries[searched], k, exclude=exclude)
        for row, *columns in zip(searched, *new, strict=True):
            self._cache.keep(names[row], queries[row], Neighbors(*columns))
        self._cache.count(len(queries) - len(searched), len(searched))
        if everything:
            return new
        new = Neighbors(*(column[answers] for column in new))
        return new if known is None else _joined(hits, known, missing, new)

    def lookup(self, queries: Tensor, entry_ids: Tensor, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """As the datastore's."""
        return self._searched.lookup(queries, entry_ids, exclude=exclude)

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        """As the datastore's."""
        return self._searched.next_entry(entry_ids)

    def continuations(self, entry_ids: Tensor, length: int) -> Tensor:
        """As the datastore's."""
        return self._searched.continuations(entry_ids, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cached) and other._datastore is self._datastore

    def __hash__(self) -> int:
        return id(self._datastore)


def is_same(queries: Tensor, kept: Tensor) -> Tensor:
    """(B,) bool: whether queries (B, D) differ from kept ones only as keys of one context do.

    max_d |q_d − q'_d| ≤ TOLERANCE · max_d |q'_d|
    """
    return (queries - kept).abs().amax(dim=1) <= TOLERANCE * kept.abs().amax(dim=1)


def _searched_for(names: Sequence[_Name], queries: Tensor, missing: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of several rows of one context the first is searched: those rows, and which of them answers each missing one."""
    if len({names[row] for row in missing}) == len(missing):  # as most often
        return list(missing), list(range(len(missing)))
    first: dict[_Name, int] = {}
    firsts = [first.setdefault(names[row], row) for row in missing]
    same = is_same(queries[missing], queries[firsts]).tolist()
    asked = [of if is_one else row for row, of, is_one in zip(missing, firsts, same, strict=True)]
    searched = sorted(set(asked))
    place = {row: i for i, row in enumerate(searched)}
    return searched, [place[row] for row in asked]


def _joined(hits: list[int], known: Neighbors, missing: list[int], new: Neighbors) -> Neighbors:
    """Both in the order of the rows."""
    order = torch.empty(len(hits) + len(missing), dtype=torch.int64)
    order[[*hits, *missing]] = torch.arange(len(order))
    return Neighbors(*(torch.cat(pair)[order] for pair in zip(known, new, strict=True)))
