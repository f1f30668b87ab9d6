"""Several stores behind one row, against a slow, dense float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from knnlm_core.errors import DatastoreCorrupt, InvalidKnnParams, InvalidParameter
from knnlm_core.knn.attribution import contributions
from knnlm_core.knn.distribution import target_log_probs
from knnlm_core.knn.fusion import Fusion
from knnlm_core.knn.gates import ALWAYS, NEVER, Confidence, Context, EveryN, Gate
from knnlm_core.knn.lambdas import Bucketed, LambdaRule, Rrc
from knnlm_core.mixture import find, mix_rows, mix_targets, source_log_probs
from knnlm_core.retrieval import MAX_SOURCES, MAX_TOTAL_K, Retrieval, Source
from knnlm_core.signals import lm_signals
from knnlm_core.types import EntryRange, Neighbors

VOCAB = 12


class Shelf:
    """A store of a few entries, searched by brute force in float64; it counts its calls."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys, self.values, self.calls = keys.astype(np.float64), values, 0

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        self.calls += 1
        ids = np.full((len(queries), k), -1)
        distances = np.full((len(queries), k), math.inf)
        values = np.full((len(queries), k), -1)
        for row, query in enumerate(queries.double().numpy()):
            for place, (distance, entry) in enumerate(self.nearest(query, k, exclude)):
                ids[row, place], distances[row, place], values[row, place] = entry, distance, self.values[entry]
        return Neighbors(torch.from_numpy(ids), torch.from_numpy(distances).float(), torch.from_numpy(values))

    def nearest(self, query: np.ndarray, k: int, exclude: Sequence[EntryRange]) -> list[tuple[float, int]]:
        every = ((self.keys - query) ** 2).sum(axis=1).astype(np.float32).astype(np.float64)
        left_out = {i for first, stop in exclude for i in range(first, stop)}
        return sorted((float(every[i]), i) for i in range(len(self.values)) if i not in left_out)[:k]


class BrokenShelf(Shelf):
    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        raise DatastoreCorrupt("the shelf fell over")


def shelf(seed: int, entries: int = 9, dim: int = 3) -> Shelf:
    draw = np.random.default_rng(seed)
    return Shelf(draw.integers(-2, 3, (entries, dim)), draw.integers(0, VOCAB, entries))


class Expected(NamedTuple):
    """One row, dense, in float64, as the formulas stand on paper."""

    p: np.ndarray  # (V,)
    lmbda: float
    p_knn: list[np.ndarray]  # per source, (V,); zeros where it found nothing
    parts: dict[tuple[int, int], float]  # (source, entry) → λ w of the neighbour


def opens(gate: Gate, p_lm: np.ndarray, position: int) -> bool:
    """Whether a gate lets a row search."""
    if isinstance(gate, EveryN):
        return position % gate.period == 0
    return float(p_lm.max()) < gate.threshold if isinstance(gate, Confidence) else gate is ALWAYS


def lambda_of(source: Source, distances: list[float]) -> float:
    """λ of a source that has found something."""
    rule = source.lambda_rule
    if isinstance(rule, Bucketed):
        edges, lmbdas = rule.edges.tolist(), rule.lmbdas.tolist()
        return lmbdas[sum(edge < distances[0] for edge in edges)]
    if isinstance(rule, Rrc):
        ratio = distances[0] / distances[-1] if distances[-1] > 0 else 0.0
        return 1 - 1 / (1 + math.exp(-(ratio - rule.alpha) / rule.scale))
    return source.lmbda


