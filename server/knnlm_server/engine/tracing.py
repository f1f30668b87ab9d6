"""How a token came about: the trace that feeds logprobs, the playground and debugging alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from knnlm_core.knn.distribution import target_log_mass, target_log_probs
from knnlm_core.knn.fusion import Fusion
from knnlm_core.mixture import Found, GateReport
from knnlm_core.retrieval import Retrieval
from knnlm_core.types import Neighbors
from knnlm_server.engine.attribution import attribute
from knnlm_server.engine.events import TokenTrace, TracedNeighbor, TracedSource
from knnlm_server.engine.request import CompletionRequest


def trace_rows(
    traced: Sequence[int],
    requests: Sequence[CompletionRequest],
    of_row: Tensor,
    tokens: Tensor,
    chosen: Tensor,
    lm_log_probs: Tensor,
    found: Found,
) -> list[TokenTrace]:
    """Traces of some of the tokens that a step drew.

    Args:
        traced: which of R tokens to trace.
        requests: of the traced ones.
        of_row: (R,) the row of the forward pass that each token is drawn from.
        tokens, chosen: (R,) the tokens taken and their mixed log-probabilities.
        lm_log_probs: (B, V), and ``found`` for the same B rows of the forward pass.
    """
    if not traced:
        return []
    index = torch.tensor(traced, device=of_row.device)
    source, taken = of_row[index], tokens[index]
    lm_log_probs = lm_log_probs[source, taken]
    found = rows_of(found, source)
    p_knn = target_log_mass(found.neighbors.values, found.log_weights, taken).exp().tolist()
    p_lm = lm_log_probs.exp().tolist()
    traces = []
    for i, (row, request) in enumerate(zip(traced, requests, strict=True)):
        itself = slice(i, i + 1)
        one = rows_of(found, itself)
        retrieval = request.retrieval
        traces.append(
            TokenTrace(
                searched=bool(one.searched),
                followed=bool(one.followed),
                decision=retrieval.gate_name if retrieval else "base",
                gate_score=_of_only(one.gates.scores[0]),
                gate_threshold=retrieval.only.gate.threshold if retrieval and len(retrieval.sources) == 1 else None,
                num_pointers=int(one.gates.pointers.sum()),
                lmbda=one.lmbda.item(),
                p_lm=p_lm[i],
                p_knn=p_knn[i],
                p=math.exp(chosen[row].item()),
                neighbors=_nearest(one, retrieval.fusion, request.trace_neighbors) if retrieval else [],
                sources=_sources(retrieval, one, taken[itself]) if retrieval else (),
                attribution=attribute(one, taken[itself], lm_log_probs[itself]) if request.attribute else None,
            )
        )
    return traces


def rows_of(found: Found, rows: Tensor | slice) -> Found:
    """What was found for some rows; failures are left out."""
    return Found(
        found.outcomes[rows],
        found.lmbda[rows],
        Neighbors(*(column[rows] for column in found.neighbors)),
        found.log_weights[rows],
        found.sources,
        found.shares[rows],
        found.lambdas[rows],
        GateReport(*(column[rows] for column in found.gates)),
        failures={},
    )


def _of_only(scores: Tensor) -> float | None:
    """What the gate of the one row held against its threshold; None for gates without one, and of several sources."""
    return None if len(scores) > 1 or math.isnan(scores[0].item()) else scores[0].item()


def ranked(found: Found, fusion: Fusion) -> Tensor:
    """Columns of the neighbours of each row, the first one first: (B, W).

    By distance where the neighbours of all sources are merged, which is by weight without its rounding; else by weight.
    """
    if found.shares.shape[1] == 1:
        return torch.arange(len(found.sources), device=found.sources.device).expand(found.log_weights.shape)
    missing = found.neighbors.entry_ids < 0
    if fusion is Fusion.NEIGHBORS:
        return found.neighbors.distances.masked_fill(missing, math.inf).argsort(dim=1, stable=True)
    by_weight = found.log_weights.argsort(dim=1, descending=True, stable=True)
    # What carries no mass, such as the neighbours of a store with λ = 0, comes before what is not there at all.
    return by_weight.gather(1, missing.gather(1, by_weight).int().argsort(dim=1, stable=True))


def _nearest(found: Found, fusion: Fusion, count: int) -> list[TracedNeighbor]:
    """The first neighbours of the one row."""
    columns = ranked(found, fusion)[0, :count]
    ids, distances, values = (column[0, columns].tolist() for column in found.neighbors)
    shares = found.log_weights[0, columns].exp().tolist()
    rows = zip(found.sources[columns].tolist(), ids, distances, shares, values, strict=True)
    return [TracedNeighbor(*row) for row in rows if row[1] >= 0]


def _sources(retrieval: Retrieval, found: Found, token: Tensor) -> list[TracedSource]:
    """What each of several datastores had to do with the token (1,) of the one row."""
    if len(retrieval.sources) == 1:
        return []
    traced = []
    for number, source in enumerate(retrieval.sources):
        columns = (found.sources == number) & (found.neighbors.entry_ids[0] >= 0)
        lmbda = p_knn = share = 0.0
        if bool(columns.any()):
            itself = Neighbors(*(column[:, columns] for column in found.neighbors))
            tau = torch.tensor([source.knn_temperature], device=token.device)
            p_knn = target_log_probs(itself, token, knn_temperature=tau).exp().item()
            lmbda, share = found.lambdas[0, number].item(), found.shares[0, number].item()
        traced.append(TracedSource(share if retrieval.fusion is Fusion.NEIGHBORS else source.weight, lmbda, p_knn))
    return traced
