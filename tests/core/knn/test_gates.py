"""Gates: what they decide, what they report, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.errors import InvalidKnnParams, UnsupportedFeature
from knnlm_core.knn.gates import ALWAYS, NEVER, Confidence, Context, EveryN, join_contexts, parse_gate
from knnlm_core.signals import lm_signals


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
    assert (parse_gate("every_n", 4.0).threshold, parse_gate("always").threshold) == (4.0, None)


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
        ("sometimes", None, r"`knn.gate` must be one of always, never, every_n, confidence, got 'sometimes'"),
    ],
)
def test_what_is_wrong_with_a_gate_is_named(name: str, threshold: float | None, message: str) -> None:
    with pytest.raises(InvalidKnnParams, match=message) as caught:
        parse_gate(name, threshold)
    assert caught.value.param == ("knn.gate" if "one of" in message else "knn.gate_threshold")


def test_a_planned_gate_is_told_apart_from_a_wrong_one() -> None:
    with pytest.raises(UnsupportedFeature, match="'learned' is not offered by this build"):
        parse_gate("learned", 0.1)