def expected(
    p_lm: np.ndarray, query: np.ndarray, retrieval: Retrieval | None, position: int, applied: type = np.float32
) -> Expected:
    if retrieval is None:
        return Expected(p_lm, 0.0, [], {})
    weighed: list[dict[int, float]] = []
    lmbdas: list[float] = []
    for source in retrieval.sources:
        is_open = opens(source.gate, p_lm, position)
        found = source.datastore.nearest(query, source.k, source.exclude) if is_open else []  # type: ignore[attr-defined]
        weighed.append({entry: -distance / source.knn_temperature for distance, entry in found})
        lmbdas.append(lambda_of(source, [distance for distance, _ in found]) if found else 0.0)
    if retrieval.fusion is Fusion.NEIGHBORS:
        every = [score for scores in weighed for score in scores.values()]
        total = math.fsum(math.exp(score - max(every)) for score in every) if every else 1.0
        lmbda = retrieval.sources[0].lmbda if every else 0.0
        mass = [{e: lmbda * math.exp(s - max(every)) / total for e, s in scores.items()} for scores in weighed]
    else:
        mass = []
        for source, own_lmbda, scores in zip(retrieval.sources, lmbdas, weighed, strict=True):
            top = max(scores.values(), default=0.0)
            total = math.fsum(math.exp(score - top) for score in scores.values())
            mass.append({e: source.weight * own_lmbda * math.exp(s - top) / total for e, s in scores.items()})
        lmbda = math.fsum(s.weight * own for s, own in zip(retrieval.sources, lmbdas, strict=True))
    # λ is mixed in float32, shares are told apart in float64; where it is nearly 1, its rounding is all that the LM's
    # part is made of.
    p, p_knn = (1 - float(applied(lmbda))) * p_lm, []
    for source, masses, scores in zip(retrieval.sources, mass, weighed, strict=True):
        for entry, share in masses.items():
            p[source.datastore.values[entry]] += share  # type: ignore[attr-defined]
        own = np.zeros(VOCAB)
        top = max(scores.values(), default=0.0)
        for entry, score in scores.items():
            own[source.datastore.values[entry]] += math.exp(score - top)  # type: ignore[attr-defined]
        p_knn.append(own / max(own.sum(), 1e-300))
    parts = {(i, entry): share for i, masses in enumerate(mass) for entry, share in masses.items()}
    return Expected(p, lmbda, p_knn, parts)


def context_of(lm: Tensor, positions: Sequence[int]) -> Context:
    return Context(lm_signals(lm), torch.tensor(positions))


RULES: list[LambdaRule] = [
    Bucketed(torch.tensor([0.5, 2.0, 6.0]), torch.tensor([0.75, 0.4, 0.1, 0.0], dtype=torch.float64)),
    Rrc(0.3, 0.1),
]
GATES: list[Gate] = [EveryN(2), Confidence(0.35), NEVER]
SHELVES = [shelf(seed, entries) for seed, entries in enumerate((9, 1, 5, 14))]


@st.composite
def retrievals(draw: st.DrawFn) -> Retrieval | None:
    if not draw(st.integers(0, 5)):
        return None
    count = draw(st.integers(1, len(SHELVES)))
    stores = draw(st.permutations(SHELVES))[:count]
    fusion = draw(st.sampled_from(Fusion))
    weights = [draw(st.sampled_from([1.0, 0.25, 3.0, 1e-6])) for _ in stores]
    tau, lmbda = draw(st.sampled_from([0.05, 1.6, 40.0])), draw(st.sampled_from([0.0, 0.3, 1.0]))
    sources = []
    rule = None
    for store, weight in zip(stores, weights, strict=True):
        if fusion is Fusion.DISTRIBUTIONS:
            tau, lmbda = draw(st.sampled_from([0.05, 1.6, 40.0])), draw(st.sampled_from([0.0, 1e-6, 0.3, 1.0]))
            rule = draw(st.sampled_from([None, None, *RULES]))
        gate = draw(st.sampled_from([*[ALWAYS] * 4, *GATES]))
        everything = EntryRange(0, len(store.values))
        exclude = draw(st.sampled_from([(), (), (everything,), (EntryRange(0, 1),)]))
        k = draw(st.integers(1, 20))
        sources.append(Source(store, k, tau, lmbda, exclude, weight / sum(weights), gate, rule))
    return Retrieval(tuple(sources), fusion)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Retrieval | None], Context]:
    kinds = draw(st.lists(retrievals(), min_size=1, max_size=4))
    rows = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 3.0, 20.0]))
    lm = torch.log_softmax(torch.randn(len(rows), VOCAB, generator=generator) * scale, 1)
    keys = torch.randint(-2, 3, (len(rows), 3), generator=generator).float()
    positions = draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    return lm, keys, rows, context_of(lm, positions)


