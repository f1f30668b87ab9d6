"""How much of what an exact search finds an index finds too."""

from __future__ import annotations

import math

from torch import Tensor

from knnlm_core.types import Neighbors


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
