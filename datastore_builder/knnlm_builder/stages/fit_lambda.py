"""Fit λ rules to cached neighbours of held-out tokens, and choose between them on tokens that they have not seen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from knnlm_builder.stages.fit import LMBDAS, Evidence, Fit, Known, nll_by_lmbda
from knnlm_core.datastore.calibration import (
    BucketedLambda,
    LambdaModeName,
    LambdaRules,
    Layer,
    LearnedLambda,
    RrcLambda,
)
from knnlm_core.knn.distribution import neighbor_log_weights
from knnlm_core.knn.lambdas import LAMBDA_FEATURES, LambdaMode, LambdaRule, Rrc, distance_ratio, lambda_features
from knnlm_core.retrieval import lambda_rule

MAX_BUCKETS = 16
MIN_BUCKET_TOKENS = 100
MIN_RULE_TOKENS = 4 * MIN_BUCKET_TOKENS  # with fewer, one λ is all that can be told
MIN_LEARNED_TOKENS = 4000
# A plainer rule is kept while a more elaborate one is not better by this share of perplexity.
PREFERENCE = 0.002
RRC_ALPHAS = tuple(i / 20 for i in range(-4, 21))
RRC_SCALES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)

HIDDEN = 16
EPOCHS = 60
BATCH_TOKENS = 512
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.1
VALIDATION_SHARE = 0.2
_CONSTANT = 1e-6  # a feature that varies less says nothing
_UNLIKELY = -60.0  # log p_knn of a target that no neighbour holds, so that gradients stay finite


class RulesFit(NamedTuple):
    """What was fitted, and which of it to use."""

    rules: LambdaRules
    mode: LambdaModeName
    validation_nll: Mapping[LambdaModeName, float]  # nats per token, by mode, of tokens that each was not fitted on


def fit_rules(evidence: Evidence, fixed: Fit, *, seed: int) -> RulesFit:
    """Fit every rule at the k and τ of the single λ, and choose.

    The choice is made on a fifth of the blocks, by rules fitted on the others; what is kept is then fitted on all.

    Args:
        evidence: of the tokens to fit on.
        fixed: the single λ that the rules must beat.
    """
    evidence = evidence.nearest(fixed.k)
    train, validation = _split(evidence, seed)
    if len(train.base) < MIN_RULE_TOKENS or not len(validation.base):
        return RulesFit(LambdaRules(), "fixed", {})
    on_train = _fit_all(train, fixed.knn_temperature, seed)
    known = Known.of(validation, fixed.knn_temperature)
    single = LMBDAS[int(nll_by_lmbda(train, fixed.knn_temperature, LMBDAS).argmin())]
    nlls: dict[LambdaModeName, float] = {"fixed": known.nll(single)}
    for name, rule in rules_of(on_train).items():
        nlls[name] = known.nll(apply_rule(rule, validation, fixed.knn_temperature))
    mode: LambdaModeName = "fixed"
    for name, nll in nlls.items():  # from plain to elaborate
        if nll < nlls[mode] + math.log1p(-PREFERENCE):
            mode = name
    rules = _fit_all(evidence, fixed.knn_temperature, seed)
    if on_train.learned is None:  # too little text to have been compared
        rules = rules.model_copy(update={"learned": None})
    return RulesFit(rules, mode, nlls)


def rules_of(rules: LambdaRules) -> dict[LambdaModeName, LambdaRule]:
    """Those that there are, ready to be applied, from plain to elaborate."""
    modes = (LambdaMode.RRC, LambdaMode.BUCKETED, LambdaMode.LEARNED)
    found = {mode.value: lambda_rule(rules, mode, "") for mode in modes if getattr(rules, mode) is not None}
    return {name: rule for name, rule in found.items() if rule is not None}  # type: ignore[misc]


def apply_rule(rule: LambdaRule, evidence: Evidence, knn_temperature: float) -> Tensor:
    """λ of every token, (N,) float64."""
    return rule(evidence.neighbors, _log_weights(evidence, knn_temperature), evidence.signals)


def _log_weights(evidence: Evidence, knn_temperature: float) -> Tensor:
    return neighbor_log_weights(evidence.neighbors, torch.full((len(evidence.base),), knn_temperature))


def fit_buckets(nearest: Tensor, known: Known) -> BucketedLambda:
    """Ranges of the nearest distance that hold the same number of tokens, and the best λ of the grid in each.

    Args:   nearest: (N,) squared distances.
    """
    count = max(1, min(MAX_BUCKETS, len(nearest) // MIN_BUCKET_TOKENS))
    shares = torch.arange(1, count, dtype=torch.float64) / count
    edges = torch.quantile(nearest.double(), shares).float()
    edges = edges[torch.diff(edges, prepend=torch.tensor([-1.0])) > 0]
    bucket = torch.bucketize(nearest, edges)
    grid = torch.tensor((0.0, *LMBDAS), dtype=torch.float64)
    nothing = torch.zeros(len(edges) + 1, dtype=torch.float64)
    sums = [nothing.index_add(0, bucket, known.log_probs(lmbda)) for lmbda in grid]
    return BucketedLambda(edges=tuple(edges.tolist()), lambdas=tuple(grid[torch.stack(sums).argmax(dim=0)].tolist()))


def fit_rrc(ratio: Tensor, known: Known) -> RrcLambda:
    """The best α and scale of the grid.

    Args:   ratio: (N,) float64, nearest distance over farthest.
    """
    tried = [
        (known.nll(Rrc(alpha, scale).of_ratio(ratio)), alpha, scale) for alpha in RRC_ALPHAS for scale in RRC_SCALES
    ]
    _, alpha, scale = min(tried)
    return RrcLambda(alpha=alpha, scale=scale)


def fit_learned(evidence: Evidence, known: Known, knn_temperature: float, *, seed: int) -> LearnedLambda:
    """Minimise −log p of the mixture; the epoch is kept that does best on a fifth of the blocks."""
    features = lambda_features(evidence.neighbors, _log_weights(evidence, knn_temperature), evidence.signals)
    usable = known.found.nonzero()[:, 0]
    mean, spread = features[usable].mean(dim=0), features[usable].std(dim=0)
    scale = torch.where(spread > _CONSTANT, spread, 1.0)
    inputs, knn = (features - mean) / scale, known.knn.clamp(min=_UNLIKELY)
    held = _held_blocks(evidence.blocks, seed + 1)
    train, validation = usable[~held[usable]], usable[held[usable]]
    if not len(validation):
        validation = train
    generator = torch.Generator().manual_seed(seed)
    network = _network(inputs.shape[1], generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss(rows: Tensor) -> Tensor:
        logit = network(inputs[rows])[:, 0]
        lm, retrieved = known.base[rows] + logsigmoid(-logit), knn[rows] + logsigmoid(logit)
        return -torch.logaddexp(lm, retrieved).mean()

    best, kept = math.inf, copy.deepcopy(network.state_dict())
    for _ in range(EPOCHS):
        for rows in torch.split(train[torch.randperm(len(train), generator=generator)], BATCH_TOKENS):
            optimizer.zero_grad()
            loss(rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            nll = float(loss(validation))
        if nll < best:
            best, kept = nll, copy.deepcopy(network.state_dict())
    network.load_state_dict(kept)
    layers = tuple(
        Layer(weight=tuple(map(tuple, layer.weight.tolist())), bias=tuple(layer.bias.tolist()))
        for layer in network
        if isinstance(layer, nn.Linear)
    )
    return LearnedLambda(
        features=LAMBDA_FEATURES, mean=tuple(mean.tolist()), scale=tuple(scale.tolist()), layers=layers
    )


def _network(width: int, generator: torch.Generator) -> nn.Sequential:
    sizes = (width, HIDDEN, HIDDEN, 1)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        bound = 1 / math.sqrt(inputs)
        for parameter in (layer.weight, layer.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _fit_all(evidence: Evidence, knn_temperature: float, seed: int) -> LambdaRules:
    known = Known.of(evidence, knn_temperature)
    found = known.found.nonzero()[:, 0]
    if len(found) < MIN_RULE_TOKENS:
        return LambdaRules()
    with_neighbors = Known(*(column[found] for column in known))
    return LambdaRules(
        bucketed=fit_buckets(evidence.neighbors.distances[found, 0], with_neighbors),
        rrc=fit_rrc(distance_ratio(evidence.neighbors), known),
        learned=fit_learned(evidence, known, knn_temperature, seed=seed) if len(found) >= MIN_LEARNED_TOKENS else None,
    )


def _split(evidence: Evidence, seed: int) -> tuple[Evidence, Evidence]:
    held = _held_blocks(evidence.blocks, seed)
    return evidence.take((~held).nonzero()[:, 0]), evidence.take(held.nonzero()[:, 0])


def _held_blocks(blocks: Tensor, seed: int) -> Tensor:
    """(N,) bool: which tokens are in the share of the blocks that is for validation."""
    numbers = torch.tensor(sorted(set(blocks.tolist())))
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return torch.isin(blocks, numbers[order[: round(VALIDATION_SHARE * len(numbers))]])