@settings(max_examples=150, deadline=None)
@given(steps())
def test_a_mixture_of_stores_equals_the_dense_float64_formula(step) -> None:
    lm, keys, rows, context = step
    mixed, found = mix_rows(lm, keys, rows, context.positions)
    targets = torch.arange(len(rows)) % VOCAB
    of_target = mix_targets(lm[range(len(rows)), targets], targets, find(keys, rows, context))
    for row, retrieval in enumerate(rows):
        p_lm, position = lm[row].double().exp().numpy(), int(context.positions[row])
        need = expected(p_lm.copy(), keys[row].double().numpy(), retrieval, position)
        with np.errstate(divide="ignore"):
            log_p = np.log(need.p)
        visible = log_p > -60
        np.testing.assert_allclose(mixed[row].double().numpy()[visible], log_p[visible], atol=2e-5)
        assert (mixed[row].numpy()[~visible] < -55).all()
        assert abs(mixed[row].double().exp().sum().item() - 1) < 1e-5
        assert found.lmbda[row].item() == pytest.approx(need.lmbda, abs=1e-7)
        if visible[targets[row]]:
            assert of_target[row].item() == pytest.approx(log_p[targets[row]], abs=2e-5)
        open_ = retrieval is not None and any(opens(source.gate, p_lm, position) for source in retrieval.sources)
        assert bool(found.searched[row]) is open_
        has_any = bool((found.neighbors.entry_ids[row] >= 0).any())
        assert found.log_weights[row].double().exp().sum().item() == pytest.approx(float(has_any), abs=1e-5)
        assert found.shares[row].sum().item() == pytest.approx(float(has_any), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(steps())
def test_a_row_is_mixed_alone_as_in_company(step) -> None:
    lm, keys, rows, context = step
    together, found = mix_rows(lm, keys, rows, context.positions)
    for row, retrieval in enumerate(rows):
        itself = slice(row, row + 1)
        alone, itself = mix_rows(lm[itself], keys[itself], [retrieval], context.take(itself).positions)
        torch.testing.assert_close(together[row], alone[0], atol=1e-6, rtol=1e-6)
        assert found.lmbda[row] == itself.lmbda[0]
        entries = [
            [(int(f.sources[i]), int(n)) for i, n in enumerate(f.neighbors.entry_ids[at].tolist()) if n >= 0]
            for f, at in ((found, row), (itself, 0))
        ]
        assert entries[0] == entries[1]


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(0, VOCAB - 1))
def test_contributions_are_those_of_a_brute_force_sum_and_add_up(step, token: int) -> None:
    lm, keys, rows, context = step
    targets = torch.full((len(rows),), token)
    found = find(keys, rows, context)
    parts = contributions(
        found.neighbors.values, found.log_weights, found.lmbda, targets=targets, lm_log_probs=lm[:, token]
    )
    assert parts.rows.tolist() == sorted(parts.rows.tolist())
    for row, retrieval in enumerate(rows):
        mine = (parts.rows == row).nonzero()[:, 0]
        shares = parts.shares[mine].tolist()
        assert parts.model[row].item() + math.fsum(shares) == pytest.approx(1, abs=1e-9)
        p_lm, position = lm[row].double().exp().numpy(), int(context.positions[row])
        need = expected(p_lm, keys[row].double().numpy(), retrieval, position, np.float64)
        if need.p[token] < 1e-30:
            continue
        have: dict[tuple[int, int], float] = {}
        for at, share in zip(mine.tolist(), shares, strict=True):
            column = int(parts.columns[at])
            have[int(found.sources[column]), int(found.neighbors.entry_ids[row, column])] = share
        for (source, entry), mass in need.parts.items():
            store = retrieval.sources[source].datastore
            share = mass / need.p[token] if store.values[entry] == token else 0.0
            assert have.get((source, entry), 0.0) == pytest.approx(share, abs=1e-6)
        assert len(have) <= len(need.parts)


