"""Calibration: the fit finds what is there, the report is of other text, and a store that does not help is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from small_build import Recorder, build, digits_lm, flat_signals, given, opened, random_digits

from knnlm_builder.stages.calibrate import _fit_rows, measure
from knnlm_builder.stages.curve import lmbda_curves
from knnlm_builder.stages.fit import (
    K_TOLERANCE,
    LMBDAS,
    TAU_FACTORS,
    Evidence,
    Fit,
    Known,
    bootstrap_gain,
    choose,
    fit,
)
from knnlm_builder.stages.held_out import Queries
from knnlm_builder.stages.plan import PlannedDocument
from knnlm_core.datastore import layout
from knnlm_core.errors import DatastoreDoesNotHelp, DatastoreNotFound
from knnlm_core.types import Neighbors

Array = npt.NDArray[np.float64]
VOCAB = 50


def mixture(n: int, k: int, knn_temperature: float, lmbda: float, seed: int) -> Evidence:
    """Tokens drawn from λ · p_knn + (1 − λ) · p_lm of random neighbours and a random LM."""
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.uniform(5, 60, (n, k)), axis=1)
    values = rng.integers(0, VOCAB, (n, k))
    base = rng.dirichlet(np.full(VOCAB, 0.3), n)
    weights = np.exp(-distances / knn_temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    p = (1 - lmbda) * base
    np.add.at(p, (np.arange(n)[:, None], values), lmbda * weights)
    targets = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(max=VOCAB - 1)
    return evidence(np.log(base[np.arange(n), targets]), distances, values, targets)


def evidence(base: Array, distances: Array, values: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> Evidence:
    n, k = values.shape
    neighbors = Neighbors(
        torch.arange(n * k).reshape(n, k), torch.from_numpy(distances).float(), torch.from_numpy(values)
    )
    return Evidence(
        torch.from_numpy(base).float(), neighbors, torch.from_numpy(targets), torch.arange(n) // 128, flat_signals(n)
    )


def slow_nll(found: Evidence, knn_temperature: float, lmbda: float) -> float:
    """Mean negative log-likelihood of the mixture in float64, by the formula."""
    ids, distances, values = (part.numpy() for part in found.neighbors)
    distances = distances.astype(np.float64)
    base = found.base.double().numpy()
    total = 0.0
    for row in range(len(base)):
        here = ids[row] >= 0
        p_knn = 0.0
        if here.any():
            weights = np.exp(-(distances[row, here] - distances[row, here].min()) / knn_temperature)
            p_knn = weights[values[row, here] == int(found.targets[row])].sum() / weights.sum()
        weight = lmbda if here.any() else 0.0
        total -= math.log(weight * p_knn + (1 - weight) * math.exp(base[row]))
    return total / len(base)


@pytest.mark.parametrize(("knn_temperature", "lmbda"), [(4.0, 0.3), (12.0, 0.6), (1.5, 0.85)])
def test_the_fit_finds_the_settings_that_made_the_text(knn_temperature: float, lmbda: float) -> None:
    found = fit(mixture(20_000, 8, knn_temperature, lmbda, seed=0), 8)
    assert found.lmbda == pytest.approx(lmbda, abs=0.03)
    # The grid has a step of √2: the nearest point of it is within a factor of 2^¼, a neighbour within 2^¾.
    assert abs(math.log2(found.knn_temperature / knn_temperature)) < 0.75


def test_the_fit_is_a_slow_grid_search(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mixture(120, 6, 6.0, 0.4, seed=1)
    missing = torch.zeros_like(found.neighbors.entry_ids, dtype=torch.bool)
    missing[5:20, 3:] = True  # few neighbours …
    missing[20:30] = True  # … and none
    found.neighbors.entry_ids[missing] = -1
    found.neighbors.values[missing] = -1
    found.neighbors.distances[missing] = math.inf
    for k in (6, 2):
        nearest = found.neighbors.distances[found.neighbors.entry_ids[:, 0] >= 0, 0]
        scale = float(nearest.median())
        need = Fit(k, scale, 0.0, slow_nll(found.nearest(k), 1.0, 0.0))
        for factor in TAU_FACTORS:
            for lmbda in LMBDAS[4::5]:
                nll = slow_nll(found.nearest(k), scale * factor, lmbda)
                if nll < need.nll:
                    need = Fit(k, scale * factor, lmbda, nll)
        monkeypatch.setattr("knnlm_builder.stages.fit.LMBDAS", LMBDAS[4::5])
        have = fit(found, k)
        assert have.nll == pytest.approx(need.nll, abs=1e-6)
        assert (have.k, have.knn_temperature, have.lmbda) == (k, pytest.approx(need.knn_temperature), need.lmbda)
        assert 0 < have.lmbda < 1


def test_mixed_log_probs_are_the_formula() -> None:
    found = mixture(200, 5, 3.0, 0.5, seed=2)
    for tau, lmbda in ((0.5, 0.01), (3.0, 0.5), (200.0, 0.99)):
        have = Known.of(found, tau).nll(lmbda)
        assert have == pytest.approx(slow_nll(found, tau, lmbda), abs=1e-5)


def test_where_neighbours_are_noise_the_fit_leaves_the_base_lm_alone() -> None:
    n = 4000
    rng = np.random.default_rng(3)
    sure = np.full(n, math.log(0.9))  # an LM that is nearly always right
    noise = evidence(sure, np.sort(rng.uniform(1, 9, (n, 4)), axis=1), rng.integers(5, 50, (n, 4)), np.zeros(n, int))
    found = fit(noise, 4)
    assert (found.lmbda, found.nll) == (0.0, pytest.approx(-math.log(0.9)))


def test_equal_distances_of_zero_are_no_obstacle() -> None:
    found = mixture(300, 4, 5.0, 0.5, seed=4)
    found.neighbors.distances.zero_()
    best = fit(found, 4)
    assert best.knn_temperature > 0
    assert best.nll == pytest.approx(slow_nll(found, best.knn_temperature, best.lmbda), abs=1e-6)


def test_the_smaller_k_is_taken_when_more_neighbours_add_nothing() -> None:
    found = mixture(3000, 8, 6.0, 0.5, seed=5)
    far = Neighbors(
        torch.cat([found.neighbors.entry_ids, torch.arange(3000 * 120).reshape(3000, 120) + 10**6], dim=1),
        torch.cat([found.neighbors.distances, torch.full((3000, 120), 1e4)], dim=1),
        torch.cat([found.neighbors.values, torch.zeros(3000, 120, dtype=torch.int64)], dim=1),
    )
    chosen, fits = choose(found._replace(neighbors=far))
    assert [f.k for f in fits] == [8, 32, 128]
    assert chosen == fits[0]


def test_more_neighbours_are_taken_when_they_help() -> None:
    found = mixture(3000, 40, 1000.0, 0.8, seed=6)  # nearly flat: all neighbours count
    chosen, fits = choose(found)
    assert [f.k for f in fits] == [8, 32, 40]
    assert chosen.k == 40
    assert fits[0].nll > chosen.nll + math.log1p(K_TOLERANCE)


def test_the_smaller_k_is_taken_when_more_neighbours_add_next_to_nothing() -> None:
    chosen, fits = choose(mixture(3000, 40, 8.0, 0.5, seed=9))
    assert chosen == fits[1]
    assert fits[2].nll < fits[1].nll < fits[2].nll + math.log1p(K_TOLERANCE)


def test_the_curve_of_each_k_is_its_perplexity_at_every_lambda() -> None:
    found = mixture(400, 40, 6.0, 0.4, seed=7)
    _, fits = choose(found)
    curves = lmbda_curves(found, fits)
    for curve, settings in zip(curves, fits, strict=True):
        assert (curve.k, curve.knn_temperature) == (settings.k, settings.knn_temperature)
        assert curve.lmbdas == (0.0, *LMBDAS)
        assert curve.perplexities[0] == pytest.approx(math.exp(-float(found.base.double().mean())))
        assert min(curve.perplexities) == pytest.approx(math.exp(settings.nll))
        for lmbda in (0.25, 0.99):
            need = math.exp(slow_nll(found.nearest(curve.k), curve.knn_temperature, lmbda))
            assert curve.perplexities[curve.lmbdas.index(lmbda)] == pytest.approx(need, rel=1e-5)


def test_a_report_measures_base_and_mixture_on_the_same_tokens() -> None:
    found = mixture(500, 8, 6.0, 0.4, seed=8)
    report = measure(found.nearest(8), 6.0, torch.full((len(found.base),), 0.4, dtype=torch.float64), seed=0)
    assert report.tokens == 500
    assert report.base_nll == pytest.approx(slow_nll(found, 6.0, 0.0), abs=1e-5)
    assert report.mixed_nll == pytest.approx(slow_nll(found, 6.0, 0.4), abs=1e-5)
    assert report.base_perplexity == pytest.approx(math.exp(report.base_nll))
    assert report.gain.gain == pytest.approx(1 - report.mixed_perplexity / report.base_perplexity)


# -- which text is fitted on -----------------------------------------------------------------------------------------


def planned(sizes: list[int]) -> list[PlannedDocument]:
    """Documents of so many tokens; their digests are in no order."""
    return [
        PlannedDocument(f"d{i}", None, None, None, (), f"{i * 2654435761 % 2**32:08x}", 0, size, (0, 0))
        for i, size in enumerate(sizes)
    ]


def queries(documents: list[PlannedDocument]) -> Queries:
    index = torch.cat([torch.full((d.num_entries,), i) for i, d in enumerate(documents)])
    nothing = torch.zeros(len(index))
    return Queries(nothing[:, None], nothing, index, index, index, flat_signals(len(index)))


@for_all(st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) - len(sizes) >= 2))
def test_no_document_is_both_fitted_on_and_reported_on(sizes: list[int]) -> None:
    documents = planned(sizes)
    asked = queries(documents)
    for_fit = _fit_rows(asked, documents)
    counts = int(for_fit.sum()), int((~for_fit).sum())
    assert min(counts) >= 1
    if sum(size > 1 for size in sizes) > 1:
        for document in range(len(documents)):
            sides = for_fit[asked.documents == document].tolist()
            assert len(set(sides)) <= 1
        assert abs(counts[0] - counts[1]) < max(sizes)
    else:
        assert abs(counts[0] - counts[1]) <= 1


def test_a_single_document_is_cut_in_the_middle() -> None:
    documents = planned([11])
    assert _fit_rows(queries(documents), documents).tolist() == [True] * 5 + [False] * 5


def test_the_split_depends_neither_on_the_order_nor_on_the_names_of_documents() -> None:
    documents = planned([9, 5, 12, 7, 3, 8])
    for_fit = _fit_rows(queries(documents), documents)
    sides = {d.digest: bool(for_fit[queries(documents).documents == i].all()) for i, d in enumerate(documents)}
    turned = documents[::-1]
    again = _fit_rows(queries(turned), turned)
    assert sides == {d.digest: bool(again[queries(turned).documents == i].all()) for i, d in enumerate(turned)}


# -- the interval ----------------------------------------------------------------------------------------------------


def test_the_bootstrap_draws_whole_blocks() -> None:
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(9) * 7, [3, 1, 10, 4, 4, 6, 2, 8, 5])  # of different sizes, with gaps in the numbers
    base = -rng.exponential(3, len(blocks))
    mixed = base + rng.normal(0.1, 0.5, len(blocks))
    have = bootstrap_gain(
        torch.from_numpy(base), torch.from_numpy(mixed), torch.from_numpy(blocks), seed=5, resamples=300
    )
    draws = np.random.default_rng(5).integers(0, 9, size=(300, 9))
    names = np.unique(blocks)
    gains = []
    for draw in draws:
        tokens = np.concatenate([np.flatnonzero(blocks == names[number]) for number in draw])
        gains.append(1 - np.exp(-mixed[tokens].mean()) / np.exp(-base[tokens].mean()))
    assert have.gain == pytest.approx(1 - np.exp(-mixed.mean()) / np.exp(-base.mean()))
    assert (have.low, have.high) == pytest.approx(tuple(np.quantile(gains, [0.025, 0.975])))


def test_a_gain_that_is_everywhere_the_same_has_no_width() -> None:
    base = -torch.rand(100, dtype=torch.float64)
    have = bootstrap_gain(base, base + 0.1, torch.arange(100) // 10, seed=0)
    assert have == pytest.approx((1 - math.exp(-0.1),) * 3)


def test_the_interval_holds_the_true_gain_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    repetitions, num_blocks, size, true = 200, 60, 20, 0.08
    covered = too_narrow = 0
    for _ in range(repetitions):
        # Tokens of a block rise and fall together.
        together = rng.normal(0, 0.3, num_blocks)
        difference = true + np.repeat(together, size) + rng.normal(0, 0.5, num_blocks * size)
        base = torch.zeros(num_blocks * size, dtype=torch.float64)
        mixed = torch.from_numpy(difference)
        blocks = torch.arange(num_blocks * size) // size
        have = bootstrap_gain(base, mixed, blocks, seed=int(rng.integers(2**31)), resamples=500)
        covered += have.low <= 1 - math.exp(-true) <= have.high
        alone = bootstrap_gain(base, mixed, torch.arange(len(blocks)), seed=0, resamples=200)
        too_narrow += alone.low <= 1 - math.exp(-true) <= alone.high
    assert 0.88 <= covered / repetitions <= 0.99
    assert too_narrow / repetitions < 0.8  # what would come out if neighbouring tokens were taken for independent


# -- a store that does not help --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "digits.txt"
    path.write_text(random_digits(0, 1200))
    return path


def test_a_store_of_unrelated_text_does_not_help_and_is_not_published(tmp_path: Path, noise: Path) -> None:
    settings = given(tmp_path, noise)
    message = r"mixture reaches perplexity 10\.\d+, the base LM alone 10\.\d+; nothing is published \(--force"
    with pytest.raises(DatastoreDoesNotHelp, match=message):
        build(settings, digits_lm())
    assert layout.published_names(tmp_path) == []
    assert layout.published_versions(tmp_path, "law") == []
    assert layout.calibration_ids(tmp_path, "law") == []
    with pytest.raises(DatastoreNotFound):
        opened(settings)


def test_a_store_that_does_not_help_can_be_forced_and_says_so(tmp_path: Path, noise: Path) -> None:
    with pytest.raises(DatastoreDoesNotHelp):
        build(given(tmp_path, noise), digits_lm())
    shard = next(tmp_path.rglob("keys.arrow"))
    written = shard.stat().st_mtime_ns
    recorder = Recorder()
    forced = given(tmp_path, noise, force=True)
    result = build(forced, digits_lm(), recorder)
    with opened(forced) as store:
        assert store.version == result.version
        assert (store.manifest.quality["helps"], store.manifest.quality["forced"]) == (False, True)
        assert store.calibration is not None
        assert not store.calibration.helps
        # What the first attempt had encoded was not encoded again.
        assert (store.folder / layout.shard_name(0) / layout.KEYS).stat().st_mtime_ns == written
