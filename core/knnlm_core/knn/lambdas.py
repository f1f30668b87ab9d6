"""How much to trust what was found: λ from the neighbours' distances, and from what the language model thinks.

Rules are asked after a search, so that they see the distances; when to search at all is the gate's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from knnlm_core.signals import LMSignals
from knnlm_core.types import Neighbors


class LambdaMode(StrEnum):
    """How λ is set."""

    FIXED = "fixed"  # one number
    BUCKETED = "bucketed"  # by the distance of the nearest neighbour
    RRC = "rrc"  # by how much nearer the nearest neighbour is than the farthest
    LEARNED = "learned"  # by a small network, from distances, agreement and the LM's own signals


class LambdaRule(Protocol):
    """λ for rows that have been searched."""

    def __call__(self, neighbors: Neighbors, knn_temperature: Tensor, signals: LMSignals) -> Tensor:
        """(B,) float64 in [0, 1]; whatever it says of a row without neighbours is ignored.

        Args:
            neighbors: (B, K), nearest first.
            knn_temperature: τ, (B,).
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Bucketed:
    """A λ per range of the nearest neighbour's distance (Drozdov et al. 2022).

    Attributes:
        edges: (n − 1,) ascending squared distances; frozen when they were fitted, and nothing lies beyond the outer two
            buckets, whatever its distance.
        lmbdas: (n,) in [0, 1], for the nearest first.
    """

    edges: Tensor
    lmbdas: Tensor

    def __call__(self, neighbors: Neighbors, knn_temperature: Tensor, signals: LMSignals) -> Tensor:
        """See `LambdaRule`."""
        return self.lmbdas[torch.bucketize(neighbors.distances[:, 0].contiguous(), self.edges)]


@dataclass(frozen=True, slots=True)
class Rrc:
    """Relative retrieval confidence (Li et al. 2024, NEST); there λ weighs p_lm, here as everywhere p_knn.

    λ = 1 − σ((d_nearest / d_farthest − α) / s)

    Attributes:
        alpha: α, the ratio of distances at which λ is ½.
        scale: s > 0; the smaller, the more abrupt.
    """

    alpha: float
    scale: float

    def __call__(self, neighbors: Neighbors, knn_temperature: Tensor, signals: LMSignals) -> Tensor:
        """See `LambdaRule`."""
        present = neighbors.entry_ids >= 0
        farthest = neighbors.distances.masked_fill(~present, 0.0).amax(dim=1).double()
        # Where all neighbours are exact repetitions nothing could be surer.
        ratio = torch.where(farthest > 0, neighbors.distances[:, 0].double() / farthest, 0.0)
        return torch.sigmoid((self.alpha - ratio) / self.scale)
