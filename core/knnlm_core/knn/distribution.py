"""From retrieved neighbours to a distribution over the few tokens that they hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.types import Neighbors, SparseLogProbs


def neighbor_log_weights(neighbors: Neighbors, knn_temperature: Tensor) -> Tensor:
    """Log of each neighbour's share of p_knn.

    log w_i = −d_i / τ − log Σ_j exp(−d_j / τ)

    Args:
        neighbors: (B, K); missing entries have id −1 and carry no mass.
        knn_temperature: τ > 0, (B,) in units of squared distance; larger is flatter.
    Returns: (B, K) float32; −inf for missing entries, and everywhere in a row without neighbours.
    """
    # Relative to the nearest: a shift changes nothing in the softmax and keeps large distances exact.
    present = (neighbors.entry_ids >= 0) & torch.isfinite(neighbors.distances)
    distances = neighbors.distances.float().masked_fill(~present, math.inf)
    nearest = distances.amin(dim=1, keepdim=True)
    nearest = torch.where(torch.isfinite(nearest), nearest, 0.0)
    scores = -(distances - nearest) / knn_temperature[:, None]
    total = torch.logsumexp(scores, dim=1, keepdim=True)
    return torch.where(torch.isfinite(total), scores - total, -math.inf)


def check_temperature(knn_temperature: Tensor) -> None:
    """Raises InvalidKnnParams: unless 0 < τ < ∞ everywhere."""
    if not bool(((knn_temperature > 0) & torch.isfinite(knn_temperature)).all()):
        raise InvalidKnnParams(
            f"`knn.temperature` must be a finite number above 0, got {knn_temperature.min().item():g}",
            param="knn.temperature",
        )


def knn_log_probs(neighbors: Neighbors, *, knn_temperature: Tensor) -> SparseLogProbs:
    """Turn retrieved neighbours into next-token log-probabilities.

    p_knn(y) ∝ Σ_{i: v_i = y} exp(−d_i / τ)        Khandelwal et al. 2020, eq. 2 (τ = 1 there)

    Args:
        neighbors: (B, K) squared L2 distances; missing entries have id −1 and carry no mass.
        knn_temperature: τ > 0, (B,).
    Returns: as `token_log_probs`.
    Raises: InvalidKnnParams: τ ≤ 0 or not finite.
    """
    check_temperature(knn_temperature)
    return token_log_probs(neighbors.values, neighbor_log_weights(neighbors, knn_temperature))


def token_log_probs(values: Tensor, log_weights: Tensor) -> SparseLogProbs:
    """Add up weighted neighbours by token.

    log p_knn(y) = log Σ_{i: v_i = y} w_i

    Args:
        values: (B, K) token ids, in any order.
        log_weights: (B, K) log w_i; −inf carries no mass, whatever the value.
    Returns: (B, K) token ids and log-probabilities, each row summing to Σ w in probability. A token that several
        neighbours hold appears once; what is left over is padding: a token of the row with log-probability −inf.
        In a row without mass everything is padding.
    """
    present = log_weights > -math.inf
    # Neighbours without mass take the token of the nearest one with mass, so that every id is a valid one.
    fallback = values.gather(1, present.int().argmax(dim=1, keepdim=True)).clamp(min=0)
    tokens, order = torch.sort(torch.where(present, values, fallback), dim=1, stable=True)
    log_weights = log_weights.gather(1, order)

    #   tokens   3 3 3 7 9 9          each run of equal tokens is one segment;
    #   segment  0 0 0 1 2 2          its log-sum-exp lands at the segment's number, the rest stays padding
    starts = torch.ones_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    segment = starts.long().cumsum(dim=1) - 1
    peak = torch.full_like(log_weights, -math.inf).scatter_reduce(1, segment, log_weights, "amax")
    peak_of = peak.gather(1, segment)
    shifted = torch.where(peak_of > -math.inf, (log_weights - peak_of).exp(), 0.0)
    mass = torch.zeros_like(log_weights).scatter_add(1, segment, shifted)
    log_probs = torch.where(mass > 0, peak + mass.log(), -math.inf)
    token_ids = tokens[:, :1].expand_as(tokens).clone().scatter(1, segment, tokens)
    return SparseLogProbs(token_ids, log_probs)


def target_log_probs(neighbors: Neighbors, targets: Tensor, *, knn_temperature: Tensor) -> Tensor:
    """log p_knn of one token per row: all that scoring needs.

    Args:
        targets: (B,) token ids.
        knn_temperature: τ > 0, (B,).
    Returns: (B,) float32; −inf where no neighbour holds the target.
    Raises: InvalidKnnParams: τ ≤ 0 or not finite.
    """
    check_temperature(knn_temperature)
    return target_log_mass(neighbors.values, neighbor_log_weights(neighbors, knn_temperature), targets)


def target_log_mass(values: Tensor, log_weights: Tensor, targets: Tensor) -> Tensor:
    """`token_log_probs` of one token per row: (B,); −inf where no neighbour with mass holds the target."""
    return torch.logsumexp(log_weights.masked_fill(values != targets[:, None], -math.inf), dim=1)


def has_neighbors(neighbors: Neighbors) -> Tensor:
    """(B,) bool: rows with at least one neighbour; the others have no p_knn at all."""
    return ((neighbors.entry_ids >= 0) & torch.isfinite(neighbors.distances)).any(dim=1)
