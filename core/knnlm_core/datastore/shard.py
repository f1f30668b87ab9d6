"""One mapped shard: its keys, values and index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import map_keys, map_values
from knnlm_core.datastore.batch_search import IvfLists, WholeIndex, search_batch
from knnlm_core.datastore.exclusion import allowed_bitmap
from knnlm_core.datastore.index import map_index
from knnlm_core.datastore.manifest import Manifest, ShardSection
from knnlm_core.datastore.merge import Found, sort_found
from knnlm_core.errors import DatastoreCorrupt
from knnlm_core.types import EntryRange

Queries = npt.NDArray[np.float32]

# From how many queries on reading a list once for all of them is the faster way; measured on two cores with D = 576.
BATCH_FROM = 16  # queries that visit each list, on average
BATCH_FROM_WHOLE = 64  # queries of an index without lists

_swig: Any = faiss  # faiss's annotations know the C++ constructors only, not the keyword forms


class Shard:
    """A contiguous range of entries, mapped read-only; searching it is thread-safe.

    Raises: DatastoreCorrupt: a file is not what the manifest says.
    """

    def __init__(self, folder: Path, manifest: Manifest, section: ShardSection) -> None:
        self.first_entry = section.first_entry
        self.entries = section.entries
        self.keys = map_keys(folder / layout.KEYS, manifest.key.dim, section.entries)
        self.columns = map_values(folder / layout.VALUES, section.entries)
        self._path = folder / layout.INDEX
        self._trained = manifest.index.is_trained
        self._index = map_index(self._path, manifest.index, dim=manifest.key.dim, entries=section.entries)

    def search(self, queries: Queries, k: int, *, exclude: Sequence[EntryRange], nprobe: int) -> Found:
        """The first min(k, entries) of the shard by (distance, id), with global ids.

        Args:     nprobe: lists to visit; an index without lists always looks at everything.
        Raises:   DatastoreCorrupt: the index holds an id that the shard does not.
        """
        bitmap = allowed_bitmap(exclude, self.first_entry, self.entries)
        k = min(k, self.entries)
        if self._reads_once(len(queries), nprobe):
            lists = IvfLists(self._index, nprobe, self._path) if self._trained else WholeIndex(self._index)
            found = search_batch(lists, queries, k, bitmap)
        else:
            found = self._scan(queries, k, bitmap, nprobe)
        if int(found.entry_ids.max(initial=-1)) >= self.entries:
            raise DatastoreCorrupt(f"{self._path} holds entry {found.entry_ids.max()} of {self.entries}")
        found.entry_ids[found.entry_ids >= 0] += self.first_entry
        return found

    def _reads_once(self, queries: int, nprobe: int) -> bool:
        if self._trained:
            return bool(queries * nprobe >= BATCH_FROM * self._index.nlist)
        return queries >= BATCH_FROM_WHOLE

    def _scan(self, queries: Queries, k: int, bitmap: npt.NDArray[np.uint8] | None, nprobe: int) -> Found:
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
