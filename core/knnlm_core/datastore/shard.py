"""One shard: its keys, values and index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import KeyArray, ValueColumns, map_keys, map_values
from knnlm_core.datastore.batch_search import IvfLists, WholeIndex, search_batch
from knnlm_core.datastore.exclusion import Bitmap, clear_bits, nothing_excluded
from knnlm_core.datastore.index import build_in_memory, map_index, stored_keys
from knnlm_core.datastore.manifest import Manifest, ShardSection
from knnlm_core.datastore.merge import Found, sort_found
from knnlm_core.errors import DatastoreCorrupt

Queries = npt.NDArray[np.float32]

# From how many queries on reading a list once for all of them is the faster way; measured on two cores with D = 576.
BATCH_FROM = 16  # queries that visit each list, on average
BATCH_FROM_WHOLE = 64  # queries of an index without lists

_swig: Any = faiss  # faiss's annotations know the C++ constructors only, not the keyword forms


class Shard:
    """A contiguous range of entries with its index; searching it is thread-safe, also while entries are hidden.

    Entries are numbered from 0 here; whoever puts shards together adds what stands before.

    Attributes:
        entries: n.
        keys: (n, D), read-only.
        hidden: entries that no search finds any more, as `allowed_bitmap` has them; None if there is none.
    """

    def __init__(self, index: Any, keys: KeyArray, columns: ValueColumns, *, is_trained: bool, origin: str) -> None:
        self.entries = len(keys)
        self.keys = keys
        self.columns = columns
        self.hidden: Bitmap | None = None
        self._index = index
        self._trained = is_trained
        self._origin = origin

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, section: ShardSection) -> Self:
        """Map a shard of a version. Raises DatastoreCorrupt: a file is not what the manifest says."""
        path, dim, entries = folder / layout.INDEX, manifest.key.dim, section.entries
        keys = map_keys(folder / layout.KEYS, dim, entries)
        columns = map_values(folder / layout.VALUES, entries)
        index = map_index(path, manifest.index, dim=dim, entries=entries)
        return cls(index, keys, columns, is_trained=manifest.index.is_trained, origin=str(path))

    @classmethod
    def in_memory(cls, keys: Sequence[KeyArray], columns: ValueColumns, *, origin: str) -> Self:
        """A shard that is scanned whole, with a copy of its keys; ``origin`` is for messages."""
        index = build_in_memory(keys)
        return cls(index, stored_keys(index), columns, is_trained=False, origin=origin)

    def hide(self, first: int, stop: int) -> None:
        """Never again find entries ``first … stop − 1``; a search under way may still return them."""
        if first < stop:
            hidden = self.hidden if self.hidden is not None else nothing_excluded(self.entries)
            clear_bits(hidden, first, stop)
            self.hidden = hidden

    def search(self, queries: Queries, k: int, *, bitmap: Bitmap | None, nprobe: int) -> Found:
        """The first min(k, n) of the shard by (distance, id), −1 where fewer may be found.

        Args:
            bitmap: entries that may be found, see `allowed_bitmap`; None for all.
            nprobe: lists to visit; an index without lists always looks at everything.
        Raises: DatastoreCorrupt: the index holds an id that the shard does not.
        """
        k = min(k, self.entries)
        if self._reads_once(len(queries), nprobe):
            lists = IvfLists(self._index, nprobe, self._origin) if self._trained else WholeIndex(self._index)
            found = search_batch(lists, queries, k, bitmap)
        else:
            found = self._scan(queries, k, bitmap, nprobe)
        if int(found.entry_ids.max(initial=-1)) >= self.entries:
            raise DatastoreCorrupt(f"{self._origin} holds entry {found.entry_ids.max()} of {self.entries}")
        return found

    def _reads_once(self, queries: int, nprobe: int) -> bool:
        if self._trained:
            return bool(queries * nprobe >= BATCH_FROM * self._index.nlist)
        return queries >= BATCH_FROM_WHOLE

    def _scan(self, queries: Queries, k: int, bitmap: Bitmap | None, nprobe: int) -> Found:
        # faiss keeps bare pointers to selector and bitmap: both live as local names until the search returns.
        selector = None if bitmap is None else _swig.IDSelectorBitmap(bitmap)
        if self._trained:
            params = _swig.SearchParametersIVF(sel=selector, nprobe=nprobe)
        else:
            params = _swig.SearchParameters(sel=selector)
        return self._search(queries, k, params)

    def _search(self, queries: Queries, k: int, params: Any) -> Found:
        # faiss keeps whichever of several equally distant entries it meets first. One neighbour more than asked for
        # shows whether such a tie crosses the k-boundary; then ever more are fetched until it does not.
        width = min(k + 1, self.entries)
        distances, ids = self._index.search(queries, width, params=params)
        distances[ids < 0] = np.inf
        found = Found(distances, ids)
        if (distances[:, 1:] == distances[:, :-1])[ids[:, 1:] >= 0].any():
            found = sort_found(found)
        best = Found(found.distances[:, :k].copy(), found.entry_ids[:, :k].copy())
        if width > k and width < self.entries:
            cut = (found.entry_ids[:, k] >= 0) & (found.distances[:, k] == found.distances[:, k - 1])
            if cut.any():
                wider = self._search(queries[cut], min(4 * k, self.entries), params)
                best.distances[cut], best.entry_ids[cut] = wider.distances[:, :k], wider.entry_ids[:, :k]
        return best
