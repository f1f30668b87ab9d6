"""Trees of a learned gate, by hand: searched, followed and skipped tokens in a few dozen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from knnlm_core.knn.gates import GATE_FEATURES
from knnlm_core.trees import Trees

THRESHOLD = 0.25  # nats; of these trees


def small_trees() -> Trees:
    """Expect 0.3 nats where nothing can be followed and 0.1 where something can, and add to that.

    0.2 more where the last search is four tokens ago, 0.15 less where the LM is sure of its guess.
    """
    grown = [
        _stump("log of the number of pointers", 0.5, 0.3, 0.1),
        _stump("steps since the last search", 3.5, 0.0, 0.2),
        _stump("log-probability of the LM's guess", math.log(0.2), 0.0, -0.15),
    ]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        name: np.array([tree[name] for tree in grown], np.int64 if name in ("feature", "left", "right") else np.float64)
        for name in grown[0]
    }
    return Trees.of({**arrays, "baseline": np.zeros(1)}, len(GATE_FEATURES))


def _stump(feature: str, threshold: float, left: float, right: float) -> dict[str, list[float]]:
    """A tree of one question."""
    index = float(GATE_FEATURES.index(feature))
    return {
        "feature": [index, 0, 0], "threshold": [threshold, 0, 0], "left": [1, 1, 2], "right": [2, 1, 2],
        "value": [0, left, right],
    }  # fmt: skip
