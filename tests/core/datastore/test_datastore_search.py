"""Search: one shard or many, with or without lists, always the same neighbours as a float64 scan."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import Plan, draw_grid_case, open_new, random_keys, reference

from knnlm_core.datastore.exclusion import allowed_bitmap, allowed_mask, merge_ranges
from knnlm_core.datastore.index import choose_index, ivf_spec, train_index
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import BuildError, InvalidKnnParams, InvalidParameter
from knnlm_core.types import EntryRange, Neighbors

IVF = ivf_spec(4, nprobe=4, train_vectors=160)


def queries_near(keys: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    near = keys[rng.integers(0, len(keys), count)].astype(np.float32)
    near[1::2] += rng.standard_normal((len(near[1::2]), keys.shape[1])).astype(np.float32)
    return near


def assert_is_reference(found: Neighbors, keys: np.ndarray, queries: np.ndarray, excluded: set[int]) -> None:
    k = found.entry_ids.shape[1]
    _, distances = reference(keys, queries, k, excluded)
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-4, atol=1e-5)
    for row, query in enumerate(queries):
        ids = found.entry_ids[row].numpy()
        present = ids[ids >= 0]
        assert len(set(present)) == len(present)
        assert not set(present.tolist()) & excluded
        own = ((keys[present].astype(np.float64) - query) ** 2).sum(axis=1)
        np.testing.assert_allclose(found.distances[row, : len(present)].numpy(), own, rtol=1e-4, atol=1e-5)
        assert (ids[len(present) :] == -1).all()
        pairs = list(zip(found.distances[row].tolist(), ids.tolist(), strict=True))[: len(present)]
        assert pairs == sorted(pairs)


@pytest.mark.parametrize("spec", [None, IVF], ids=["SQfp16", "IVF_SQfp16"])
@pytest.mark.parametrize("method", ["search", "search_exact"])
def test_search_finds_what_a_float64_scan_finds(tmp_path: Path, spec: object, method: str) -> None:
    keys = random_keys(700, 48, duplicates=60)
    queries = queries_near(keys, 20)
    with open_new(tmp_path, Plan(keys, cuts=(100, 450), spec=spec)) as store:
        for exclude in ((), (EntryRange(0, 130), EntryRange(440, 600))):
            excluded = {i for r in exclude for i in range(r.first, r.stop)}
            for k in (1, 7, 64):
                found = getattr(store, method)(torch.from_numpy(queries), k, exclude=exclude)
                assert_is_reference(found, keys, queries, excluded)
                expected = np.where(found.entry_ids >= 0, found.entry_ids % 500, -1)
                np.testing.assert_array_equal(found.values.numpy(), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_number_of_shards_is_one_index(data: st.DataObject) -> None:
    case = draw_grid_case(data)
    keys, cuts, k, exclude = case.keys, case.cuts, case.k, case.exclude
    queries = keys[:5].astype(np.float32)
    spec = IVF if case.trained else None
    ids, distances = reference(keys, queries, k, case.excluded)
    with tempfile.TemporaryDirectory() as folder, open_new(Path(folder), Plan(keys, cuts=cuts, spec=spec)) as store:
        for method in (store.search, store.search_exact):
            found = method(torch.from_numpy(queries), k, exclude=exclude)
            np.testing.assert_array_equal(found.entry_ids.numpy(), ids)
            np.testing.assert_array_equal(found.distances.numpy(), distances.astype(np.float32))


def test_exact_search_is_exact_where_the_matrix_product_is_not(tmp_path: Path) -> None:
    # ‖x‖² is near 7·10⁷, where float32 counts in steps of 8, and the nearest distances are whole numbers below 100.
    rng = np.random.default_rng(3)
    keys = (1024 + rng.integers(0, 3, (2000, 64))).astype(np.float16)
    queries = (1024 + rng.integers(0, 3, (6, 64))).astype(np.float32)
    wide = keys.astype(np.float32)
    product = (queries**2).sum(1)[:, None] - 2 * queries @ wide.T + (wide**2).sum(1)
    ids, distances = reference(keys, queries, 10, set())
    nominated = np.argsort(product, axis=1)[:, : 10 + 32]
    assert any(set(ids[row]) - set(nominated[row]) for row in range(6))  # else this test shows nothing
    with open_new(tmp_path, Plan(keys)) as store:
        for method in (store.search_exact, store.search):
            found = method(torch.from_numpy(queries), 10)
            np.testing.assert_array_equal(found.entry_ids.numpy(), ids)
            np.testing.assert_array_equal(found.distances.numpy(), distances)


@pytest.mark.parametrize("spec", [None, IVF], ids=["SQfp16", "IVF_SQfp16"])
def test_index_distances_are_those_of_the_stored_fp16_keys(tmp_path: Path, spec: object) -> None:
    keys = random_keys(300, 96)
    queries = queries_near(keys, 40)
    with open_new(tmp_path, Plan(keys, spec=spec)) as store:
        found = store.search(torch.from_numpy(queries), 16)
        stored = store.keys(found.entry_ids).double()
        direct = (stored - torch.from_numpy(queries).double()[:, None]).square().sum(-1)
        torch.testing.assert_close(found.distances.double(), direct, rtol=1e-5, atol=1e-6)
        assert (found.distances[::2, 0] == 0).all()  # a stored key finds itself at no distance at all


def test_fewer_lists_visited_find_a_subset_with_the_same_distances(tmp_path: Path) -> None:
    keys = random_keys(600, 16)
    queries = torch.from_numpy(queries_near(keys, 30))
    with open_new(tmp_path, Plan(keys, spec=IVF)) as store:
        everything = store.search_exact(queries, 600)
        some = store.search(queries, 600, nprobe=1)
        assert (some.entry_ids == -1).any()
        for row in range(30):
            exact = dict(zip(everything.entry_ids[row].tolist(), everything.distances[row].tolist(), strict=True))
            for entry, distance in zip(some.entry_ids[row].tolist(), some.distances[row].tolist(), strict=True):
                assert entry == -1 or distance == pytest.approx(exact[entry], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.T.contiguous().T,
        lambda q: torch.cat([q, q], dim=1)[:, : q.shape[1]],
        lambda q: q.double(),
        lambda q: q.half(),
        lambda q: q.clone().requires_grad_(),
    ],
    ids=["transposed", "strided", "float64", "float16", "with gradient"],
)
def test_queries_may_be_of_any_layout_and_float_dtype(tmp_path: Path, change: object) -> None:
    keys = random_keys(200, 8)
    queries = torch.from_numpy(keys[:6].astype(np.float32))
    with open_new(tmp_path, Plan(keys)) as store:
        for method in (store.search, store.search_exact):
            assert torch.equal(method(change(queries), 5).entry_ids, method(queries, 5).entry_ids)  # type: ignore[operator]


def test_no_queries_find_nothing(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(20, 4), cuts=(7,))) as store:
        for method in (store.search, store.search_exact):
            assert [tuple(part.shape) for part in method(torch.empty(0, 4), 3)] == [(0, 3)] * 3


def test_everything_excluded_leaves_only_missing_neighbours(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(200, 4), cuts=(70,), spec=IVF)) as store:
        for method in (store.search, store.search_exact):
            found = method(torch.zeros(2, 4), 3, exclude=[EntryRange(0, 200)])
            assert (found.entry_ids == -1).all()
            assert (found.values == -1).all()
            assert torch.isinf(found.distances).all()


def test_impossible_searches_are_refused_naming_field_and_value(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(200, 4), spec=IVF)) as store:
        query = torch.zeros(1, 4)
        for method in (store.search, store.search_exact):
            with pytest.raises(InvalidKnnParams, match=r"`knn\.k` must be at least 1, got 0"):
                method(query, 0)
            with pytest.raises(InvalidParameter, match=r"\(B, 4\), got \(1, 5\)"):
                method(torch.zeros(1, 5), 1)
            with pytest.raises(InvalidParameter, match="must be finite"):
                method(torch.full((1, 4), torch.nan), 1)
            with pytest.raises(InvalidParameter, match=r"within 0 … 200, got \[100, 201\)"):
                method(query, 1, exclude=[EntryRange(100, 201)])
        for nprobe in (0, 5):
            with pytest.raises(InvalidKnnParams, match=rf"1 … 4, got {nprobe}"):
                store.search(query, 1, nprobe=nprobe)
        for wrong in (-1, 200):
            with pytest.raises(InvalidParameter, match=r"0 … 199"):
                store.keys(torch.tensor([wrong]))


def test_four_threads_find_what_one_finds(tmp_path: Path) -> None:
    keys = random_keys(3000, 32, duplicates=300)
    batches = [torch.from_numpy(queries_near(keys, 8, seed)) for seed in range(24)]
    with open_new(tmp_path, Plan(keys, cuts=(1000, 2000), spec=ivf_spec(8, nprobe=3, train_vectors=400))) as store:

        def search(number: int) -> Neighbors:
            exclude = [EntryRange(number * 10, number * 100)] if number % 2 else []
            return store.search(batches[number], 20, exclude=exclude)

        serial = [search(number) for number in range(24)]
        with ThreadPoolExecutor(4) as pool:
            for alone, together in zip(serial, pool.map(search, range(24)), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_two_opens_share_no_state(tmp_path: Path) -> None:
    first = open_new(tmp_path, Plan(random_keys(50, 4)))
    second = Datastore.open(tmp_path, "law")
    expected = second.search(torch.zeros(1, 4), 3)
    first.close()
    assert torch.equal(second.search(torch.zeros(1, 4), 3).entry_ids, expected.entry_ids)
    assert second.document("doc/0").text
    second.close()
    second.close()
    with pytest.raises(AssertionError, match="used after close"):
        second.search(torch.zeros(1, 4), 3)


@settings(max_examples=100, deadline=None)
@given(
    entries=st.integers(1, 70),
    shard_first=st.integers(0, 30),
    pairs=st.lists(st.tuples(st.integers(0, 110), st.integers(0, 110)), max_size=4),
)
def test_the_bitmap_has_exactly_the_bits_that_are_not_excluded(
    entries: int, shard_first: int, pairs: list[tuple[int, int]]
) -> None:
    exclude = [EntryRange(min(p), max(p)) for p in pairs]
    allowed = [not any(r.first <= i + shard_first < r.stop for r in exclude) for i in range(entries)]
    bitmap = allowed_bitmap(exclude, shard_first, entries)
    assert (bitmap is None) == all(allowed)
    if bitmap is not None:
        assert allowed_mask(bitmap, 0, entries).tolist() == allowed
        assert allowed_mask(bitmap, entries // 3, entries).tolist() == allowed[entries // 3 :]


@pytest.mark.parametrize("entries", [1, 50_000, 50_001, 10**6, 10**8])
def test_the_index_is_chosen_by_size_with_enough_to_train_on(entries: int) -> None:
    spec = choose_index(entries, 576, 32)
    if entries <= 50_000:
        assert (spec.family, spec.nlist) == ("SQfp16", 0)
    else:
        assert spec.family == "IVF_SQfp16"
        assert 2 * entries**0.5 < spec.nlist < 8 * entries**0.5
        assert 39 * spec.nlist <= spec.train_vectors <= min(entries, 64 * spec.nlist)
        assert spec.nprobe < choose_index(entries, 576, 1024).nprobe


def test_training_depends_on_the_seed_alone(tmp_path: Path) -> None:
    sample = random_keys(400, 8)
    for file, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_index(ivf_spec(8, nprobe=1, train_vectors=400, seed=seed), sample, tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_too_small_a_training_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"at least 39 for each of 8 lists \(312\); its shape is \(300, 8\)"):
        train_index(ivf_spec(8, nprobe=1, train_vectors=300), random_keys(300, 8), tmp_path / "trained.faiss")
    assert not list(tmp_path.iterdir())


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: EntryRange(min(p), max(p)))))
def test_merged_ranges_hold_the_same_entries_and_never_touch(ranges: list[EntryRange]) -> None:
    merged = merge_ranges(ranges)
    assert {i for r in merged for i in range(*r)} == {i for r in ranges for i in range(*r)}
    assert all(one.first < one.stop < other.first for one, other in pairwise([*merged, EntryRange(99, 100)]))
