"""What the language model's own prediction tells about how much it needs help: free, since it is computed anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LMSignals(NamedTuple):
    """Of B predictions of the language model alone."""

    max_log_prob: Tensor  # (B,) float32, of the likeliest token
    margin: Tensor  # (B,) float32, log-probability of the likeliest token minus that of the second
    entropy: Tensor  # (B,) float32, nats
    guess: Tensor  # (B,) int64, the likeliest token

    def take(self, rows: Tensor | slice) -> LMSignals:
        """Some of the rows."""
        return LMSignals(*(column[rows] for column in self))


class Normalized(NamedTuple):
    """Signals of B predictions, and what turns their logits into log-probabilities when it is subtracted."""

    signals: LMSignals
    normalizer: Tensor  # (B,) float32


def lm_signals(logits: Tensor) -> LMSignals:
    """Signals of (B, V) float32 logits, or log-probabilities; V ≥ 2."""
    return normalized_signals(logits).signals


def normalized_signals(logits: Tensor) -> Normalized:
    """`lm_signals`, reading the logits as few times as can be: scoring does so for every row.

    entropy = log Z − Σ p x      for logits x with p = exp(x) / Z
    """
    best = logits.topk(2, dim=1)
    first, second = best.values.unbind(1)
    mass = (logits - first[:, None]).exp_()
    total = mass.sum(dim=1)
    normalizer = first + total.log()
    mean = torch.bmm(mass[:, None], logits[:, :, None])[:, 0, 0] / total
    if not bool(torch.isfinite(mean).all()):  # tokens that cannot come have a logit of −∞, and 0 · ∞ is no number
        mean = torch.where(mass > 0, mass * logits, 0.0).sum(dim=1) / total
    # A margin over a token that cannot come would be infinite, and no model of anything bears infinities.
    margin = (first - second).clamp(max=MAX_MARGIN)
    entropy = (normalizer - mean).clamp(min=0.0)
    return Normalized(LMSignals(first - normalizer, margin, entropy, best.indices[:, 0]), normalizer)


def join_signals(parts: list[LMSignals]) -> LMSignals:
    """One after the other."""
    return LMSignals(*(torch.cat(column) for column in zip(*parts, strict=True)))


MAX_MARGIN = 100.0  # nats; far beyond what float32 probabilities can tell apart
