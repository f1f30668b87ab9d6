"""Calibrate: fit retrieval settings on one part of the held-out documents, report them on the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import JsonValue
from torch import Tensor

from knnlm_builder.progress import Reporter
from knnlm_builder.stages.compare_gates import DEFAULT_SAVED, TimedSearch, settle_gates
from knnlm_builder.stages.compare_gates import VALIDATION_SHARE as GATE_VALIDATION_SHARE
from knnlm_builder.stages.curve import Curve, lmbda_curves
from knnlm_builder.stages.fit import (
    LMBDAS,
    TAU_FACTORS,
    TAU_STEPS_PER_OCTAVE,
    Evidence,
    Interval,
    Known,
    bootstrap_gain,
    choose,
)
from knnlm_builder.stages.fit_gate import DEPTH, LEARNING_RATE, LEAVES, SHARES, TREES
from knnlm_builder.stages.fit_lambda import (
    EPOCHS,
    HIDDEN,
    MAX_BUCKETS,
    PREFERENCE,
    VALIDATION_SHARE,
    apply_rule,
    fit_rules,
    rules_of,
)
from knnlm_builder.stages.held_out import BLOCK_TOKENS, Queries, search_all
from knnlm_builder.stages.plan import Plan, PlannedDocument
from knnlm_builder.stages.practice import MAX_SHARE, Practice
from knnlm_builder.stages.practice import MAX_TOKENS as PRACTICE_TOKENS
from knnlm_builder.stages.walked import Held
from knnlm_core.datastore.calibration import NUMERICS, PRACTICE_IDS, Calibration, LambdaModeName, calibration_id
from knnlm_core.datastore.gate_file import describe
from knnlm_core.datastore.reader import Datastore
from knnlm_core.knn.gates import GATE_FEATURES
from knnlm_core.knn.lambdas import LambdaMode
from knnlm_core.retrieval import Source, lambda_rule
from knnlm_core.trees import Trees

MAX_K = 1024
MIN_SCORED_TOKENS = 2  # one to fit on, one to report on
MIN_INTERVAL_BLOCKS = 8  # resampling fewer says nothing about the spread


class Report(NamedTuple):
    """How the fitted settings do on the documents that were not used to fit them."""

    tokens: int
    base_nll: float  # nats per token
    mixed_nll: float
    gain: Interval
    blocks: int  # that the interval draws from

    @property
    def base_perplexity(self) -> float:
        """exp of the base LM's mean NLL."""
        return math.exp(self.base_nll)

    @property
    def mixed_perplexity(self) -> float:
        """exp of the mixture's mean NLL."""
        return math.exp(self.mixed_nll)


class Calibrated(NamedTuple):
    """A calibration and what goes beside it."""

    calibration: Calibration
    curves: Sequence[Curve]
    trees: Trees | None


