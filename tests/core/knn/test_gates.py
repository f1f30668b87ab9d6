"""Gates: what they decide, what they report, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.knn.gates import (
    ALWAYS,
    GATE_FEATURES,
    NEVER,
    Automaton,
    Confidence,
    Context,
    EveryN,
    LearnedGate,
    Pointers,
    gate_features,
    join_contexts,
    parse_gate,
)
from knnlm_core.signals import lm_signals
from knnlm_core.trees import Trees
from knnlm_core.types import Neighbors


def context_of(lm: torch.Tensor, positions: list[int]) -> Context:
    return Context(lm_signals(lm), torch.tensor(positions))


def predictions(rows: int, scale: float = 4.0) -> torch.Tensor:
    return torch.log_softmax(scale * torch.randn(rows, 9, generator=torch.Generator().manual_seed(1)), dim=1)


def test_always_and_never_look_at_nothing() -> None:
    keys = torch.zeros(3, 2)
    for gate, search in ((ALWAYS, True), (NEVER, False)):
        assert not gate.needs_context
        decisions = gate(keys, None)
        assert decisions.search.tolist() == [search] * 3
        assert all(math.isnan(score) for score in decisions.scores.tolist())


def test_every_nth_position_is_searched_wherever_a_row_stands_in_the_batch() -> None:
    lm, positions = predictions(7), [0, 1, 2, 3, 4, 6, 9]
    decisions = EveryN(3)(torch.zeros(7, 2), context_of(lm, positions))
    assert decisions.search.tolist() == [True, False, False, True, False, True, True]
    assert decisions.scores.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert EveryN(1)(torch.zeros(7, 2), context_of(lm, positions)).search.all()


@given(st.floats(0, 1))
def test_what_the_model_is_sure_of_is_not_searched(threshold: float) -> None:
    lm = predictions(50)
    decisions = Confidence(threshold)(torch.zeros(50, 2), context_of(lm, [0] * 50))
    need = lm.exp().amax(dim=1)
    torch.testing.assert_close(decisions.scores, need)
    assert decisions.search.tolist() == (decisions.scores < threshold).tolist()


def test_a_threshold_of_zero_never_searches() -> None:
    assert not Confidence(0.0)(torch.zeros(50, 2), context_of(predictions(50, 40.0), [0] * 50)).search.any()


def pointers_of(counts: list[int]) -> Pointers:
    """So many pointers per row, at distances 1, 2, 3 …"""
    width = max(1, *counts)
    column = torch.arange(width).expand(len(counts), width)
    missing = column >= torch.tensor(counts)[:, None]
    near = Neighbors(
        column.masked_fill(missing, -1), (column + 1.0).masked_fill(missing, math.inf), column.masked_fill(missing, -1)
    )
    weights = torch.where(missing, -math.inf, -torch.tensor(counts).clamp(min=1).log()[:, None].expand_as(column))
    return Pointers(near, weights, torch.tensor([[0.5, 2.0, 1.0]] * len(counts), dtype=torch.float64))


@pytest.mark.parametrize("threshold", [1, 3])
def test_the_automaton_searches_where_it_has_too_few_pointers(threshold: int) -> None:
    counts = [0, 1, 2, 3, 5]
    decisions = Automaton(threshold)(torch.zeros(5, 2), None, pointers_of(counts))
    assert decisions.search.tolist() == [count < threshold for count in counts]
    assert decisions.scores.tolist() == counts


def test_the_learned_gate_searches_where_its_trees_expect_more_than_the_threshold() -> None:
    """One stump on the number of pointers: few are worth 0.4 nats of search, many 0.1."""
    index = GATE_FEATURES.index("log of the number of pointers")
    stump = {
        "feature": np.array([[index, 0, 0]]), "threshold": np.array([[math.log1p(2.5), 0, 0]]),
        "left": np.array([[1, 1, 2]]), "right": np.array([[2, 1, 2]]), "value": np.array([[0.0, 0.3, 0.0]]),
        "baseline": np.array([0.1]),
    }  # fmt: skip
    gate = LearnedGate(Trees.of(stump, len(GATE_FEATURES)), 0.25)
    counts, lm = [0, 1, 2, 3, 5], predictions(5)
    decisions = gate(torch.zeros(5, 2), context_of(lm, [4] * 5), pointers_of(counts))
    assert decisions.scores.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.1, 0.1])
    assert decisions.search.tolist() == [True, True, True, False, False]
    assert (gate.follows, gate.needs_context) == (True, True)
    for threshold in (-0.1, 101.0, math.nan):
        with pytest.raises(InvalidKnnParams, match="of learned must be in 0 … 100 nats"):
            LearnedGate(gate.trees, threshold)


def test_a_gates_features_have_their_names_order() -> None:
    pointers = pointers_of([0, 2])
    features = gate_features(lm_signals(predictions(2)), pointers)
    assert features.shape == (2, len(GATE_FEATURES))
    assert bool(torch.isfinite(features).all())
    assert features[:, -3:].tolist() == pointers.history.tolist()
    assert features[:, GATE_FEATURES.index("log of the number of pointers")].tolist() == pytest.approx(
        [0.0, math.log(3)]
    )


def test_contexts_are_joined_and_taken_in_order() -> None:
    lm = predictions(5)
    whole = context_of(lm, [3, 1, 4, 1, 5])
    joined = join_contexts([context_of(lm[:2], [3, 1]), context_of(lm[2:], [4, 1, 5])])
    assert torch.equal(joined.positions, whole.positions)
    assert torch.equal(joined.signals.entropy, whole.signals.entropy)
    assert joined.take(slice(1, 3)).positions.tolist() == [1, 4]


def test_a_gate_is_made_from_its_name_and_threshold() -> None:
    assert parse_gate("always") is ALWAYS
    assert parse_gate("never") is NEVER
    assert parse_gate("every_n", 4.0) == EveryN(4)
    assert parse_gate("confidence", 0.9) == Confidence(0.9)
    assert parse_gate("automaton") == Automaton(1)
    assert parse_gate("automaton", 3.0) == Automaton(3)
    assert (parse_gate("every_n", 4.0).threshold, parse_gate("always").threshold) == (4.0, None)
    assert [gate.follows for gate in (ALWAYS, NEVER, EveryN(2), Confidence(0.5), Automaton())] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("name", "threshold", "message"),
    [
        ("always", 0.5, "`knn.gate_threshold` must not be given where `knn.gate` is always, got 0.5"),
        ("confidence", None, "`knn.gate_threshold` must be given where `knn.gate` is confidence"),
        ("confidence", 1.5, r"`knn.gate_threshold` of confidence must be in 0 … 1, got 1.5"),
        ("confidence", math.nan, r"of confidence must be in 0 … 1, got nan"),
        ("every_n", 0, r"`knn.gate_threshold` of every_n must be in 1 … 1000000, got 0"),
        ("every_n", 2.5, r"must be a whole number, got 2.5"),
        ("every_n", math.inf, r"must be a whole number, got inf"),
        ("every_n", math.nan, r"must be a whole number, got nan"),
        ("automaton", 0, r"`knn.gate_threshold` of automaton must be a whole number in 1 … 64, got 0"),
        ("automaton", 65, r"in 1 … 64, got 65"),
        ("automaton", 1.5, r"must be a whole number in 1 … 64, got 1.5"),
        ("automaton", math.nan, r"must be a whole number in 1 … 64, got nan"),
        (
            "sometimes",
            None,
            r"`knn.gate` must be one of always, never, every_n, confidence, automaton, learned, got 'sometimes'",
        ),
    ],
)
def test_what_is_wrong_with_a_gate_is_named(name: str, threshold: float | None, message: str) -> None:
    with pytest.raises(InvalidKnnParams, match=message) as caught:
        parse_gate(name, threshold)
    assert caught.value.param == ("knn.gate" if "one of" in message else "knn.gate_threshold")
