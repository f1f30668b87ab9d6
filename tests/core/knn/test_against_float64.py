"""The fast sparse path against a slow, dense float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.knn.distribution import has_neighbors, knn_log_probs, target_log_probs
from knnlm_core.knn.interpolation import interpolate, interpolate_targets
from knnlm_core.types import Neighbors

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def reference(lm: np.ndarray, neighbors: Neighbors, tau: float, lmbda: float) -> np.ndarray:
    """One row, dense, in float64, as the formula stands on paper."""
    ids, distances, values = (t.numpy() for t in neighbors)
    p_lm = np.exp(lm.astype(np.float64))
    p_knn = np.zeros_like(p_lm)
    real = [i for i in range(len(ids)) if ids[i] >= 0]
    if not real:
        return np.log(np.maximum(p_lm, 0)) if lmbda == 0 else lm.astype(np.float64)
    nearest = min(float(distances[i]) for i in real)
    for i in real:
        p_knn[values[i]] += math.exp(-(float(distances[i]) - nearest) / tau)
    p_knn /= p_knn.sum()
    with np.errstate(divide="ignore"):
        return np.log(lmbda * p_knn + (1 - lmbda) * p_lm)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, Neighbors, torch.Tensor, torch.Tensor]:
    batch, k, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(2, 20))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 13.0, 1e4, 1e7]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    lm = torch.log_softmax(torch.randn(batch, vocab, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0])), 1)
    # rounding makes ties; few tokens make duplicates
    distances = (torch.rand(batch, k, generator=generator) * 8).round() / 8 * scale
    distances, _ = distances.sort(dim=1)
    values = torch.randint(0, min(vocab, draw(st.integers(1, 20))), (batch, k), generator=generator)
    ids = torch.arange(k).repeat(batch, 1)
    missing = draw(st.integers(0, k))  # k > N: the tail is empty
    if missing:
        ids[:, k - missing :], values[:, k - missing :], distances[:, k - missing :] = -1, -1, math.inf
    tau = torch.tensor([draw(st.sampled_from([1e-2, 0.5, 1.6, 50.0, 1e5])) for _ in range(batch)])
    lmbda = torch.tensor([draw(st.sampled_from([0.0, 1e-6, 0.2, 0.999, 1.0])) for _ in range(batch)])
    return lm, Neighbors(ids, distances, values), tau, lmbda


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_mixture_equals_the_dense_float64_formula(device: str, case) -> None:
    lm, neighbors, tau, lmbda = case
    lmbda = torch.where(has_neighbors(neighbors), lmbda, 0.0)
    on = Neighbors(*(t.to(device) for t in neighbors))
    sparse = knn_log_probs(on, knn_temperature=tau.to(device))
    mixed = interpolate(lm.to(device), sparse, lmbda.to(device)).cpu().double().numpy()
    for row in range(len(lm)):
        expected = reference(
            lm[row].numpy(), Neighbors(*(t[row] for t in neighbors)), tau[row].item(), lmbda[row].item()
        )
        # Compared where float32 can hold the number at all; below, both must be vanishingly small.
        visible = expected > -80
        np.testing.assert_allclose(mixed[row][visible], expected[visible], atol=1e-5)
        assert (mixed[row][~visible] <= -79).all()
        assert abs(np.exp(mixed[row]).sum() - 1) < 1e-5


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_p_knn_rows_sum_to_one_and_name_each_token_once(case) -> None:
    _, neighbors, tau, _ = case
    sparse = knn_log_probs(neighbors, knn_temperature=tau)
    for row, some in enumerate(has_neighbors(neighbors).tolist()):
        visible = sparse.log_probs[row] > -math.inf
        tokens = sparse.token_ids[row][visible].tolist()
        assert len(tokens) == len(set(tokens))
        assert abs(sparse.log_probs[row].double().exp().sum().item() - some) < 1e-5


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_scoring_one_target_equals_the_full_distribution(case) -> None:
    lm, neighbors, tau, lmbda = case
    lmbda = torch.where(has_neighbors(neighbors), lmbda, 0.0)
    full = interpolate(lm, knn_log_probs(neighbors, knn_temperature=tau), lmbda)
    for token in range(lm.shape[1]):
        target = torch.full((len(lm),), token)
        knn = target_log_probs(neighbors, target, knn_temperature=tau)
        torch.testing.assert_close(interpolate_targets(lm[:, token], knn, lmbda), full[:, token], atol=2e-6, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_order_of_neighbours_is_irrelevant(case, seed: int) -> None:
    _, neighbors, tau, _ = case
    order = torch.randperm(neighbors.values.shape[1], generator=torch.Generator().manual_seed(seed))
    shuffled = Neighbors(*(t[:, order] for t in neighbors))
    vocab = 20
    dense = [
        interpolate(
            torch.full((len(tau), vocab), -math.log(vocab)),
            knn_log_probs(n, knn_temperature=tau),
            torch.where(has_neighbors(n), 0.5, 0.0),
        )
        for n in (neighbors, shuffled)
    ]
    torch.testing.assert_close(dense[0], dense[1], atol=1e-6, rtol=1e-6)


def _one_row() -> tuple[torch.Tensor, Neighbors]:
    lm = torch.log_softmax(torch.tensor([[1.0, 2.0, 3.0, -40.0]]), 1)
    return lm, Neighbors(torch.tensor([[5, 9]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 3]]))


def test_lambda_zero_is_the_plain_lm_bit_for_bit() -> None:
    lm, neighbors = _one_row()
    mixed = interpolate(lm, knn_log_probs(neighbors, knn_temperature=torch.ones(1)), torch.zeros(1))
    assert torch.equal(mixed, lm)


def test_lambda_one_is_the_plain_neighbours_and_minus_infinity_elsewhere() -> None:
    lm, neighbors = _one_row()
    mixed = interpolate(lm, knn_log_probs(neighbors, knn_temperature=torch.ones(1)), torch.ones(1))
    assert mixed[0, 1] == mixed[0, 2] == -math.inf
    assert abs(mixed[0, 0].exp().item() - 1 / (1 + math.exp(-1))) < 1e-6


def test_missing_neighbours_carry_no_mass_wherever_they_stand() -> None:
    ids = torch.tensor([[-1, 4, -1, 8]])
    neighbors = Neighbors(ids, torch.tensor([[0.0, 1.0, 0.5, 2.0]]), torch.tensor([[-1, 2, -1, 7]]))
    sparse = knn_log_probs(neighbors, knn_temperature=torch.ones(1))
    mass = {t: p for t, p in zip(sparse.token_ids[0].tolist(), sparse.log_probs[0].exp().tolist(), strict=True) if p}
    assert set(mass) == {2, 7}
    assert abs(mass[2] - 1 / (1 + math.exp(-1))) < 1e-6


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperature_is_refused(tau: float) -> None:
    _, neighbors = _one_row()
    with pytest.raises(InvalidKnnParams, match=r"knn\.temperature"):
        knn_log_probs(neighbors, knn_temperature=torch.tensor([tau]))


@pytest.mark.parametrize("lmbda", [-0.1, 1.1, 2.0, math.nan])
def test_impossible_lambda_is_refused(lmbda: float) -> None:
    lm, neighbors = _one_row()
    with pytest.raises(InvalidKnnParams, match=r"knn\.lambda"):
        interpolate(lm, knn_log_probs(neighbors, knn_temperature=torch.ones(1)), torch.tensor([lmbda]))
