"""p = λ · p_knn + (1 − λ) · p_lm, in log space, touching only the tokens that were retrieved."""

from __future__ import annotations

import torch
from torch import Tensor

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.types import SparseLogProbs


def check_lmbda(lmbda: Tensor) -> None:
    """Raises InvalidKnnParams: unless 0 ≤ λ ≤ 1 everywhere."""
    if not bool(((lmbda >= 0) & (lmbda <= 1)).all()):
        worst = lmbda[~((lmbda >= 0) & (lmbda <= 1))][0].item()
        raise InvalidKnnParams(f"`knn.lambda` must be in 0 … 1, got {worst:g}", param="knn.lambda")


def interpolate(lm_log_probs: Tensor, knn: SparseLogProbs, lmbda: Tensor) -> Tensor:
    """Mix the LM's distribution with the neighbours'.

    log p(y) = logaddexp(log(1 − λ) + log p_lm(y), log λ + log p_knn(y))

    Args:
        lm_log_probs: (B, V) float32, log-softmaxed.
        knn: (B, U) sparse; a row that is all padding must come with λ = 0.
        lmbda: λ in [0, 1], (B,).
    Returns: (B, V), a new tensor. λ = 0 gives p_lm and λ = 1 gives p_knn exactly.
    Raises: InvalidKnnParams: λ outside [0, 1].
    """
    check_lmbda(lmbda)
    mixed = lm_log_probs + torch.log1p(-lmbda)[:, None]
    retrieved = torch.logaddexp(mixed.gather(1, knn.token_ids), knn.log_probs + torch.log(lmbda)[:, None])
    # Padding carries its token's unmixed value, which is never the larger one.
    return mixed.scatter_reduce(1, knn.token_ids, retrieved, "amax", include_self=True)


def interpolate_targets(lm_log_probs: Tensor, knn_log_probs: Tensor, lmbda: Tensor) -> Tensor:
    """`interpolate` for one token per row: (B,) each, and λ in [0, 1], (B,).

    Raises: InvalidKnnParams: λ outside [0, 1].
    """
    check_lmbda(lmbda)
    return torch.logaddexp(lm_log_probs + torch.log1p(-lmbda), knn_log_probs + torch.log(lmbda))