def calibrate(
    datastore: Datastore,
    plan: Plan,
    queries: Queries,
    *,
    seed: int,
    nprobe: int,
    reporter: Reporter,
    practice: Practice | None = None,
    budget_ms: float | None = None,
    numerics: str,
) -> Calibrated:
    """Choose k and τ for one version, λ or a rule for it, and a gate.

    Every second held-out document (by hash) is for fitting, the others are for the report; a single document is cut in
    the middle. The settings published are those fitted, so the report is of text that they have never seen.

    Args:
        practice: more text to fit rules and the gate on.
        budget_ms: milliseconds of retrieval per token that the gate must keep to; None searches always.
        numerics: of the LM that ``queries`` were encoded with.
    Raises: InvalidParameter: no gate keeps to the budget.
    """
    k = min(MAX_K, datastore.entries)
    evidence = search_all(queries, lambda keys: datastore.search(keys, k, nprobe=nprobe or None), reporter)
    for_fit = _fit_rows(queries, plan.held_out)
    to_fit, for_report = (evidence.take(rows.nonzero()[:, 0]) for rows in (for_fit, ~for_fit))
    chosen, fits = choose(to_fit)
    to_fit = to_fit.nearest(chosen.k)
    fit_held = Held.of(to_fit, queries.keys[for_fit], queries.documents[for_fit])
    num_practice = 0
    if practice is not None:
        num_practice = len(practice.queries.keys)
        practised = practice.evidence.nearest(chosen.k), practice.queries.keys, practice.queries.documents
        fit_held = Held.of(*practised).joined(fit_held)
    fitted_rules = fit_rules(fit_held.evidence, chosen, seed=seed)
    fitted = set(queries.documents[for_fit].tolist())
    nearest = for_report.nearest(chosen.k)
    lambdas: dict[LambdaModeName, Tensor] = {
        "fixed": torch.full((len(nearest.base),), chosen.lmbda, dtype=torch.float64),
        **{
            name: apply_rule(rule, nearest, chosen.knn_temperature)
            for name, rule in rules_of(fitted_rules.rules).items()
        },
    }
    reports = {name: measure(nearest, chosen.knn_temperature, lmbda, seed) for name, lmbda in lambdas.items()}
    rule = lambda_rule(fitted_rules.rules, LambdaMode(fitted_rules.mode), "")
    source = Source(datastore, chosen.k, chosen.knn_temperature, chosen.lmbda, lambda_rule=rule)
    report_held = Held.of(nearest, queries.keys[~for_fit], queries.documents[~for_fit])
    timed = None if budget_ms is None else TimedSearch(datastore, nprobe or None, budget_ms)
    gates = settle_gates(
        fit_held, report_held, source, num_practice=num_practice, timed=timed, seed=seed, reporter=reporter
    )
    report = reports[fitted_rules.mode]
    if gates.mode != "always":
        report = report_of(nearest, gates.log_probs, seed)
    protocol: dict[str, JsonValue] = {
        "held_out_unit": plan.held_out_unit,
        "held_out_documents": [document.id for document in plan.held_out],
        "held_out_digests": [document.digest for document in plan.held_out],
        "window": plan.windowing.window,
        "stride": plan.windowing.stride,
        "max_k": k,
        "lambda_grid": {"first": LMBDAS[0], "last": LMBDAS[-1], "step": LMBDAS[0]},
        "temperature_grid": {
            "times": "median squared distance of the nearest neighbour",
            "first": TAU_FACTORS[0],
            "last": TAU_FACTORS[-1],
            "steps_per_octave": TAU_STEPS_PER_OCTAVE,
        },
        "lambda_rules": {
            "buckets": MAX_BUCKETS,
            "hidden": HIDDEN,
            "epochs": EPOCHS,
            "validation_share": VALIDATION_SHARE,
            "plainer_within": PREFERENCE,
        },
        "gate_trees": {
            "trees": TREES,
            "leaves": LEAVES,
            "depth": DEPTH,
            "learning_rate": LEARNING_RATE,
            "searches_in_walks": list(SHARES),
            "validation_share": GATE_VALIDATION_SHARE,
            "saves_by_default": DEFAULT_SAVED,
        },
        "practice": {"max_tokens": PRACTICE_TOKENS, "max_share": MAX_SHARE},
        PRACTICE_IDS: [document.id for document in practice.documents] if practice is not None else [],
        "practice_digests": [document.digest for document in practice.documents] if practice is not None else [],
        "latency_budget_ms": budget_ms,
        # What was measured here and now is an input of the choice.
        "cost_ms": gates.cost and {"search": gates.cost.search, "decision": gates.cost.decision},
        "bootstrap_block_tokens": BLOCK_TOKENS,
        NUMERICS: numerics,
        "seed": seed,
    }
    calibration = Calibration(
        id=calibration_id(datastore.version, protocol),
        datastore_version=datastore.version,
        k=chosen.k,
        knn_temperature=chosen.knn_temperature,
        lmbda=chosen.lmbda,
        lambda_mode=fitted_rules.mode,
        lambda_rules=fitted_rules.rules,
        follow_rule=gates.follow_rule,
        gate=gates.mode,
        gate_threshold=gates.threshold,
        gate_trees=gates.trees and describe(gates.trees, GATE_FEATURES, datastore.manifest.lm.model_fingerprint),
        learned_threshold=gates.learned_threshold,
        protocol=protocol,
        report={
            "tokens": report.tokens,
            "fit_tokens": int(for_fit.sum()),
            "practice_tokens": num_practice,
            # Documents that no setting was fitted on, not even in part.
            "held_out_documents": [d.id for i, d in enumerate(plan.held_out) if i not in fitted],
            "base": {"nll_per_token": report.base_nll, "perplexity": report.base_perplexity},
            "mixed": {"nll_per_token": report.mixed_nll, "perplexity": report.mixed_perplexity},
            "gain": report.gain.gain,
            "gain_interval_95": _interval(report),
            "blocks": report.blocks,
            "lambda_modes": {
                name: {
                    "perplexity": of_mode.mixed_perplexity,
                    "gain": of_mode.gain.gain,
                    "gain_interval_95": _interval(of_mode),
                    "validation_nll": fitted_rules.validation_nll.get(name),
                }
                for name, of_mode in reports.items()
            },
            "fits": [{"k": f.k, "knn_temperature": f.knn_temperature, "lambda": f.lmbda, "nll": f.nll} for f in fits],
            "nprobe": nprobe,
            "gates": [
                {
                    "gate": of_gate.gate,
                    "threshold": of_gate.threshold,
                    "perplexity": of_gate.perplexity,
                    "searched": of_gate.searched,
                    "followed": of_gate.followed,
                    "change": -of_gate.loss.gain,
                    "change_interval_95": [-of_gate.loss.high, -of_gate.loss.low]
                    if report.blocks >= MIN_INTERVAL_BLOCKS
                    else None,
                }
                for of_gate in gates.reports
            ],
        },
        helps=report.mixed_nll < report.base_nll,
    )
    return Calibrated(calibration, lmbda_curves(for_report, fits), gates.trees)


def _interval(report: Report) -> list[JsonValue] | None:
    return [report.gain.low, report.gain.high] if report.blocks >= MIN_INTERVAL_BLOCKS else None


def measure(evidence: Evidence, knn_temperature: float, lmbda: Tensor, seed: int) -> Report:
    """Base and mixed NLL of some held-out tokens, with the interval of the gain.

    Args:   lmbda: (N,) float64, λ of each.
    """
    return report_of(evidence, Known.of(evidence, knn_temperature).log_probs(lmbda), seed)


def report_of(evidence: Evidence, mixed: Tensor, seed: int) -> Report:
    """`measure` for log-probabilities (N,) that are known."""
    return Report(
        len(mixed),
        -float(evidence.base.double().mean()),
        -float(mixed.double().mean()),
        bootstrap_gain(evidence.base, mixed, evidence.blocks, seed=seed),
        len(torch.unique(evidence.blocks)),
    )


def _fit_rows(queries: Queries, documents: Sequence[PlannedDocument]) -> Tensor:
    """(N,) bool: which tokens are for fitting; whole documents, about half of the tokens."""
    scored = [document for document in documents if document.num_entries]
    if len(scored) == 1:
        count = len(queries.targets)
        return torch.arange(count) < count // 2
    sizes = [0, 0]
    for_fit = []
    for document in sorted(scored, key=lambda d: (d.digest, d.id)):
        side = 0 if sizes[0] <= sizes[1] else 1
        sizes[side] += document.num_entries
        if side == 0:
            for_fit.append(id(document))
    chosen = torch.tensor([id(document) in for_fit for document in documents])
    return chosen[queries.documents]
