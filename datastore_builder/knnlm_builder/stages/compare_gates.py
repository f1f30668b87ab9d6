"""Compare gates on held-out tokens: what each one costs in perplexity for the searches that it saves."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_builder.progress import Reporter
from knnlm_builder.stages.fit import Interval, bootstrap_gain
from knnlm_builder.stages.fit_gate import GateFit, explore_at_random, fit_gate
from knnlm_builder.stages.walked import Held, Walked, log_probs_of_search, walk
from knnlm_core.datastore.calibration import FollowRule, GateModeName
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import InvalidParameter
from knnlm_core.knn.gates import ALWAYS, Automaton, Confidence, EveryN, Gate, LearnedGate
from knnlm_core.retrieval import Source, ready_rule
from knnlm_core.trees import Trees

PERIODS = (2, 3, 4, 6, 10)
MIN_POINTERS = (1, 4, 16)
SAVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of searches at which confidence is looked at
GAINS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.17, 0.25, 0.4, 0.6, 1.0)  # nats
VALIDATION_SHARE = 0.2  # of the tokens to fit on, where there is no practice: thresholds are chosen on them
DEFAULT_SAVED = 0.5  # what the learned gate saves at least where a request gives no threshold
_TIMED_SEARCHES = 32


class Candidate(NamedTuple):
    """A gate and what became of some tokens under it."""

    gate: Gate
    walked: Walked

    @property
    def mode(self) -> GateModeName:
        """As calibrations name it."""
        return self.gate.mode.value

    @property
    def nll(self) -> float:
        """Nats per token."""
        return -float(self.walked.log_probs.mean())


def candidates(confidences: Tensor, fitted: GateFit | None) -> list[Gate]:
    """Every gate that is compared, `always` first.

    Args:   confidences: (N,) log-probabilities of the LM's guesses, from which thresholds of `confidence` are taken.
    """
    quantiles = confidences.double().exp().quantile(1 - torch.tensor(SAVED, dtype=torch.float64)).tolist()
    gates: list[Gate] = [ALWAYS, *(EveryN(n) for n in PERIODS), *(Confidence(q) for q in sorted(set(quantiles)))]
    if fitted is not None:
        gates += [Automaton(float(least)) for least in MIN_POINTERS]
        gates += [LearnedGate(fitted.trees, gain) for gain in GAINS]
    return gates


def compare(
    held: Held, source: Source, gates: Sequence[Gate], fitted: GateFit | None, reporter: Reporter, title: str
) -> list[Candidate]:
    """Walk through the tokens once for each gate."""
    if fitted is not None and fitted.follow_rule is not None:
        source = replace(source, follow_rule=ready_rule(fitted.follow_rule, ""))
    held = held._replace(log_probs=log_probs_of_search(held.evidence, source))
    compared = []
    with reporter.stage(title, len(gates), "gates") as advance:
        for gate in gates:
            compared.append(Candidate(gate, walk(held, replace(source, gate=gate))))
            advance(1)
    return compared


def default_threshold(compared: Sequence[Candidate]) -> float:
    """Of the learned gate: the lowest that saves its share of the searches, or the highest that there is."""
    learned = [candidate for candidate in compared if isinstance(candidate.gate, LearnedGate)]
    saving = [c for c in learned if 1 - c.walked.searched >= DEFAULT_SAVED]
    return float((saving[0] if saving else learned[-1]).gate.threshold or 0.0)


class TimedSearch(NamedTuple):
    """What a budget is measured on."""

    datastore: Datastore
    nprobe: int | None  # lists that serving will visit; None for an index without lists
    budget_ms: float  # of retrieval per token


class Cost(NamedTuple):
    """Milliseconds of one stream, measured here and now."""

    search: float  # for one token
    decision: float  # of a gate that follows, pointers included


def measure_cost(held: Held, timed: TimedSearch, source: Source, fitted: GateFit | None) -> Cost:
    """Time single searches, and a walk token by token."""
    rows = torch.linspace(0, len(held.keys) - 1, min(_TIMED_SEARCHES, len(held.keys))).long().tolist()
    seconds = []
    for row in rows:
        begun = time.perf_counter()
        timed.datastore.search(held.keys[row : row + 1], source.k, nprobe=timed.nprobe)
        seconds.append(time.perf_counter() - begun)
    decision = 0.0
    if fitted is not None:
        longest = max(held.runs, key=len)
        run = held.take(slice(longest.start, longest.stop))._replace(log_probs=torch.zeros(len(longest)))
        begun = time.perf_counter()
        walk(run, replace(source, gate=LearnedGate(fitted.trees, GAINS[len(GAINS) // 2])))
        decision = 1000 * (time.perf_counter() - begun) / len(run.keys)
    return Cost(1000 * float(torch.tensor(seconds).median()), decision)


class GateOutcome(NamedTuple):
    """How a gate does on tokens that nothing was fitted to or chosen on."""

    gate: GateModeName
    threshold: float | None
    perplexity: float
    searched: float
    followed: float
    loss: Interval  # of perplexity against `always`; negative gains are losses


def report_on(compared: Sequence[Candidate], blocks: Tensor, seed: int) -> list[GateOutcome]:
    """Each gate against `always`, the first of them, on the same tokens."""
    always = compared[0].walked.log_probs
    return [
        GateOutcome(
            candidate.mode,
            candidate.gate.threshold,
            math.exp(candidate.nll),
            candidate.walked.searched,
            candidate.walked.followed,
            bootstrap_gain(always, candidate.walked.log_probs, blocks, seed=seed),
        )
        for candidate in compared
    ]


class Gates(NamedTuple):
    """What a calibration says of gates."""

    follow_rule: FollowRule | None
    trees: Trees | None
    learned_threshold: float | None
    mode: GateModeName
    threshold: float | None
    log_probs: Tensor  # (N,) of the tokens to report on, under that gate
    reports: list[GateOutcome]
    cost: Cost | None  # measured only where a budget is given


def settle_gates(
    to_fit: Held,
    for_report: Held,
    source: Source,
    *,
    num_practice: int,
    timed: TimedSearch | None,
    seed: int,
    reporter: Reporter,
) -> Gates:
    """Fit the learned gate, choose thresholds and the default gate, and report on all of them.

    Args:
        to_fit, for_report: tokens of different documents.
        source: the datastore with the settings that were chosen.
        num_practice: how many of the tokens to fit on, the first ones, are of the store's own documents; thresholds
            are chosen on the others alone, by trees that have not seen them.
        timed: where a budget is to be kept to.
    Raises: InvalidParameter: no gate keeps to the budget.
    """
    count = len(to_fit.keys)
    if num_practice:
        train, validation = slice(0, num_practice), slice(num_practice, count)
    else:
        train, validation = to_fit.split(VALIDATION_SHARE)
    with reporter.stage("Fit the gate", len(to_fit.keys), "tokens") as advance:
        walks = explore_at_random(to_fit, source, seed=seed)
        on_train = fit_gate(to_fit.take(train), [some.take(train) for some in walks], source, seed=seed)
        fitted = fit_gate(to_fit, walks, source, seed=seed) if on_train is not None else None
        advance(len(to_fit.keys))
    held = to_fit.take(validation)
    cost = measure_cost(held, timed, source, on_train) if timed is not None else None
    confidences = to_fit.evidence.signals.max_log_prob
    tried = compare(held, source, candidates(confidences, on_train), on_train, reporter, "Choose a gate")
    chosen = tried[0] if timed is None or cost is None else _best_within(tried, timed.budget_ms, cost)
    compared = compare(for_report, source, candidates(confidences, fitted), fitted, reporter, "Compare gates")
    (settled,) = [c for c in compared if (c.mode, c.gate.threshold) == (chosen.mode, chosen.gate.threshold)]
    return Gates(
        follow_rule=fitted and fitted.follow_rule,
        trees=fitted and fitted.trees,
        learned_threshold=default_threshold(tried) if fitted is not None else None,
        mode=settled.mode,
        threshold=settled.gate.threshold,
        log_probs=settled.walked.log_probs,
        reports=report_on(compared, for_report.evidence.blocks, seed),
        cost=cost,
    )


def _best_within(tried: Sequence[Candidate], budget_ms: float, cost: Cost) -> Candidate:
    """The gate with the lowest NLL among those that keep to a budget of retrieval per token."""
    costs = [c.walked.searched * cost.search + c.gate.follows * cost.decision for c in tried]
    within = [candidate for candidate, ms in zip(tried, costs, strict=True) if ms <= budget_ms]
    if not within:
        raise InvalidParameter(
            f"`latency_budget_ms` must be at least {min(costs):.2f}, what the cheapest gate takes here, "
            f"got {budget_ms:g}",
            param="latency_budget_ms",
        )
    return min(within, key=lambda candidate: candidate.nll)
