"""How a token came about: the trace that feeds logprobs, the playground and debugging alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from knnlm_core.knn.distribution import neighbor_log_weights, target_log_probs
from knnlm_core.mixture import Found
from knnlm_core.types import Neighbors
from knnlm_server.engine.events import TokenTrace, TracedNeighbor
from knnlm_server.engine.request import Choice, CompletionRequest


def trace_rows(
    traced: Sequence[int],
    rows: Sequence[tuple[int, CompletionRequest, Choice]],
    of_row: Tensor,
    tokens: Tensor,
    chosen: Tensor,
    lm_log_probs: Tensor,
    found: Found,
) -> list[TokenTrace]:
    """Traces of some of a step's rows.

    Args:
        traced: which of ``rows`` to trace.
        of_row: (R,) the row of the forward pass that each of ``rows`` reads.
        tokens, chosen: (R,) the tokens taken and their mixed log-probabilities.
        lm_log_probs: (B, V), and ``found`` for the same B rows of the forward pass.
    """
    if not traced:
        return []
    index = torch.tensor(traced, device=of_row.device)
    source = of_row[index]
    taken = tokens[index]
    neighbors = Neighbors(*(part[source] for part in found.neighbors))
    tau = found.knn_temperature[source]
    p_knn = target_log_probs(neighbors, taken, knn_temperature=tau).exp().tolist()
    p_lm = lm_log_probs[source, taken].exp().tolist()
    weights = neighbor_log_weights(neighbors, tau).exp()
    searched = found.searched[source].tolist()
    applied = (found.lmbda[source] > 0).tolist()
    traces = []
    for i, row in enumerate(traced):
        request = rows[row][1]
        shown = min(request.trace_neighbors, neighbors.entry_ids.shape[1])
        columns = (*neighbors, weights)
        ids, distances, values, shares = (column[i, :shown].tolist() for column in columns)
        near = [
            TracedNeighbor(entry_id, distance, share, value)
            for entry_id, distance, share, value in zip(ids, distances, shares, values, strict=True)
            if entry_id >= 0
        ]
        traces.append(
            TokenTrace(
                searched=searched[i],
                decision=request.retrieval.gate.value if request.retrieval else "base",
                # As it was given: float32 would show 0.4 as 0.4000000059604645.
                lmbda=request.retrieval.lmbda if request.retrieval and applied[i] else 0.0,
                p_lm=p_lm[i],
                p_knn=p_knn[i],
                p=math.exp(chosen[row].item()),
                neighbors=near,
            )
        )
    return traces
