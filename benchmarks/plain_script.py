"""What one would write in an afternoon: score a text window by window, with a dense p_knn over the vocabulary.

The baseline of `scoring.py`; nothing of knnlm is used but the stored keys and values of a datastore.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch
from transformers import AutoModelForCausalLM


class PlainScript:
    """A kNN-LM as published scripts have it.

    Args:
        model_folder: a transformers checkpoint of the Llama family.
        index: any faiss index over the keys; searched k at a time.
        values: (N,) int64, the token of each entry.
    """

    def __init__(self, model_folder: str, index: Any, values: np.ndarray[Any, Any], *, k: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self._seen: list[torch.Tensor] = []
        mlp = self._model.model.layers[-1].mlp
        mlp.register_forward_pre_hook(lambda _, args: self._seen.append(args[0]))
        self._index, self._values, self._k = index, torch.from_numpy(values), k

    @torch.inference_mode()
    def score(
        self, token_ids: list[int], *, window: int, stride: int, knn_temperature: float, lmbda: float
    ) -> tuple[float, int]:
        """Summed negative log-likelihood in nats of all tokens but the first, and how many those are."""
        nll, count, scored_until = 0.0, 0, 1
        for begin in range(0, len(token_ids), stride):
            end = min(begin + window, len(token_ids))
            if end <= scored_until:
                break
            ids = torch.tensor([token_ids[begin:end]])
            self._seen.clear()
            lm = self._model(ids).logits[0].log_softmax(dim=1)
            rows = slice(scored_until - 1 - begin, end - 1 - begin)
            targets = ids[0, scored_until - begin :]
            nll -= float(
                self._mix(lm[rows], self._seen[0][0][rows], knn_temperature, lmbda).gather(1, targets[:, None]).sum()
            )
            count += len(targets)
            scored_until = end
            if end == len(token_ids):
                break
        return nll, count

    def _mix(self, lm: torch.Tensor, queries: torch.Tensor, knn_temperature: float, lmbda: float) -> torch.Tensor:
        distances, ids = self._index.search(np.ascontiguousarray(queries.numpy()), self._k)
        weights = torch.softmax(torch.from_numpy(-distances) / knn_temperature, dim=1)
        p_knn = torch.zeros_like(lm).scatter_add_(1, self._values[torch.from_numpy(ids)], weights)
        return torch.logaddexp(p_knn.log() + np.log(lmbda), lm + np.log1p(-lmbda))


def flat_index(keys: np.ndarray[Any, Any]) -> Any:
    """The index that needs no thought: exact, float32."""
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys.astype(np.float32))
    return index
