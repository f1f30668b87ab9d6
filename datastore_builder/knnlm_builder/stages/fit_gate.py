"""Fit the learned gate: trees that expect, from what is known before a search, how much the search will gain.

Walks with searches at random show what a gate would see. At each token the gain is the log-probability that a search
would have given, minus that of the fallback: pointers where there are any, else the language model. Searching only
where the expected gain exceeds a threshold is then the best use of any number of searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

from knnlm_builder.stages.fit import LMBDAS, Evidence, Fit, nll_by_lmbda
from knnlm_builder.stages.fit_lambda import fit_rules
from knnlm_builder.stages.walked import Held, explore, log_probs_of_fallback, log_probs_of_search
from knnlm_core.datastore.calibration import BucketedLambda, FollowRule
from knnlm_core.errors import BuildError
from knnlm_core.knn.distribution import has_neighbors
from knnlm_core.knn.gates import MAX_POINTERS, Pointers, gate_features
from knnlm_core.retrieval import Source, ready_rule
from knnlm_core.trees import Trees
from knnlm_core.types import Neighbors

MIN_GATE_TOKENS = 2000  # with fewer, nothing is fitted
MIN_FOLLOW_TOKENS = 200  # that have pointers
SHARES = (0.2, 0.35, 0.55)  # of searches in the walks that are fitted on
GAIN_LIMITS = (-3.0, 6.0)  # nats; single tokens far outside would lead the trees astray
TREES, LEAVES, DEPTH, LEARNING_RATE = 300, 12, 4, 0.05
MIN_LEAF_TOKENS, L2 = 100, 1.0
_LARGEST_DIFFERENCE = 1e-6  # nats, between the trees that were fitted and those that are stored


class GateFit(NamedTuple):
    """What serving needs to follow and to decide."""

    follow_rule: FollowRule | None  # None where too few tokens had anything to follow
    trees: Trees


def explore_at_random(held: Held, source: Source, *, seed: int) -> list[Pointers]:
    """What there is to be fitted to; nothing where there are too few tokens."""
    if len(held.keys) < MIN_GATE_TOKENS:
        return []
    return [explore(held, source, share=share, seed=seed + i) for i, share in enumerate(SHARES)]


def fit_gate(held: Held, walks: Sequence[Pointers], source: Source, *, seed: int) -> GateFit | None:
    """Fit both to held-out tokens; None where there are too few.

    Args:
        held: the tokens to fit on.
        walks: over them, see `explore_at_random`.
        source: k, τ and how λ is set where a search is made.
    """
    if not walks:
        return None
    rule = _fit_following(held.evidence, walks[len(walks) // 2].neighbors, source, seed)
    if rule is not None:
        source = replace(source, follow_rule=ready_rule(rule, ""))
    searched = log_probs_of_search(held.evidence, source)
    features = [gate_features(held.evidence.signals, pointers) for pointers in walks]
    gains = [searched - log_probs_of_fallback(held.evidence, pointers.neighbors, source) for pointers in walks]
    inputs, wanted = torch.cat(features).numpy(), torch.cat(gains).clamp(*GAIN_LIMITS).numpy()
    model = HistGradientBoostingRegressor(
        max_iter=TREES, learning_rate=LEARNING_RATE, max_leaf_nodes=LEAVES, max_depth=DEPTH,
        min_samples_leaf=MIN_LEAF_TOKENS, l2_regularization=L2, early_stopping=False, random_state=seed,
    ).fit(inputs, wanted)  # fmt: skip
    return GateFit(rule, as_trees(model, inputs))


def _fit_following(evidence: Evidence, pointers: Neighbors, source: Source, seed: int) -> FollowRule | None:
    """How λ is set where pointers are followed, fitted as that for searches is."""
    rows = has_neighbors(pointers).nonzero()[:, 0]
    if len(rows) < MIN_FOLLOW_TOKENS:
        return None
    followed = evidence._replace(neighbors=pointers).take(rows)
    lmbdas = nll_by_lmbda(followed, source.knn_temperature, LMBDAS)
    at = int(lmbdas.argmin())
    fixed = Fit(MAX_POINTERS, source.knn_temperature, LMBDAS[at], float(lmbdas[at]))
    fitted = fit_rules(followed, fixed, seed=seed)
    chosen: FollowRule | None = getattr(fitted.rules, fitted.mode, None)
    return BucketedLambda(edges=(), lambdas=(fixed.lmbda,)) if chosen is None else chosen


def as_trees(model: HistGradientBoostingRegressor, inputs: np.ndarray) -> Trees:
    """The fitted trees in the form that serving knows, checked against the library's own predictions.

    Args:   inputs: (N, F), what they were fitted to.
    Raises: BuildError: the two differ; this release of scikit-learn keeps its trees in another way.
    """
    try:
        fitted, baseline = [predictor.nodes for (predictor,) in model._predictors], model._baseline_prediction
    except AttributeError as error:
        raise BuildError(f"this release of scikit-learn is not supported: {error}") from error
    width = max(len(nodes) for nodes in fitted)
    shape = len(fitted), width
    own = np.broadcast_to(np.arange(width), shape)
    feature, left, right = np.zeros(shape, np.int64), own.copy(), own.copy()
    threshold, value = np.zeros(shape), np.zeros(shape)
    for tree, nodes in enumerate(fitted):
        inner = np.flatnonzero(nodes["is_leaf"] == 0)
        feature[tree, inner] = nodes["feature_idx"][inner]
        threshold[tree, inner] = nodes["num_threshold"][inner]
        left[tree, inner], right[tree, inner] = nodes["left"][inner], nodes["right"][inner]
        value[tree, : len(nodes)] = nodes["value"]
    arrays = {
        "feature": feature, "threshold": threshold, "left": left, "right": right, "value": value,
        "baseline": np.ravel(baseline).astype(np.float64),
    }  # fmt: skip
    trees = Trees.of(arrays, inputs.shape[1])
    difference = float(np.abs(trees.predict(inputs) - model.predict(inputs)).max())
    if not difference <= _LARGEST_DIFFERENCE:
        raise BuildError(
            f"the gate's trees predict up to {difference:g} nats beside what scikit-learn predicts with them; "
            "this release of scikit-learn is not supported"
        )
    return trees
