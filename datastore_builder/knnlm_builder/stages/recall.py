"""The recall gate: no index is published that misses too many of the neighbours that an exact search finds."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from knnlm_builder.stages.fit import Evidence, Fit, Known, fit
from knnlm_builder.stages.held_out import Queries
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import row_recall
from knnlm_core.types import Neighbors

GATE_QUERIES = 512
MIN_RECALL_AT_32 = 0.95
MIN_RECALL_AT_K = 0.90
MAX_PERPLEXITY_DIFFERENCE = 0.005
FIRST_NPROBE = 8


class RecallGate(NamedTuple):
    """What the gate measured for one nprobe."""

    nprobe: int
    recall_at_32: float
    recall_at_k: float
    perplexity_ratio: float  # mixed, index over exact

    @property
    def passes(self) -> bool:
        """Whether the index may be published with this nprobe."""
        return (
            self.recall_at_32 >= MIN_RECALL_AT_32
            and self.recall_at_k >= MIN_RECALL_AT_K
            and abs(self.perplexity_ratio - 1) <= MAX_PERPLEXITY_DIFFERENCE
        )


class GateResult(NamedTuple):
    """The gate, and what it was measured on."""

    gate: RecallGate
    sample: Queries
    exact: Neighbors  # (B, k) what an exact search finds for the sample


def recall(found: Neighbors, exact: Neighbors, k: int) -> float:
    """Share of the exact k nearest that were found among k; an equally near entry counts as found."""
    return float(row_recall(found, exact, k).mean())


def choose_nprobe(datastore: Datastore, queries: Queries, k: int, *, seed: int) -> GateResult:
    """The smallest power of two that passes the gate, on a sample of held-out queries.

    A store searched exactly passes as it is; searching every list is exact too, so some nprobe always passes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(queries.keys), generator=generator)[:GATE_QUERIES]
    sample = queries.take(rows)
    exact = _evidence(sample, datastore.search_exact(sample.keys, k))
    best = fit(exact, k)
    nlist = datastore.manifest.index.nlist
    nprobe = min(FIRST_NPROBE, nlist)
    while True:
        found = datastore.search(sample.keys, k, nprobe=nprobe or None)
        gate = _measure(nprobe, _evidence(sample, found), exact, best, k)
        if gate.passes or nprobe >= nlist:
            return GateResult(gate, sample, exact.neighbors)
        nprobe = min(2 * nprobe, nlist)


def _evidence(sample: Queries, neighbors: Neighbors) -> Evidence:
    return Evidence(sample.base, neighbors, sample.targets, sample.blocks, sample.signals)


def _measure(nprobe: int, found: Evidence, exact: Evidence, best: Fit, k: int) -> RecallGate:
    def nll(evidence: Evidence) -> float:
        return Known.of(evidence, best.knn_temperature).nll(best.lmbda)

    return RecallGate(
        nprobe,
        recall(found.neighbors, exact.neighbors, min(32, k)),
        recall(found.neighbors, exact.neighbors, k),
        math.exp(nll(found) - nll(exact)),
    )
