"""λ rules against slow, obvious recomputations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.knn.lambdas import Bucketed, LambdaRule, Rrc
from knnlm_core.signals import lm_signals
from knnlm_core.types import Neighbors


def apply(rule: LambdaRule, distances: list[list[float]]) -> list[float]:
    """λ of rows with these distances; −1 in place of a distance is a missing neighbour."""
    table = torch.tensor(distances)
    missing = table < 0
    neighbors = Neighbors(
        torch.arange(table.numel()).view(table.shape).masked_fill(missing, -1),
        table.masked_fill(missing, math.inf),
        torch.zeros_like(table, dtype=torch.int64).masked_fill(missing, -1),
    )
    signals = lm_signals(torch.log_softmax(torch.randn(len(distances), 7), dim=1))
    lmbda = rule(neighbors, torch.ones(len(distances)), signals)
    assert lmbda.dtype == torch.float64
    return list(lmbda.tolist())


@given(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.floats(0, 200, width=32), min_size=1, max_size=20),
    st.data(),
)
def test_a_bucket_is_the_first_whose_edge_is_not_below(
    edges: list[float], nearest: list[float], data: st.DataObject
) -> None:
    lmbdas = data.draw(st.lists(st.floats(0, 1), min_size=len(edges) + 1, max_size=len(edges) + 1))
    rule = Bucketed(torch.tensor(edges), torch.tensor(lmbdas, dtype=torch.float64))
    need = [lmbdas[next((i for i, edge in enumerate(edges) if d <= edge), len(edges))] for d in nearest]
    assert apply(rule, [[d, d + 1] for d in nearest]) == need


def test_distances_beyond_what_was_fitted_get_the_outer_buckets() -> None:
    rule = Bucketed(torch.tensor([5.0, 9.0]), torch.tensor([0.7, 0.3, 0.1], dtype=torch.float64))
    assert apply(rule, [[0.0], [1e9], [-1.0]]) == [0.7, 0.1, 0.1]


def test_confidence_is_the_ratio_of_nearest_to_farthest() -> None:
    rule = Rrc(alpha=0.3, scale=0.1)
    rows = [[1.0, 2.0, 10.0], [9.0, 9.5, 10.0], [3.0, 10.0, -1.0]]
    need = [1 / (1 + math.exp((rows[0][0] / 10 - 0.3) / 0.1)), 1 / (1 + math.exp((0.9 - 0.3) / 0.1)), 0.5]
    assert apply(rule, rows) == pytest.approx(need, rel=1e-6)


def test_exact_repetitions_alone_are_as_sure_as_can_be() -> None:
    assert apply(Rrc(alpha=0.3, scale=0.1), [[0.0, 0.0]]) == pytest.approx([1 / (1 + math.exp(-3))])
