"""Slow and obvious: the whole mixture in float64, from transformers and numpy alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from knnlm_core.datastore.reader import Datastore
from knnlm_core.types import EntryRange
from knnlm_core.windows import rolling_windows

Floats = NDArray[np.float64]


class Pass(NamedTuple):
    """One forward pass over some tokens."""

    log_probs: Floats  # (T, V) of the next token
    keys: Floats  # (T, D)


class Knn(NamedTuple):
    """The settings of one retrieval."""

    k: int
    temperature: float
    lmbda: float


class ExactReference:
    """The LM in float64 without a cache, and brute-force search over a datastore's stored keys."""

    def __init__(self, model_folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).double().eval()
        self._passes: dict[tuple[int, ...], Pass] = {}

    @torch.inference_mode()
    def run(self, token_ids: list[int]) -> Pass:
        """Next-token log-probabilities and keys (the input of the last feed-forward block) at every position."""
        known = self._passes.get(tuple(token_ids))
        if known is not None:
            return known
        seen: list[torch.Tensor] = []
        handle = self._model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self._model(torch.tensor([token_ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
        result = Pass(torch.log_softmax(logits, dim=1).numpy(), seen[0][0].numpy())
        return self._passes.setdefault(tuple(token_ids), result)

    def knn_probs(
        self, datastore: Datastore, query: Floats, knn: Knn, vocab_size: int, exclude: EntryRange | None = None
    ) -> tuple[Floats, float]:
        """p_knn over the vocabulary, and how far the k-th distance is from the next: 0 would be a tie."""
        keys, values = stored(datastore)
        distances = ((keys - query) ** 2).sum(axis=1)
        if exclude is not None:
            distances[exclude.first : exclude.stop] = np.inf
        order = np.argsort(distances, kind="stable")
        nearest = order[: knn.k]
        weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / knn.temperature)
        probs = np.zeros(vocab_size)
        np.add.at(probs, values[nearest], weights / weights.sum())
        margin = distances[order[knn.k]] - distances[nearest[-1]] if knn.k < len(order) else np.inf
        return probs, float(margin)

    def mixed(
        self, datastore: Datastore, context: list[int], knn: Knn, exclude: EntryRange | None = None
    ) -> tuple[Floats, float]:
        """log p over the vocabulary after a context, and the margin of `knn_probs`."""
        last = self.run(context)
        p_lm = np.exp(last.log_probs[-1])
        p_knn, margin = self.knn_probs(datastore, last.keys[-1], knn, len(p_lm), exclude)
        with np.errstate(divide="ignore"):
            return np.log(knn.lmbda * p_knn + (1 - knn.lmbda) * p_lm), margin

    def rolling(self, token_ids: list[int], window: int, stride: int) -> list[tuple[list[int], int]]:
        """(context, target) of each scored token, by rolling windows."""
        return [
            (token_ids[w.begin : position], token_ids[position])
            for w in rolling_windows(len(token_ids), window, stride)
            for position in range(w.first_target, w.end)
        ]

    def base_scores(self, token_ids: list[int], window: int, stride: int) -> Floats:
        """log p_lm of tokens 1 … T − 1, window by window."""
        scores = [
            self.run(token_ids[w.begin : w.end]).log_probs[position - 1 - w.begin, token_ids[position]]
            for w in rolling_windows(len(token_ids), window, stride)
            for position in range(w.first_target, w.end)
        ]
        return np.array(scores)

    def mixed_scores(
        self,
        datastore: Datastore,
        token_ids: list[int],
        knn: Knn,
        window: int,
        stride: int,
        exclude: EntryRange | None = None,
    ) -> tuple[Floats, Floats]:
        """log p of tokens 1 … T − 1 under the mixture, and each one's margin of `knn_probs`."""
        scores, margins = [], []
        for w in rolling_windows(len(token_ids), window, stride):
            seen = self.run(token_ids[w.begin : w.end])
            for position in range(w.first_target, w.end):
                row = position - 1 - w.begin
                p_lm = np.exp(seen.log_probs[row])
                p_knn, margin = self.knn_probs(datastore, seen.keys[row], knn, len(p_lm), exclude)
                p = knn.lmbda * p_knn + (1 - knn.lmbda) * p_lm
                with np.errstate(divide="ignore"):
                    scores.append(np.log(p[token_ids[position]]))
                margins.append(margin)
        return np.array(scores), np.array(margins)


def stored(datastore: Datastore) -> tuple[Floats, NDArray[np.int64]]:
    """All keys, (N, D), and values, (N,), of a datastore."""
    ids = torch.arange(datastore.entries)
    return datastore.keys(ids).double().numpy(), datastore.values(ids).numpy()
