"""Many queries at once find what each finds alone, and what a float64 scan finds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import Plan, draw_grid_case, open_new, random_keys, reference

from knnlm_core.datastore import batch_search, shard
from knnlm_core.datastore.index import ivf_spec
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreCorrupt
from knnlm_core.types import EntryRange, Neighbors

IVF = ivf_spec(4, nprobe=4, train_vectors=160)
FEW_LISTS = ivf_spec(8, nprobe=3, train_vectors=400)


@pytest.fixture
def always_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "BATCH_FROM", 0)
    monkeypatch.setattr(shard, "BATCH_FROM_WHOLE", 0)


def one_by_one(store: Datastore, queries: np.ndarray, k: int, **options: object) -> Neighbors:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "BATCH_FROM", np.inf)
        patch.setattr(shard, "BATCH_FROM_WHOLE", np.inf)
        rows = [store.search(torch.from_numpy(q[None]), k, **options) for q in queries]  # type: ignore[arg-type]
    return Neighbors(*(torch.cat(column) for column in zip(*rows, strict=True)))


def assert_same(batch: Neighbors, single: Neighbors) -> None:
    """Distances agree to rounding; entries differ only where they are that close to others of the row."""
    np.testing.assert_allclose(batch.distances, single.distances, rtol=1e-6, atol=1e-5)
    missing = batch.entry_ids < 0
    assert torch.equal(missing, single.entry_ids < 0)
    assert torch.equal(missing, torch.isinf(batch.distances))
    for row in range(len(batch.entry_ids)):
        ours, theirs = (
            dict(zip(n.entry_ids[row].tolist(), n.distances[row].tolist(), strict=True)) for n in (batch, single)
        )
        last = batch.distances[row, -1].item()
        for entry in ours.keys() ^ theirs.keys():
            assert {**ours, **theirs}[entry] == pytest.approx(last, rel=1e-6, abs=1e-5)
        for entry in (ours.keys() & theirs.keys()) - {-1}:
            assert ours[entry] == pytest.approx(theirs[entry], rel=1e-6, abs=1e-5)


@pytest.mark.usefixtures("always_batch")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_batch_finds_what_a_float64_scan_finds_ties_included(data: st.DataObject) -> None:
    case = draw_grid_case(data)
    keys, cuts, k, exclude = case.keys, case.cuts, case.k, case.exclude
    queries = keys[: data.draw(st.integers(1, 40), "queries")].astype(np.float32)
    ids, distances = reference(keys, queries, k, case.excluded)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_new(Path(folder), Plan(keys, cuts=cuts, spec=IVF if case.trained else None)) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        # Bounds so small that queries and lists are cut into several blocks.
        patch.setattr(batch_search, "_CANDIDATES", data.draw(st.sampled_from([1, 1_000, 10**7]), "candidates"))
        patch.setattr(batch_search, "_PRODUCTS", data.draw(st.sampled_from([1, 100, 10**6]), "products"))
        patch.setattr(batch_search, "_NUMBERS", data.draw(st.sampled_from([1, 300, 10**6]), "numbers"))
        patch.setattr(batch_search, "_MAX_QUERIES", data.draw(st.sampled_from([1, 7, 4096]), "max queries"))
        found = store.search(torch.from_numpy(queries), k, exclude=exclude)
    np.testing.assert_array_equal(found.entry_ids.numpy(), ids)
    np.testing.assert_array_equal(found.distances.numpy(), distances.astype(np.float32))


@pytest.mark.usefixtures("always_batch")
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_batch_finds_what_its_queries_find_alone(data: st.DataObject) -> None:
    n = 900
    keys = random_keys(n, 24, seed=data.draw(st.integers(0, 9), "seed"), duplicates=90)
    nprobe = data.draw(st.integers(1, 8), "nprobe")
    k = data.draw(st.integers(1, 300), "k")  # often more than the lists visited hold
    bounds = st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: EntryRange(*sorted(p)))
    exclude = tuple(data.draw(st.lists(bounds, max_size=2), "exclude"))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=3), "cuts"))
    rng = np.random.default_rng(5)
    queries = keys[rng.integers(0, n, 30)].astype(np.float32)
    queries[::2] += rng.standard_normal((15, 24)).astype(np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_new(Path(folder), Plan(keys, cuts=cuts, spec=FEW_LISTS)) as store,
    ):
        found = store.search(torch.from_numpy(queries), k, exclude=exclude, nprobe=nprobe)
        assert_same(found, one_by_one(store, queries, k, exclude=exclude, nprobe=nprobe))


@pytest.mark.usefixtures("always_batch")
@pytest.mark.parametrize("spec", [None, IVF], ids=["SQfp16", "IVF_SQfp16"])
def test_distances_are_right_where_float32_products_are_not(tmp_path: Path, spec: object) -> None:
    # ‖x‖² is near 7·10⁷, where float32 counts in steps of 8, and the nearest distances are whole numbers below 100.
    rng = np.random.default_rng(3)
    keys = (1024 + rng.integers(0, 3, (2000, 64))).astype(np.float16)
    queries = (1024 + rng.integers(0, 3, (50, 64))).astype(np.float32)
    queries[0] = keys[0]
    ids, distances = reference(keys, queries, 10, set())
    with open_new(tmp_path, Plan(keys, spec=spec)) as store:  # type: ignore[arg-type]
        found = store.search(torch.from_numpy(queries), 10)
        np.testing.assert_array_equal(found.entry_ids.numpy(), ids)
        np.testing.assert_array_equal(found.distances.numpy(), distances)
    assert found.distances[0, 0] == 0
    assert not torch.signbit(found.distances).any()


@pytest.mark.usefixtures("always_batch")
def test_lists_that_hold_nothing_are_passed_over(tmp_path: Path) -> None:
    # Every shard shares the lists; all the keys of the second one are in one place, so most of its lists are empty.
    keys = random_keys(400, 6)
    keys[390:] = keys[0]
    with open_new(tmp_path, Plan(keys, cuts=(390,), spec=FEW_LISTS)) as store:
        queries = keys[:64].astype(np.float32)
        assert_same(store.search(torch.from_numpy(queries), 30, nprobe=2), one_by_one(store, queries, 30, nprobe=2))


@pytest.mark.parametrize("spec", [None, FEW_LISTS], ids=["SQfp16", "IVF_SQfp16"])
def test_big_batches_are_routed_to_the_products_and_small_ones_to_the_scan(
    tmp_path: Path, spec: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed: list[int] = []

    def spy(lists: object, queries: np.ndarray, *rest: object) -> object:
        routed.append(len(queries))
        return batch_search.search_batch(lists, queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "search_batch", spy)
    keys = random_keys(500, 6)
    with open_new(tmp_path, Plan(keys, spec=spec)) as store:  # type: ignore[arg-type]
        for count in (1, 8, 400):
            store.search(torch.from_numpy(keys[:count].astype(np.float32)), 5)
    assert routed == [400]


@pytest.mark.usefixtures("always_batch")
def test_an_id_beyond_the_entries_is_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random_keys(500, 6)
    with open_new(tmp_path, Plan(keys, spec=FEW_LISTS)) as store:
        wrong = np.full(500, 500)
        monkeypatch.setattr(batch_search.faiss, "rev_swig_ptr", lambda pointer, size: wrong[:size])
        with pytest.raises(DatastoreCorrupt, match=r"index\.faiss holds entry 500 of 500 in list"):
            store.search(torch.from_numpy(keys[:3].astype(np.float32)), 5)
