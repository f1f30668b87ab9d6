"""How much of what an exact search finds an index finds too."""

from __future__ import annotations

import math

from torch import Tensor

from knnlm_core.datastore.entries import Entries
from knnlm_core.errors import VerifyFailed
from knnlm_core.types import Neighbors

SELF_QUERIES = 256  # stored keys that a finished version is asked for
MIN_SELF_RECALL = 0.99
_ROUNDING = 1e-6  # of the squared norm; other keys are farther away by several orders of magnitude


def row_recall(found: Neighbors, exact: Neighbors, k: int) -> Tensor:
    """Share of each query's exact k nearest that were found among k; an equally near entry counts as found.

    Args:     found, exact: of the same queries, (B, ≥ k).
    Returns:  (B,) float32 in 0 … 1; 1 where there is nothing to find.
    """
    farthest = exact.distances[:, :k].masked_fill(exact.entry_ids[:, :k] < 0, -math.inf).amax(dim=1)
    wanted = (exact.entry_ids[:, :k] >= 0).sum(dim=1)
    # Distances of the two paths differ in the last bits.
    near = (found.distances[:, :k] <= farthest[:, None] * (1 + 1e-4) + 1e-4) & (found.entry_ids[:, :k] >= 0)
    hits = near.sum(dim=1).minimum(wanted)
    return (hits / wanted.clamp(min=1)).masked_fill(wanted == 0, 1.0)


def self_recall(entries: Entries, ids: Tensor, *, nprobe: int | None = None) -> float:
    """Share of some entries whose stored key finds an equal key, at no distance, as its nearest.

    Repeated text has equal keys: any entry with the same key is the same place. Distances are the index's own opinion,
    and rounded where many queries are searched at once; whether its row numbers are those of the stored keys, only the
    keys can tell.
    """
    keys = entries.keys(ids)
    found = entries.search(keys, 1, nprobe=nprobe)
    is_same = (entries.keys(found.entry_ids[:, 0].clamp(min=0)) == keys).all(dim=1)
    no_distance = found.distances[:, 0] <= _ROUNDING * keys.square().sum(dim=1)
    return float((is_same & no_distance).double().mean())


def check_self_recall(entries: Entries, ids: Tensor, *, nprobe: int | None = None) -> float:
    """As `self_recall`. Raises VerifyFailed: it is below `MIN_SELF_RECALL`."""
    share = self_recall(entries, ids, nprobe=nprobe)
    if share < MIN_SELF_RECALL:
        raise VerifyFailed(f"self-recall is {share:.4f}, at least {MIN_SELF_RECALL} is needed")
    return share
