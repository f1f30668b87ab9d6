"""λ rules against slow, obvious recomputations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.knn.distribution import neighbor_log_weights
from knnlm_core.knn.lambdas import (
    LAMBDA_FEATURES,
    MAX_RULE_LAMBDA,
    Bucketed,
    LambdaMode,
    LambdaRule,
    Learned,
    Rrc,
    lambda_features,
    parse_lambda_mode,
)
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
    lmbda = rule(neighbors, neighbor_log_weights(neighbors, torch.ones(len(distances))), signals)
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


# -- the network -------------------------------------------------------------------------------------------------------


def slow_features(distances: list[float], values: list[int], tau: float, log_probs: list[float]) -> list[float]:
    """What the network looks at, from the neighbours that there are, as the names of the features say."""
    total = sum(math.exp(-(d - distances[0]) / tau) for d in distances)
    weights = [math.exp(-(d - distances[0]) / tau) / total for d in distances]
    guess = max(range(len(log_probs)), key=log_probs.__getitem__)
    ordered = sorted(log_probs, reverse=True)
    return [
        math.log1p(distances[0]),
        math.log1p(sum(distances[:8]) / len(distances[:8])),
        math.log1p(distances[-1]),
        -sum(w * math.log(w) for w in weights if w > 0),
        weights[0],
        sum(w for w, value in zip(weights, values, strict=True) if value == values[0]),
        float(values[0] == guess),
        math.log(max(1e-9, sum(w for w, value in zip(weights, values, strict=True) if value == guess))),
        float(len(set(values[:8]))),
        ordered[0],
        -sum(p * math.exp(p) for p in log_probs),
        ordered[0] - ordered[1],
    ]


@given(st.integers(0, 10**6), st.integers(1, 14), st.sampled_from([0.5, 3.0, 40.0]))
def test_the_networks_features_are_what_their_names_say(seed: int, present: int, tau: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    width, vocab = 14, 6
    distances = (30 * torch.rand(2, width, generator=draw)).sort(dim=1).values
    values = torch.randint(0, vocab, (2, width), generator=draw)
    missing = torch.arange(width) >= torch.tensor([[present], [width]])
    log_probs = torch.log_softmax(3 * torch.randn(2, vocab, generator=draw), dim=1)
    neighbors = Neighbors(
        torch.arange(2 * width).view(2, width).masked_fill(missing, -1),
        distances.masked_fill(missing, math.inf),
        values.masked_fill(missing, -1),
    )
    have = lambda_features(neighbors, neighbor_log_weights(neighbors, torch.full((2,), tau)), lm_signals(log_probs))
    assert have.shape == (2, len(LAMBDA_FEATURES))
    for row, count in enumerate((present, width)):
        need = slow_features(
            distances[row, :count].tolist(), values[row, :count].tolist(), tau, log_probs[row].double().tolist()
        )
        assert have[row].tolist() == pytest.approx(need, rel=1e-4, abs=1e-4)


def test_a_row_without_neighbours_has_features_all_the_same() -> None:
    nothing = Neighbors(torch.full((1, 3), -1), torch.full((1, 3), math.inf), torch.full((1, 3), -1))
    have = lambda_features(
        nothing, torch.full((1, 3), -math.inf), lm_signals(torch.log_softmax(torch.randn(1, 5), dim=1))
    )
    assert have.tolist() == [[0.0] * len(LAMBDA_FEATURES)]


def test_the_network_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = [(4, 12), (3, 4), (1, 3)]
    layers = tuple(
        (torch.randn(shape, generator=draw).double(), torch.randn(shape[0], generator=draw).double()) for shape in sizes
    )
    mean, scale = torch.randn(12, generator=draw).double(), 1 + torch.rand(12, generator=draw).double()
    features = torch.randn(5, 12, generator=draw).double()
    have = Learned(mean, scale, layers).of_features(features)
    for row, x in enumerate(features.tolist()):
        x = [(value - m) / s for value, m, s in zip(x, mean.tolist(), scale.tolist(), strict=True)]
        for number, (weight, bias) in enumerate(layers):
            x = [math.tanh(value) for value in x] if number else x
            x = [
                sum(w * v for w, v in zip(line, x, strict=True)) + b
                for line, b in zip(weight.tolist(), bias.tolist(), strict=True)
            ]
        assert have[row].item() == pytest.approx(1 / (1 + math.exp(-x[0])), rel=1e-12)


def test_no_rule_makes_a_token_impossible() -> None:
    assert apply(Rrc(alpha=0.9, scale=0.01), [[0.0, 1.0]]) == [MAX_RULE_LAMBDA]
    layer = (torch.zeros(1, 12).double(), torch.tensor([99.0]).double())
    sure = Learned(torch.zeros(12).double(), torch.ones(12).double(), (layer,))
    assert apply(sure, [[1.0, 2.0]]) == [MAX_RULE_LAMBDA]


# -- what a request asks for -------------------------------------------------------------------------------------------


def test_a_mode_is_named_and_does_not_go_with_a_number() -> None:
    assert parse_lambda_mode("bucketed", beside=False) is LambdaMode.BUCKETED
    assert parse_lambda_mode("fixed", beside=True) is LambdaMode.FIXED
    with pytest.raises(InvalidKnnParams, match="must be one of fixed, bucketed, rrc, learned, got 'best'"):
        parse_lambda_mode("best", beside=False)
    with pytest.raises(InvalidKnnParams, match=r"must be fixed where `knn\.lambda` is given, got 'rrc'") as caught:
        parse_lambda_mode("rrc", beside=True)
    assert caught.value.param == "knn.lambda_mode"