def test_a_token_of_probability_zero_is_the_models_alone() -> None:
    parts = contributions(
        torch.tensor([[3]]), torch.zeros(1, 1), torch.ones(1),
        targets=torch.tensor([5]), lm_log_probs=torch.tensor([-2.0]),
    )  # fmt: skip
    assert parts.model.tolist() == [1.0]
    assert not len(parts.rows)


# -- limits ------------------------------------------------------------------------------------------------------------


def two(lmbdas: tuple[float, float] = (0.5, 0.25), **given: object) -> Retrieval:
    sources = [
        Source(store, 4, 2.0, lmbda, weight=0.5) for store, lmbda in zip((SHELVES[0], SHELVES[3]), lmbdas, strict=True)
    ]
    return Retrieval(tuple(sources), **given)  # type: ignore[arg-type]


def rows_of(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lm = torch.log_softmax(torch.randn(count, VOCAB, generator=generator), 1)
    return lm, torch.randint(-2, 3, (count, 3), generator=generator).float()


@pytest.mark.parametrize("fusion", Fusion)
def test_lambda_zero_in_all_stores_is_the_plain_lm_bit_for_bit(fusion: Fusion) -> None:
    lm, keys = rows_of(6)
    assert torch.equal(mix_rows(lm, keys, [two((0.0, 0.0), fusion=fusion)] * 6).log_probs, lm)
    mixed = mix_rows(lm, keys, [two((0.0, 0.0), fusion=fusion), two()] * 3).log_probs
    assert torch.equal(mixed[::2], lm[::2])
    assert not torch.equal(mixed[1::2], lm[1::2])


@pytest.mark.parametrize("fusion", Fusion)
def test_lambda_one_in_all_stores_leaves_nothing_to_the_lm(fusion: Fusion) -> None:
    lm, keys = rows_of(6)
    retrieval = two((1.0, 1.0), fusion=fusion).with_weights([1, 9])
    mixed, found = mix_rows(lm, keys, [retrieval] * 6)
    assert found.lmbda.tolist() == [1.0] * 6
    for row in range(6):
        held = set(found.neighbors.values[row].tolist())
        assert {token for token in range(VOCAB) if mixed[row, token] > -math.inf} <= held


def test_a_single_source_is_the_same_whatever_the_fusion() -> None:
    lm, keys = rows_of(5)
    retrieval = Retrieval((Source(SHELVES[0], 4, 2.0, 0.5),))
    need = mix_rows(lm, keys, [retrieval] * 5).log_probs
    assert torch.equal(mix_rows(lm, keys, [replace(retrieval, fusion=Fusion.NEIGHBORS)] * 5).log_probs, need)


def test_one_store_twice_with_any_weights_is_that_store() -> None:
    lm, keys = rows_of(5)
    once = Retrieval((Source(SHELVES[0], 4, 2.0, 0.5),))
    twice = Retrieval(once.sources * 2).with_weights([1, 3])
    need = mix_rows(lm, keys, [once] * 5).log_probs
    torch.testing.assert_close(mix_rows(lm, keys, [twice] * 5).log_probs, need, atol=1e-6, rtol=1e-6)


def test_merged_neighbours_are_those_of_one_store_that_holds_everything() -> None:
    lm, keys = rows_of(8)
    a, b = SHELVES[0], SHELVES[3]
    union = Shelf(np.concatenate([a.keys, b.keys]), np.concatenate([a.values, b.values]))
    merged = Retrieval(tuple(Source(s, 20, 1.5, 0.4, weight=0.5) for s in (a, b)), fusion=Fusion.NEIGHBORS)
    need = mix_rows(lm, keys, [Retrieval((Source(union, 40, 1.5, 0.4),))] * 8).log_probs
    torch.testing.assert_close(mix_rows(lm, keys, [merged] * 8).log_probs, need, atol=1e-6, rtol=1e-6)


def test_a_store_that_finds_nothing_leaves_its_lambda_to_the_lm() -> None:
    lm, keys = rows_of(4)
    retrieval = two()
    second = retrieval.sources[1]
    empty = replace(second, exclude=(EntryRange(0, len(second.datastore.values)),))  # type: ignore[attr-defined]
    found = mix_rows(lm, keys, [replace(retrieval, sources=(retrieval.sources[0], empty))] * 4).found
    assert found.lmbda.tolist() == [0.25] * 4
    assert found.shares.tolist() == [[1.0, 0.0]] * 4


def test_stores_of_several_rows_are_searched_once_whatever_their_place() -> None:
    a, b = shelf(21), shelf(22)
    both = Retrieval((Source(a, 3, 1.0, 0.5, weight=0.5), Source(b, 7, 1.0, 0.5, weight=0.5)))
    swapped = Retrieval((Source(b, 2, 1.0, 0.5, weight=0.5), Source(a, 5, 1.0, 0.5, weight=0.5)))
    single = Retrieval((Source(b, 4, 1.0, 0.5),))
    lm, keys = rows_of(4)
    found = mix_rows(lm, keys, [both, swapped, single, None]).found
    assert (a.calls, b.calls) == (1, 1)
    assert [int((ids >= 0).sum()) for ids in found.neighbors.entry_ids] == [10, 7, 4, 0]
    assert found.sources.tolist() == [0] * 4 + [1] * 7


def test_a_store_that_fails_takes_only_its_own_rows_along() -> None:
    lm, keys = rows_of(4)
    broken = BrokenShelf(SHELVES[0].keys, SHELVES[0].values)
    bad = Retrieval((Source(SHELVES[0], 4, 1.0, 0.5, weight=0.5), Source(broken, 4, 1.0, 0.5, weight=0.5)))
    rows = [bad, two(), None, bad]
    mixed, found = mix_rows(lm, keys, rows)
    assert found.failures.keys() == {0, 3}
    torch.testing.assert_close(mixed[1:3], mix_rows(lm[1:3], keys[1:3], rows[1:3]).log_probs, atol=1e-6, rtol=1e-6)
    with pytest.raises(DatastoreCorrupt, match="fell over"):
        mix_targets(lm[:, 0], torch.zeros(4, dtype=torch.long), find(keys, rows))
    with pytest.raises(DatastoreCorrupt, match="fell over"):
        source_log_probs(keys, torch.zeros(4, dtype=torch.long), bad)


def test_source_log_probs_are_those_of_each_store_alone_whatever_the_gate() -> None:
    _, keys = rows_of(6)
    targets = torch.arange(6)
    retrieval = two().gated(NEVER).with_weights([1, 7])
    have = source_log_probs(keys, targets, retrieval)
    assert have.shape == (6, 2)
    for column, source in enumerate(retrieval.sources):
        need = target_log_probs(
            source.datastore.search(keys, source.k), targets, knn_temperature=torch.full((6,), source.knn_temperature)
        )
        torch.testing.assert_close(have[:, column], need)


# -- checks ------------------------------------------------------------------------------------------------------------


def test_limits_of_a_retrieval_are_named() -> None:
    source = Source(SHELVES[0], 4, 2.0, 0.5)
    Retrieval((replace(source, k=MAX_TOTAL_K // MAX_SOURCES),) * MAX_SOURCES).check()
    with pytest.raises(InvalidParameter, match=r"`knn\.datastore` must name 1 … 8 datastores, got 9"):
        Retrieval((source,) * 9).check()
    with pytest.raises(InvalidKnnParams, match=r"`knn\.k` must be at most 8192 .* together, got 8200"):
        Retrieval((replace(source, k=1025),) * 8).check()
    with pytest.raises(InvalidKnnParams, match=r"`knn\.lambda` must be in 0 … 1, got nan"):
        Retrieval((source, replace(source, lmbda=math.nan))).check()


def test_weights_are_normalised() -> None:
    retrieval = two().with_weights([3, 1])
    assert [source.weight for source in retrieval.sources] == [0.75, 0.25]
    assert retrieval.k == 8
