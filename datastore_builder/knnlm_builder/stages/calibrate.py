"""Calibrate: fit retrieval settings on one part of the held-out documents, report them on the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import JsonValue
from torch import Tensor

from knnlm_builder.progress import Reporter
from knnlm_builder.settings import BuildSettings
from knnlm_builder.stages.fit import LMBDAS, Evidence, Interval, bootstrap_gain, choose, mixed_log_probs
from knnlm_builder.stages.held_out import BLOCK_TOKENS, Queries, search_all
from knnlm_builder.stages.plan import Plan, PlannedDocument
from knnlm_core.datastore.calibration import Calibration, calibration_id
from knnlm_core.datastore.reader import Datastore

MAX_K = 1024


class Report(NamedTuple):
    """How the fitted settings do on the documents that were not used to fit them."""

    tokens: int
    base_nll: float  # nats per token
    mixed_nll: float
    gain: Interval

    @property
    def base_perplexity(self) -> float:
        """exp of the base LM's mean NLL."""
        return math.exp(self.base_nll)

    @property
    def mixed_perplexity(self) -> float:
        """exp of the mixture's mean NLL."""
        return math.exp(self.mixed_nll)


def calibrate(
    datastore: Datastore, plan: Plan, queries: Queries, settings: BuildSettings, *, nprobe: int, reporter: Reporter
) -> Calibration:
    """Choose k, τ and λ for one version.

    Every second held-out document (by hash) is for fitting, the others are for the report; a single document is cut in
    the middle. The settings published are those fitted, so the report is of text that they have never seen.
    """
    k = min(MAX_K, datastore.entries)
    evidence = search_all(queries, lambda keys: datastore.search(keys, k, nprobe=nprobe or None), reporter)
    for_fit = _fit_rows(queries, plan.held_out)
    chosen, fits = choose(evidence.take(for_fit.nonzero()[:, 0]))
    report = measure(
        evidence.take((~for_fit).nonzero()[:, 0]), chosen.k, chosen.knn_temperature, chosen.lmbda, settings.seed
    )
    protocol: dict[str, JsonValue] = {
        "held_out_unit": plan.held_out_unit,
        "held_out_documents": [document.id for document in plan.held_out],
        "held_out_digests": [document.digest for document in plan.held_out],
        "window": settings.window,
        "stride": settings.stride,
        "max_k": k,
        "lambda_grid": list(LMBDAS),
        "bootstrap_block_tokens": BLOCK_TOKENS,
        "seed": settings.seed,
    }
    return Calibration(
        id=calibration_id(datastore.version, protocol),
        datastore_version=datastore.version,
        k=chosen.k,
        knn_temperature=chosen.knn_temperature,
        lmbda=chosen.lmbda,
        protocol=protocol,
        report={
            "tokens": report.tokens,
            "fit_tokens": int(for_fit.sum()),
            "base": {"nll_per_token": report.base_nll, "perplexity": report.base_perplexity},
            "mixed": {"nll_per_token": report.mixed_nll, "perplexity": report.mixed_perplexity},
            "gain": report.gain.gain,
            "gain_interval_95": [report.gain.low, report.gain.high],
            "fits": [{"k": f.k, "knn_temperature": f.knn_temperature, "lambda": f.lmbda, "nll": f.nll} for f in fits],
            "nprobe": nprobe,
        },
        helps=report.mixed_nll < report.base_nll,
    )


def measure(evidence: Evidence, k: int, knn_temperature: float, lmbda: float, seed: int) -> Report:
    """Base and mixed NLL of some held-out tokens, with the interval of the gain."""
    evidence = evidence.nearest(k)
    mixed = mixed_log_probs(evidence, knn_temperature, lmbda)
    return Report(
        len(mixed),
        -float(evidence.base.double().mean()),
        -float(mixed.double().mean()),
        bootstrap_gain(evidence.base, mixed, evidence.blocks, seed=seed),
    )


def _fit_rows(queries: Queries, documents: Sequence[PlannedDocument]) -> Tensor:
    """(N,) bool: which tokens are for fitting; whole documents, about half of the tokens."""
    count = len(queries.targets)
    if len(documents) == 1:
        return torch.arange(count) < count // 2
    sizes = [0, 0]
    for_fit = []
    for document in sorted(documents, key=lambda d: (d.digest, d.id)):
        side = 0 if sizes[0] <= sizes[1] else 1
        sizes[side] += document.num_entries
        if side == 0:
            for_fit.append(id(document))
    chosen = torch.tensor([id(document) in for_fit for document in documents])
    return chosen[queries.documents]
