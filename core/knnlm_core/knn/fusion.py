"""From what several stores found for the same rows to one weighted list of neighbours and one λ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.types import Neighbors


class Fusion(StrEnum):
    """How several stores become one p_knn.

    DISTRIBUTIONS: each store has a distribution and a λ of its own, p_knn = Σ w_i λ_i p_knn,i / Σ w_i λ_i.
    NEIGHBORS: the neighbours of all stores share one softmax, as if one store held them all.
    """

    DISTRIBUTIONS = "distributions"
    NEIGHBORS = "neighbors"


class Part(NamedTuple):
    """What one store found; rows that do not use it have no neighbours in it."""

    neighbors: Neighbors  # (B, K)
    log_weights: Tensor  # (B, K) float32, of each one's share of the store's own p_knn
    knn_temperature: Tensor  # (B,) float32, τ > 0
    lmbda: Tensor  # (B,) float64, λ of the store
    weight: Tensor  # (B,) float64, of the store; those of a row sum to one


class Fused(NamedTuple):
    """The neighbours of all stores, store after store."""

    neighbors: Neighbors  # (B, ΣK)
    log_weights: Tensor  # (B, ΣK) float32, of each one's share of p_knn: a row sums to one, or has no neighbour at all
    lmbda: Tensor  # (B,) float64, weight of p_knn; 0 without neighbours
    shares: Tensor  # (B, S) float64, of each store's share of p_knn; 0 where it found nothing


def fuse(parts: Sequence[Part], merged: Tensor | None = None) -> Fused:
    """Put the findings of one or several stores together.

    λ = Σ w_i λ_i      log w_j = log(w_i λ_i / λ) + log softmax_i(−d_j / τ_i)      over stores that found something

    A store that found nothing leaves its λ to the language model. Where every λ is 0, stores count by their weights.

    Args:
        parts: at least one.
        merged: (B,) bool, rows of `Fusion.NEIGHBORS`, whose τ and λ are the same in all parts; None for no row.
    """
    within = [part.log_weights for part in parts]
    found = torch.stack([log_weights.amax(dim=1) > -math.inf for log_weights in within], dim=1)
    if len(parts) == 1:  # as nearly always: nothing to put together
        lmbda = torch.where(found[:, 0], parts[0].weight * parts[0].lmbda, 0.0)
        return Fused(parts[0].neighbors, within[0], lmbda, found.double())

    weights = torch.stack([part.weight for part in parts], dim=1).where(found, 0.0)
    lmbdas = torch.stack([part.lmbda for part in parts], dim=1).where(found, 0.0)
    lmbda = (weights * lmbdas).sum(dim=1)
    masses = torch.where((lmbda > 0)[:, None], weights * lmbdas, weights)
    if merged is not None:
        masses = torch.where(merged[:, None], _masses(parts, within, found), masses)
        lmbda = torch.where(merged, lmbdas.amax(dim=1), lmbda)
    total = masses.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, masses / total, 0.0)
    log_weights = [part + share[:, None].log().float() for part, share in zip(within, shares.unbind(1), strict=True)]
    columns = zip(*(part.neighbors for part in parts), strict=True)
    neighbors = Neighbors(*(torch.cat(column, dim=1) for column in columns))
    # Weights that sum to one only nearly must not make λ exceed 1.
    return Fused(neighbors, torch.cat(log_weights, dim=1), lmbda.clamp(max=1.0), shares)


def _masses(parts: Sequence[Part], within: Sequence[Tensor], found: Tensor) -> Tensor:
    """Σ_j exp(−d_j / τ) of each store, (B, S) float64, relative to the row's nearest neighbour."""
    nearest = torch.stack(
        [
            part.neighbors.distances.gather(1, log_weights.argmax(dim=1, keepdim=True))[:, 0].double()
            for part, log_weights in zip(parts, within, strict=True)
        ],
        dim=1,
    ).where(found, math.inf)
    tau = torch.stack([part.knn_temperature for part in parts], dim=1).double()
    # The nearest one's share of its store is 1 / Σ_j exp(−(d_j − d_nearest) / τ).
    log_sums = -torch.stack([log_weights.amax(dim=1) for log_weights in within], dim=1).double()
    log_masses = (log_sums - (nearest - nearest.amin(dim=1, keepdim=True)) / tau).where(found, -math.inf)
    return (log_masses - log_masses.amax(dim=1, keepdim=True)).exp().where(found, 0.0)
