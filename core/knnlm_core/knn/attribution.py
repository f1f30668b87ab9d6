"""What the probability of a token consists of: the language model's part, and each neighbour's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Contributions(NamedTuple):
    """Shares of the probability of one token per row; C neighbours that hold it in all, row after row."""

    model: Tensor  # (B,) float64, what came from the LM
    rows: Tensor  # (C,) int64, ascending
    columns: Tensor  # (C,) int64, of the neighbour in its row
    shares: Tensor  # (C,) float64; with the LM's, those of a row sum to one


def contributions(
    values: Tensor, log_weights: Tensor, lmbda: Tensor, *, targets: Tensor, lm_log_probs: Tensor
) -> Contributions:
    """Divide p(target) among the LM and the neighbours that hold the target.

    share_i = λ w_i / p      share_lm = (1 − λ) p_lm / p      p = (1 − λ) p_lm + λ Σ_{i: v_i = target} w_i

    Needs memory for the (B, K) comparison and for what it finds. A target of probability zero is the LM's alone.

    Args:
        values, log_weights: (B, K) tokens of the neighbours and log w_i, each row summing to one; −inf carries no mass.
        lmbda: (B,) λ.
        targets: (B,) token ids.
        lm_log_probs: (B,) log p_lm of the targets.
    """
    lmbda = lmbda.double()
    held = (values == targets[:, None]) & (log_weights > -math.inf) & (lmbda > 0)[:, None]
    rows, columns = held.nonzero(as_tuple=True)
    log_mass = log_weights[rows, columns].double() + lmbda[rows].log()
    log_model = lm_log_probs.double() + torch.log1p(-lmbda)
    # Relative to the largest part of the row, so that nothing that matters underflows.
    peak = log_model.scatter_reduce(0, rows, log_mass, "amax")
    peak = torch.where(peak > -math.inf, peak, 0.0)
    model, mass = (log_model - peak).exp(), (log_mass - peak[rows]).exp()
    total = model.index_add(0, rows, mass)
    return Contributions(torch.where(total > 0, model / total, 1.0), rows, columns, mass / total[rows])
