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


def lm_signals(lm_log_probs: Tensor) -> LMSignals:
    """Signals of (B, V) float32 log-softmaxed predictions, V ≥ 2."""
    best = lm_log_probs.topk(2, dim=1)
    first, second = best.values.unbind(1)
    # A margin over a token that cannot come would be infinite, and no model of anything bears infinities.
    margin = (first - second).clamp(max=MAX_MARGIN)
    return LMSignals(first, margin, torch.special.entr(lm_log_probs.exp()).sum(dim=1), best.indices[:, 0])


def join_signals(parts: list[LMSignals]) -> LMSignals:
    """One after the other."""
    return LMSignals(*(torch.cat(column) for column in zip(*parts, strict=True)))


MAX_MARGIN = 100.0  # nats; far beyond what float32 probabilities can tell apart
