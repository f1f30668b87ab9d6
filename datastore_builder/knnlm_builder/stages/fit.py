"""Fit τ, λ and k to cached neighbours of held-out tokens: one search, then arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm_core.knn.distribution import has_neighbors, target_log_probs
from knnlm_core.knn.interpolation import interpolate_targets
from knnlm_core.signals import LMSignals, join_signals
from knnlm_core.types import Neighbors

K_CHOICES = (8, 32, 128, 1024)
# A smaller k is preferred while it costs at most this share of perplexity.
K_TOLERANCE = 0.002
LMBDAS = tuple(i / 100 for i in range(1, 100))
# τ is searched around the median distance of the nearest neighbour, which scales with the model.
TAU_STEPS_PER_OCTAVE = 2
TAU_FACTORS = tuple(2.0 ** (i / TAU_STEPS_PER_OCTAVE) for i in range(-14, 7))  # 1/128 … 8
_DRAWS_AT_ONCE = 1 << 22  # of the bootstrap


class Evidence(NamedTuple):
    """What is known of N held-out tokens after one search for K neighbours each."""

    base: Tensor  # (N,) log p_lm of the token
    neighbors: Neighbors  # (N, K), nearest first
    targets: Tensor  # (N,)
    blocks: Tensor  # (N,) int64, which block of neighbouring tokens each belongs to, for the bootstrap
    signals: LMSignals  # of the LM's prediction of each

    def take(self, rows: Tensor) -> Evidence:
        """Some of the tokens."""
        neighbors = Neighbors(*(part[rows] for part in self.neighbors))
        return Evidence(self.base[rows], neighbors, self.targets[rows], self.blocks[rows], self.signals.take(rows))

    def joined(self, other: Evidence) -> Evidence:
        """These tokens and then the others, of other blocks."""
        neighbors = Neighbors(*(torch.cat(pair) for pair in zip(self.neighbors, other.neighbors, strict=True)))
        blocks = torch.cat([self.blocks, other.blocks + self.blocks.max() + 1])
        base, targets = (torch.cat(pair) for pair in ((self.base, other.base), (self.targets, other.targets)))
        return Evidence(base, neighbors, targets, blocks, join_signals([self.signals, other.signals]))

    def nearest(self, k: int) -> Evidence:
        """The same tokens with fewer neighbours."""
        return self._replace(neighbors=Neighbors(*(part[:, :k] for part in self.neighbors)))


class Fit(NamedTuple):
    """Settings and the mean negative log-likelihood (nats per token) that they reach where they were fitted."""

    k: int
    knn_temperature: float
    lmbda: float
    nll: float


class Known(NamedTuple):
    """What λ is to be judged by: N tokens under both distributions."""

    base: Tensor  # (N,) float64, log p_lm of the token
    knn: Tensor  # (N,) float64, log p_knn; −inf where no neighbour holds it
    found: Tensor  # (N,) bool, whether there is any neighbour

    @classmethod
    def of(cls, evidence: Evidence, knn_temperature: float) -> Self:
        """At one τ."""
        tau = torch.full((len(evidence.base),), knn_temperature)
        knn = target_log_probs(evidence.neighbors, evidence.targets, knn_temperature=tau)
        return cls(evidence.base.double(), knn.double(), has_neighbors(evidence.neighbors))

    def log_probs(self, lmbda: Tensor | float) -> Tensor:
        """(N,) log p of each token under the mixture; a token without neighbours keeps the base LM's.

        Args:   lmbda: one for all tokens, or (N,) float64.
        """
        return interpolate_targets(self.base, self.knn, torch.where(self.found, lmbda, 0.0).double())

    def nll(self, lmbda: Tensor | float) -> float:
        """Mean negative log-likelihood, nats per token."""
        return -float(self.log_probs(lmbda).mean())


def fit(evidence: Evidence, k: int) -> Fit:
    """The τ and λ of the grid with the lowest NLL at a given k."""
    evidence = evidence.nearest(k)
    found = has_neighbors(evidence.neighbors)
    nearest = evidence.neighbors.distances[found, 0]
    # An exact repetition is at distance 0: τ needs something above it.
    scale = max(float(nearest.median()) if len(nearest) else 1.0, 1e-3)
    best = Fit(k, scale, 0.0, -float(evidence.base.double().mean()))
    for factor in TAU_FACTORS:
        nlls = nll_by_lmbda(evidence, scale * factor, LMBDAS)
        at = int(nlls.argmin())
        if nlls[at] < best.nll:
            best = Fit(k, scale * factor, LMBDAS[at], float(nlls[at]))
    return best


def nll_by_lmbda(evidence: Evidence, knn_temperature: float, lmbdas: Sequence[float]) -> Tensor:
    """(L,) float64, the mean negative log-likelihood for each λ at one τ."""
    tau = torch.full((len(evidence.base),), knn_temperature)
    knn = target_log_probs(evidence.neighbors, evidence.targets, knn_temperature=tau).double()
    base, found = evidence.base.double(), has_neighbors(evidence.neighbors)
    alone = base[~found].sum()  # tokens without neighbours keep the base LM's probability
    base, knn = base[found], knn[found]
    sums = [interpolate_targets(base, knn, lmbda).sum() + alone for lmbda in torch.tensor(lmbdas, dtype=torch.float64)]
    return -torch.stack(sums) / len(found)


def choose(evidence: Evidence) -> tuple[Fit, Sequence[Fit]]:
    """Fit every k offered and take the smallest that is nearly as good as the best; also returns all of them."""
    most = evidence.neighbors.entry_ids.shape[1]
    fits = [fit(evidence, k) for k in sorted({min(k, most) for k in K_CHOICES})]
    best = min(f.nll for f in fits)
    return next(f for f in fits if f.nll <= best + math.log1p(K_TOLERANCE)), fits


class Interval(NamedTuple):
    """Relative reduction of perplexity, 1 − mixed / base, with the ends of its bootstrap interval."""

    gain: float
    low: float
    high: float


def bootstrap_gain(
    base: Tensor, mixed: Tensor, blocks: Tensor, *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Block bootstrap of the gain in perplexity.

    Tokens of one block rise and fall together, so whole blocks are drawn with replacement; the interval is between
    percentiles of the resampled gains.

    Args:
        base, mixed: (N,) log-probabilities of the same tokens.
        blocks: (N,) which block each token belongs to.
    """
    difference: NDArray[np.float64] = (mixed.double() - base.double()).numpy()
    numbers, index = np.unique(blocks.numpy(), return_inverse=True)
    sums = np.bincount(index, weights=difference, minlength=len(numbers))
    counts = np.bincount(index, minlength=len(numbers))
    generator = np.random.default_rng(seed)
    gains = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // len(numbers))  # a long text has many blocks
    for start in range(0, resamples, step):
        draws = generator.integers(0, len(numbers), size=(min(step, resamples - start), len(numbers)))
        gains[start : start + step] = 1 - np.exp(-sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    low, high = np.quantile(gains, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(1 - np.exp(-difference.mean())), float(low), float(high))
