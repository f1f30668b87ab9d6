"""The kNN-LM computed slowly in float64, from stored keys and one forward pass: what the self-test compares with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.random_lm import ReferenceLM

Floats = NDArray[np.float64]
TIE = 1e-3  # where the k-th distance is so close to the next, rounding decides which entry is in


class Mixing(NamedTuple):
    """Settings of the mixture."""

    k: int
    temperature: float
    lmbda: float


class Reference:
    """p = λ p_knn + (1 − λ) p_lm over all entries, by sorting all distances."""

    def __init__(self, model: Path, datastore: Datastore) -> None:
        self._lm = ReferenceLM(model)
        ids = torch.arange(datastore.entries)
        self._keys: Floats = datastore.keys(ids).double().numpy()  # (N, D)
        self._values = datastore.values(ids).numpy()  # (N,)

    def queries(self, token_ids: list[int]) -> Floats:
        """The key at every position, (T, D)."""
        return self._lm.run(token_ids)[1].numpy()

    def nearest(self, queries: Floats, k: int) -> Floats:
        """The k smallest squared distances of each query to the stored keys, (T, k), ascending."""
        return np.sort(self._distances(queries), axis=1)[:, :k]

    def log_probs(self, token_ids: list[int], mixing: Mixing) -> tuple[Floats, NDArray[np.bool_]]:
        """log p of every token but the first, (T − 1,), and which of them no tie at the k-boundary can change."""
        predicted, keys = (each.numpy() for each in self._lm.run(token_ids))
        targets = np.array(token_ids[1:])
        distances = self._distances(keys[:-1])
        order = np.argsort(distances, axis=1, kind="stable")[:, : mixing.k + 1]
        found = np.take_along_axis(distances, order, axis=1)
        weights = np.exp(-(found[:, : mixing.k] - found[:, :1]) / mixing.temperature)
        hits = self._values[order[:, : mixing.k]] == targets[:, None]
        p_knn = (weights * hits).sum(axis=1) / weights.sum(axis=1)
        p_lm = np.exp(predicted[np.arange(len(targets)), targets])
        with np.errstate(divide="ignore"):
            logs = np.log(mixing.lmbda * p_knn + (1 - mixing.lmbda) * p_lm)
        return logs, found[:, mixing.k] - found[:, mixing.k - 1] > TIE

    def _distances(self, queries: Floats) -> Floats:
        return np.stack([np.square(self._keys - query).sum(axis=1) for query in queries])
