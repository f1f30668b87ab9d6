"""Order of search results: by distance, then by entry id, within a shard and across shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Found(NamedTuple):
    """Nearest entries, nearest first; a missing one has id −1 and distance +inf."""

    distances: npt.NDArray[np.float32]  # (B, K) squared L2
    entry_ids: npt.NDArray[np.int64]  # (B, K)


def sort_found(found: Found) -> Found:
    """Order each row by (distance, id); missing entries, whose distance is +inf, stay last."""
    order = np.lexsort((found.entry_ids, found.distances), axis=-1)
    return _take(found, order)


def merge_found(parts: Sequence[Found], k: int) -> Found:
    """The k nearest of several shards' results, by (distance, id).

    Args:
        parts: each sorted, in the order of their shards: ids of a later part are larger than those of an earlier one.
    """
    distances = np.concatenate([part.distances for part in parts], axis=1)
    entry_ids = np.concatenate([part.entry_ids for part in parts], axis=1)
    if len(parts) > 1:
        # Ties are in id order already, so a stable sort by distance alone keeps them so.
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances, entry_ids = _take(Found(distances, entry_ids), order)
    if (missing := k - distances.shape[1]) > 0:
        distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
        entry_ids = np.pad(entry_ids, ((0, 0), (0, missing)), constant_values=-1)
    return Found(distances[:, :k], entry_ids[:, :k])


def _take(found: Found, order: npt.NDArray[np.intp]) -> Found:
    return Found(np.take_along_axis(found.distances, order, 1), np.take_along_axis(found.entry_ids, order, 1))
