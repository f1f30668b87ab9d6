"""Regression trees that were fitted elsewhere: added up, for many rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from knnlm_core.errors import InvalidParameter

MAX_TREES = 1024
MAX_DEPTH = 32
MAX_NUMBER = 1e6  # of thresholds and values; far beyond what nats and features need
MAX_NODES = 256  # of a tree
ROWS_AT_ONCE = 1024  # of a prediction; bounds its memory
_COLUMNS = ("feature", "threshold", "left", "right", "value")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class Trees(NamedTuple):
    """T trees of at most N nodes. Node 0 is a tree's root, children come after their parents, leaves are their own.

    A row goes left where its feature is at most the threshold. The prediction is ``baseline`` plus the value of the
    leaf that it ends at in each tree.
    """

    feature: Ints  # (T, N) which feature a node looks at
    threshold: Floats  # (T, N)
    left: Ints  # (T, N) node of the same tree
    right: Ints  # (T, N)
    value: Floats  # (T, N) of the leaves
    baseline: float
    depth: int  # of the deepest tree

    def predict(self, rows: Floats) -> Floats:
        """Of R rows: (R, F) float64 → (R,) float64."""
        trees, size = np.arange(len(self.feature))[None], ROWS_AT_ONCE
        parts = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            node = np.zeros((len(some), len(self.feature)), np.int64)
            for _ in range(self.depth):
                goes_left = np.take_along_axis(some, self.feature[trees, node], axis=1) <= self.threshold[trees, node]
                node = np.where(goes_left, self.left[trees, node], self.right[trees, node])
            parts.append(self.baseline + self.value[trees, node].sum(axis=1))
        return np.concatenate(parts) if parts else np.zeros(0)

    def arrays(self) -> dict[str, Array]:
        """What there is to be stored."""
        return {
            **{name: getattr(self, name) for name in _COLUMNS},
            "baseline": np.array([self.baseline], np.float64),
        }

    @classmethod
    def of(cls, arrays: Mapping[str, Array], num_features: int) -> Self:
        """The reverse of `arrays`, with nothing taken on trust.

        Raises: InvalidParameter: they are no trees over so many features.
        """
        if set(arrays) != {*_COLUMNS, "baseline"}:
            raise InvalidParameter(
                f"trees must have {', '.join((*_COLUMNS, 'baseline'))}, got {', '.join(arrays)}"[:500]
            )
        feature, threshold, left, right, value = (arrays[name] for name in _COLUMNS)
        shape = feature.shape
        if len(shape) != 2 or not 1 <= shape[0] <= MAX_TREES or not 1 <= shape[1] <= MAX_NODES:
            raise InvalidParameter(f"trees must be 1 … {MAX_TREES} of 1 … {MAX_NODES} nodes, got shape {shape}")
        for name, kind in zip(_COLUMNS, "ifiif", strict=True):
            if arrays[name].shape != shape or arrays[name].dtype.kind != kind:
                raise InvalidParameter(f"{name!r} of trees has the wrong shape or type")
        if arrays["baseline"].shape != (1,) or arrays["baseline"].dtype.kind != "f":
            raise InvalidParameter("'baseline' of trees must be one number")
        nodes = np.arange(shape[1])
        leaf = (left == nodes) & (right == nodes)
        if not bool((leaf | ((left > nodes) & (right > nodes) & (left < shape[1]) & (right < shape[1]))).all()):
            raise InvalidParameter("trees must have children after their parents, and leaves that are their own")
        if not bool(((feature >= 0) & (feature < num_features)).all()):
            raise InvalidParameter(f"trees must look at features 0 … {num_features - 1}")
        if not all(bool((np.abs(arrays[name]) <= MAX_NUMBER).all()) for name in ("threshold", "value", "baseline")):
            raise InvalidParameter(f"numbers of trees must be in -{MAX_NUMBER:g} … {MAX_NUMBER:g}")
        if (depth := _depth(left, right)) > MAX_DEPTH:
            raise InvalidParameter(f"trees must be at most {MAX_DEPTH} deep, got {depth}")
        return cls(
            feature.astype(np.int64),
            threshold.astype(np.float64),
            left.astype(np.int64),
            right.astype(np.int64),
            value.astype(np.float64),
            float(arrays["baseline"][0]),
            depth,
        )


def _depth(left: Array, right: Array) -> int:
    """Of the deepest tree: parents come before their children, so one pass over the nodes is enough."""
    depth = np.zeros(left.shape, np.int64)
    for node in range(left.shape[1]):
        for children in (left[:, node], right[:, node]):
            trees = np.flatnonzero(children != node)
            depth[trees, children[trees]] = depth[trees, node] + 1
    return int(depth.max())
