"""Which entries the probabilities of some tokens came from, in a few bytes for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from knnlm_core.knn.attribution import contributions
from knnlm_core.mixture import Found


class Attributions(NamedTuple):
    """Shares of the probabilities of T tokens: the LM's, and those of C entries, token after token."""

    model: NDArray[np.float64]  # (T,)
    counts: NDArray[np.int64]  # (T,) entries of each token
    sources: NDArray[np.int8]  # (C,) which source of the retrieval
    entry_ids: NDArray[np.int64]  # (C,)
    shares: NDArray[np.float32]  # (C,)

    def part(self, start: int, stop: int) -> Attributions:
        """Of the tokens ``start … stop − 1``."""
        rows = slice(int(self.counts[:start].sum()), int(self.counts[:stop].sum()))
        return Attributions(
            self.model[start:stop],
            self.counts[start:stop],
            self.sources[rows],
            self.entry_ids[rows],
            self.shares[rows],
        )


def attribute(found: Found, targets: Tensor, lm_log_probs: Tensor) -> Attributions:
    """Of one known token per row.

    Args:
        targets: (B,) token ids.
        lm_log_probs: (B,) log p_lm of the targets.
    """
    parts = contributions(
        found.neighbors.values, found.log_weights, found.lmbda, targets=targets, lm_log_probs=lm_log_probs
    )
    return Attributions(
        parts.model.cpu().numpy(),
        parts.rows.bincount(minlength=len(targets)).cpu().numpy(),
        found.sources[parts.columns].cpu().numpy().astype(np.int8),
        found.neighbors.entry_ids[parts.rows, parts.columns].cpu().numpy(),
        parts.shares.float().cpu().numpy(),
    )


def join(parts: Sequence[Attributions]) -> Attributions:
    """Of tokens one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Attributions(*(np.concatenate(column) for column in zip(*parts, strict=True)))
