"""How much to trust what was found: λ from the neighbours' distances, and from what the language model thinks.

Rules are asked after a search, so that they see the distances; when to search at all is the gate's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.signals import LMSignals
from knnlm_core.types import Neighbors

# What a rule may say at most: with λ = 1 a token that no neighbour holds would be impossible.
MAX_RULE_LAMBDA = 0.99


class LambdaMode(StrEnum):
    """How λ is set."""

    FIXED = "fixed"  # one number
    BUCKETED = "bucketed"  # by the distance of the nearest neighbour
    RRC = "rrc"  # by how much nearer the nearest neighbour is than the farthest
    LEARNED = "learned"  # by a small network, from distances, agreement and the LM's own signals


def parse_lambda_mode(name: str, *, beside: bool) -> LambdaMode:
    """The mode that a request asks for.

    Args:   beside: whether it gives a λ too.
    Raises: InvalidKnnParams: no such mode, or a λ beside a rule that sets it.
    """
    if name not in set(LambdaMode):
        raise InvalidKnnParams(
            f"`knn.lambda_mode` must be one of {', '.join(LambdaMode)}, got {name[:80]!r}", param="knn.lambda_mode"
        )
    if beside and name != LambdaMode.FIXED:
        raise InvalidKnnParams(
            f"`knn.lambda_mode` must be fixed where `knn.lambda` is given, got {name!r}", param="knn.lambda_mode"
        )
    return LambdaMode(name)


class LambdaRule(Protocol):
    """λ for rows that have been searched."""

    def __call__(self, neighbors: Neighbors, log_weights: Tensor, signals: LMSignals) -> Tensor:
        """(B,) float64 in [0, 1]; whatever it says of a row without neighbours is ignored.

        Args:
            neighbors: (B, K), nearest first.
            log_weights: (B, K) of each neighbour's share of p_knn, see `neighbor_log_weights`.
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

    def __call__(self, neighbors: Neighbors, log_weights: Tensor, signals: LMSignals) -> Tensor:
        """See `LambdaRule`."""
        nearest = neighbors.distances[:, 0].contiguous()
        return self.lmbdas.to(nearest.device)[torch.bucketize(nearest, self.edges.to(nearest.device))]


@dataclass(frozen=True, slots=True)
class Rrc:
    """Relative retrieval confidence (Li et al. 2024, NEST); there λ weighs p_lm, here as everywhere p_knn.

    λ = 1 − σ((d_nearest / d_farthest − α) / s), at most MAX_RULE_LAMBDA

    Attributes:
        alpha: α, the ratio of distances at which λ is ½.
        scale: s > 0; the smaller, the more abrupt.
    """

    alpha: float
    scale: float

    def __call__(self, neighbors: Neighbors, log_weights: Tensor, signals: LMSignals) -> Tensor:
        """See `LambdaRule`."""
        return self.of_ratio(distance_ratio(neighbors))

    def of_ratio(self, ratio: Tensor) -> Tensor:
        """λ for (B,) float64 ratios."""
        return torch.sigmoid((self.alpha - ratio) / self.scale).clamp(max=MAX_RULE_LAMBDA)


def distance_ratio(neighbors: Neighbors) -> Tensor:
    """Nearest distance over farthest, (B,) float64; 0 where all neighbours are exact repetitions: the surest case."""
    present = neighbors.entry_ids >= 0
    farthest = neighbors.distances.masked_fill(~present, 0.0).amax(dim=1).double()
    return torch.where(farthest > 0, neighbors.distances[:, 0].double() / farthest, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A small network over what is known after a search: see `lambda_features`.

    λ = σ(W_n tanh(… tanh(W_1 (x − mean) / scale + b_1) …) + b_n), at most MAX_RULE_LAMBDA

    Attributes:
        mean, scale: (F,) float64, scale > 0.
        layers: (weight (out, in), bias (out,)) each, float64; the last one has a single output.
    """

    mean: Tensor
    scale: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    def __call__(self, neighbors: Neighbors, log_weights: Tensor, signals: LMSignals) -> Tensor:
        """See `LambdaRule`."""
        return self.of_features(lambda_features(neighbors, log_weights, signals))

    def of_features(self, features: Tensor) -> Tensor:
        """λ for (B, F) float64 features."""
        device = features.device
        x = (features - self.mean.to(device)) / self.scale.to(device)
        for number, (weight, bias) in enumerate(self.layers):
            x = (x.tanh() if number else x) @ weight.T.to(device) + bias.to(device)
        return torch.sigmoid(x[:, 0]).clamp(max=MAX_RULE_LAMBDA)


NEIGHBOR_FEATURES = (
    "log of the nearest distance",
    "log of the mean distance of the nearest eight",
    "log of the farthest distance",
    "entropy of the neighbours' weights",
    "weight of the nearest",
    "p_knn of the nearest one's token",
    "whether that token is the LM's guess",
    "log p_knn of the LM's guess",
    "how many different tokens the nearest eight hold",
)
LM_FEATURES = ("log-probability of the LM's guess", "entropy of p_lm", "margin of the LM's guess")
LAMBDA_FEATURES = (*NEIGHBOR_FEATURES, *LM_FEATURES)
_NEAR = 8
_FLOOR = 1e-9  # probabilities below it are all the same to the network


def lambda_features(neighbors: Neighbors, log_weights: Tensor, signals: LMSignals) -> Tensor:
    """What `Learned` looks at, (B, F) float64, in the order of LAMBDA_FEATURES; zeros in rows without neighbours.

    Arguments as for `LambdaRule`.
    """
    features = torch.cat([neighbor_features(neighbors, log_weights, signals), lm_features(signals)], dim=1)
    return features.masked_fill(neighbors.entry_ids[:, :1] < 0, 0.0)


def lm_features(signals: LMSignals) -> Tensor:
    """(B, 3) float64, in the order of LM_FEATURES."""
    return torch.stack([signals.max_log_prob, signals.entropy, signals.margin], dim=1).double()


def neighbor_features(neighbors: Neighbors, log_weights: Tensor, signals: LMSignals) -> Tensor:
    """(B, 9) float64, in the order of NEIGHBOR_FEATURES; zeros in rows without neighbours.

    Arguments as for `LambdaRule`.
    """
    present = neighbors.entry_ids >= 0
    weights = log_weights.exp()
    distances = neighbors.distances.float().masked_fill(~present, 0.0)
    near = present[:, :_NEAR]
    first = neighbors.values[:, :1]
    guess = signals.guess[:, None]
    features = torch.stack(
        [
            torch.log1p(distances[:, 0]),
            torch.log1p(distances[:, :_NEAR].sum(dim=1) / near.sum(dim=1).clamp(min=1)),
            torch.log1p(distances.amax(dim=1)),
            torch.special.entr(weights).sum(dim=1),
            weights[:, 0],
            (weights * (neighbors.values == first)).sum(dim=1),
            (first == guess)[:, 0].float(),
            (weights * (neighbors.values == guess)).sum(dim=1).clamp(min=_FLOOR).log(),
            _distinct(neighbors.values[:, :_NEAR].masked_fill(~near, -1)),
        ],
        dim=1,
    ).double()
    return features.masked_fill(~present[:, :1], 0.0)


def _distinct(values: Tensor) -> Tensor:
    """How many different values but −1 each row of (B, K) holds."""
    ordered = values.sort(dim=1).values
    changes = (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return (changes.sum(dim=1) + (ordered[:, 0] >= 0)).float()
