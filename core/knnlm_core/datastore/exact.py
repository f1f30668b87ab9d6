"""Exact search by matrix products over the stored keys: what indexes are measured against, and fast for many queries.

‖q − x‖² = ‖q‖² − 2q·x + ‖x‖² cancels badly where keys share a large mean (here 58–71 % of the squared norm), so the
products only nominate candidates; their distances are recomputed directly, and a bound on the rounding error shows
whether a nearer entry can have been missed. Rows where it can are nominated again, within that bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_core.datastore.exclusion import Bitmap, allowed_mask
from knnlm_core.datastore.merge import Found, merge_found, sort_found
from knnlm_core.datastore.shard import Queries, Shard

_BLOCK_KEYS = 16_384
_BLOCK_QUERIES = 1_024
_SPARE_CANDIDATES = 32
_GATHER_NUMBERS = 16 * 1024 * 1024  # float32 numbers gathered at a time when distances are recomputed
_EPSILON = float(np.finfo(np.float32).eps)


class ExactPart(NamedTuple):
    """A shard to be searched."""

    first_entry: int  # added to its ids
    shard: Shard
    bitmap: Bitmap | None  # entries that may be found; None for all


def search_exact(parts: Sequence[ExactPart], queries: Queries, k: int) -> Found:
    """The k nearest entries by (distance, id), with direct distances to the stored fp16 keys.

    Memory: about 2·D·64 KiB for a block of keys and (k + 64 Ki)·1,024 numbers for a block of queries.
    """
    blocks = []
    for first in range(0, len(queries), _BLOCK_QUERIES):
        block = queries[first : first + _BLOCK_QUERIES]
        blocks.append(merge_found([_search_part(part, block, k) for part in parts], k))
    if not blocks:
        return Found(np.empty((0, k), np.float32), np.empty((0, k), np.int64))
    return Found(*(np.concatenate(columns) for columns in zip(*blocks, strict=True)))


def direct_distances(shard: Shard, queries: Queries, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Squared L2 between each query (B, D) and some stored keys (B, C), by differences; +inf where the row is −1."""
    distances = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _GATHER_NUMBERS // max(1, rows.shape[1] * queries.shape[1]))
    for first in range(0, len(rows), step):
        chosen = slice(first, first + step)
        difference = shard.keys[rows[chosen]].astype(np.float32)  # (b, C, D)
        difference -= queries[chosen, None, :]
        np.einsum("bcd,bcd->bc", difference, difference, out=distances[chosen])
    distances[rows < 0] = np.inf
    return distances


def _search_part(part: ExactPart, queries: Queries, k: int) -> Found:
    shard, bitmap = part.shard, part.bitmap
    k = min(k, shard.entries)
    width = min(k + _SPARE_CANDIDATES, shard.entries)
    nominated = torch.full((len(queries), 0), np.inf)
    rows = torch.full((len(queries), 0), -1, dtype=torch.int64)
    largest_norm = 0.0
    for first, products, norms in _products(shard, queries, bitmap):
        largest_norm = max(largest_norm, float(norms.max()) ** 0.5)
        ids = torch.arange(first, first + products.shape[1]).expand_as(products)
        nominated, at = torch.cat([nominated, products], 1).topk(min(width, nominated.shape[1] + len(norms)), 1, False)
        rows = torch.cat([rows, ids], 1).gather(1, at)
    rows[nominated == np.inf] = -1  # excluded
    best = _nearest(shard, queries, rows.numpy(), k)

    # |products − direct| ≤ bound: rounding of sums of D terms, each at most (‖q‖ + ‖x‖)² in all.
    norms = np.sqrt(np.einsum("bd,bd->b", queries, queries)) + largest_norm
    bound = (2 * queries.shape[1] ** 0.5 + 8) * _EPSILON * norms**2
    last = nominated.numpy().max(axis=1)
    # Where the last nomination is an excluded entry, every other entry has been nominated.
    missed = np.isfinite(last) & (last - bound <= best.distances[:, -1])
    if width < shard.entries and missed.any():
        reach = (best.distances[missed, -1] + bound[missed])[:, None]
        for row, ids_within in zip(np.flatnonzero(missed), _within(shard, queries[missed], bitmap, reach), strict=True):
            again = _nearest(shard, queries[row : row + 1], ids_within[None], k)
            best.distances[row], best.entry_ids[row] = again.distances[0], again.entry_ids[0]
    best.entry_ids[best.entry_ids >= 0] += part.first_entry
    return best


def _nearest(shard: Shard, queries: Queries, rows: npt.NDArray[np.int64], k: int) -> Found:
    found = sort_found(Found(direct_distances(shard, queries, rows), rows))
    return Found(found.distances[:, :k], found.entry_ids[:, :k])


def _products(shard: Shard, queries: Queries, bitmap: Bitmap | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Per block of keys: its first row, ‖q‖² − 2q·x + ‖x‖² (B, block) with +inf where excluded, and ‖x‖² (block,)."""
    wanted = torch.from_numpy(queries)
    query_norms = wanted.square().sum(1, keepdim=True)
    for first in range(0, shard.entries, _BLOCK_KEYS):
        # numpy's conversion from fp16 is ten times faster than torch's, and a mapped array is no torch tensor.
        keys = torch.from_numpy(shard.keys[first : first + _BLOCK_KEYS].astype(np.float32))
        norms = keys.square().sum(1)
        products = torch.addmm(norms[None], wanted, keys.T, alpha=-2).add_(query_norms)
        if bitmap is not None:
            allowed = allowed_mask(bitmap, first, first + len(keys))
            products[:, torch.from_numpy(~allowed)] = np.inf
        yield first, products, norms


def _within(
    shard: Shard, queries: Queries, bitmap: Bitmap | None, reach: npt.NDArray[np.float32]
) -> list[npt.NDArray[np.int64]]:
    """Per query the rows that the products place within ``reach`` (B, 1)."""
    found: list[list[npt.NDArray[np.int64]]] = [[] for _ in queries]
    for first, products, _ in _products(shard, queries, bitmap):
        near = products.numpy() <= reach
        for query, row in enumerate(near):
            found[query].append(np.flatnonzero(row) + first)
    return [np.concatenate(rows) for rows in found]
