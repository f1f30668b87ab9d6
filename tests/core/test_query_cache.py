"""A cache of queries answers as the datastore would, whatever was deleted, learned or closed meanwhile."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "datastore"))

from small_store import WORD, Plan, open_new, random_keys

from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.index import ivf_spec
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import NewDocument
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreCorrupt, InvalidKnnParams, InvalidParameter
from knnlm_core.query_cache import MAX_ROWS, TOLERANCE, Cached, QueryCache
from knnlm_core.types import EntryRange, Neighbors

DIM, SIZES = 16, (40, 25, 60)
MIB = 1 << 20
STEPS = int(os.environ.get("KNNLM_TEST_STEPS", "150"))


class Watched:
    """A snapshot that notes how many rows each search had."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.searches: list[int] = []
        self.afterwards: Callable[[], object] = lambda: None  # before the search returns

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        self.searches.append(len(queries))
        found = self.snapshot.search(queries, k, exclude=exclude)
        self.afterwards()
        return found

    def lookup(self, queries: Tensor, entry_ids: Tensor, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        return self.snapshot.lookup(queries, entry_ids, exclude=exclude)

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        return self.snapshot.next_entry(entry_ids)


class Bench:
    """A living store of three documents, its snapshot, and a cache before it."""

    def __init__(self, root: Path, *, max_bytes: int = MIB, trained: bool = False) -> None:
        self.root = root
        keys = random_keys(sum(SIZES), DIM)
        spec = ivf_spec(3, nprobe=2, train_vectors=125) if trained else None
        self.store = open_new(root, Plan(keys, cuts=(50,), document_sizes=SIZES, spec=spec))
        self.living = LivingName(root, "law")
        self.snapshot = self.living.snapshot(self.store)
        self.cache = QueryCache(max_bytes)
        self.watched = Watched(self.snapshot)
        self.cached = Cached(self.watched, self.snapshot, self.cache)

    def queries(self, count: int, seed: int = 7) -> Tensor:
        """Near the keys, no two alike."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randperm(self.store.entries, generator=draw)[:count]
        return self.snapshot.keys(ids) + 0.3 * torch.randn(count, DIM, generator=draw)

    @property
    def counted(self) -> tuple[int, int]:
        """Hits and misses."""
        return self.cache.use[:2]


@pytest.fixture(params=[False, True], ids=["whole", "lists"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, trained=request.param)
    yield bench
    bench.store.close()


def same(have: Neighbors, need: Neighbors) -> bool:
    """Entry by entry; distances are as close as the ways of searching, which depend on the size of a batch."""
    close = torch.allclose(have.distances, need.distances, rtol=1e-5, atol=1e-5)
    return close and torch.equal(have.entry_ids, need.entry_ids) and torch.equal(have.values, need.values)


def test_a_context_that_comes_again_is_not_searched_again(bench: Bench) -> None:
    queries = bench.queries(9)
    need = bench.snapshot.search(queries, 5)
    for rows in (list(range(9)), list(range(9)), [4, 1]):
        for have, column in zip(bench.cached.search(queries[rows].double(), 5), need, strict=True):
            assert torch.equal(have, column[rows])
    assert bench.watched.searches == [9]
    assert bench.counted == (11, 9)


def test_known_and_new_contexts_are_put_together_in_order(bench: Bench) -> None:
    queries = bench.queries(12)
    need = bench.snapshot.search(queries, 5)
    bench.cached.search(queries[[1, 4, 5, 9]], 5)
    assert same(bench.cached.search(queries, 5), need)
    assert bench.watched.searches == [4, 8]
    assert bench.counted == (4, 12)


def test_contexts_computed_in_batches_of_other_sizes_are_the_same(bench: Bench) -> None:
    """Matrix products of other shapes round differently, as those of a language model do."""
    draw = torch.Generator().manual_seed(1)
    hidden, weights = torch.randn(60, 512, generator=draw), torch.randn(512, DIM, generator=draw) / 512**0.5
    together = hidden @ weights
    alone = torch.cat([row[None] @ weights for row in hidden])
    noise = ((alone - together).abs().amax(dim=1) / together.abs().amax(dim=1)).max().item()
    assert 0 < noise < TOLERANCE / 10
    bench.cached.search(together, 5)
    have, need = bench.cached.search(alone, 5), bench.snapshot.search(alone, 5)
    assert bench.watched.searches == [60]
    assert bench.counted == (60, 60)
    assert same(have, need)


@pytest.mark.parametrize("farther", [1.001, 0.5, 2.0])
def test_a_query_of_the_same_signs_that_differs_by_more_than_noise_is_another_context(
    bench: Bench, farther: float
) -> None:
    queries = bench.queries(6)
    bench.cached.search(queries, 5)
    assert same(bench.cached.search(farther * queries, 5), bench.snapshot.search(farther * queries, 5))
    assert bench.counted == (0, 12)
    assert same(bench.cached.search(queries, 5), bench.snapshot.search(queries, 5))


def test_one_context_several_times_in_a_batch_is_searched_once(bench: Bench) -> None:
    queries = bench.queries(3)
    # The last one has the signs of the first, but is another context.
    rows = torch.cat([queries[[0, 1, 0, 2, 1, 0]] * (1 + 1e-7), queries[:1] * 1.01])
    have, need = bench.cached.search(rows, 5), bench.snapshot.search(rows, 5)
    assert same(have, need)
    assert bench.watched.searches == [4]
    assert bench.counted == (3, 4)


def test_the_nearest_of_many_serve_whoever_asks_for_fewer(bench: Bench) -> None:
    queries = bench.queries(4)
    every = sum(SIZES) + 3  # more than there are: the last ones are missing
    for k, searches in ((3, 1), (7, 2), (7, 2), (1, 2), (every, 3), (2, 3), (every, 3)):
        assert same(bench.cached.search(queries, k), bench.snapshot.search(queries, k))
        assert len(bench.watched.searches) == searches, k


def test_what_is_excluded_for_one_is_found_for_another(bench: Bench) -> None:
    queries, first, second = bench.queries(4), EntryRange(0, 40), EntryRange(40, 65)
    for exclude in ((), (first,), (second,), (first, second), ()):
        for given in (exclude, list(exclude)):
            found = bench.cached.search(queries, 5, exclude=given)
            assert same(found, bench.snapshot.search(queries, 5, exclude=exclude))
    assert bench.counted == (24, 16)


def test_nobody_who_changes_an_answer_changes_the_next(bench: Bench) -> None:
    queries = bench.queries(2)
    need = bench.snapshot.search(queries, 5)
    asked = queries.clone()
    for _ in range(3):
        for column in bench.cached.search(asked, 5):
            column.zero_()
    asked.zero_()
    assert same(bench.cached.search(queries, 5), need)
    assert bench.counted == (6, 2)


def test_many_rows_are_searched_and_not_kept(bench: Bench) -> None:
    queries = bench.queries(MAX_ROWS + 1)
    for _ in range(2):
        assert same(bench.cached.search(queries, 5), bench.snapshot.search(queries, 5))
    assert bench.watched.searches == [MAX_ROWS + 1] * 2
    assert bench.cache.use == (0, 0, 0, MIB)


def test_what_a_search_refuses_is_refused_of_known_contexts_too(bench: Bench) -> None:
    queries = bench.queries(2)
    bench.cached.search(queries, 5)
    with pytest.raises(InvalidKnnParams, match=r"`knn\.k` must be at least 1, got 0"):
        bench.cached.search(queries, 0)
    for bad in (queries[:, 1:], queries[0]):
        with pytest.raises(InvalidParameter, match="`queries` must have the shape"):
            bench.cached.search(bad, 5)
    axis = torch.zeros(1, DIM)
    axis[0, 3] = 5.0
    bench.cached.search(axis, 5)
    for number in (float("nan"), float("inf")):  # the latter has the signs of the one before
        bad = torch.where(axis > 0, number, axis)
        for rows in (bad, torch.cat([queries, bad])):
            with pytest.raises(InvalidParameter, match="`queries` must be finite"):
                bench.cached.search(rows, 5)
    with pytest.raises(InvalidParameter, match="exclude"):
        bench.cached.search(queries, 5, exclude=[EntryRange(0, 10_000)])
    assert bench.cached.search(queries[:0], 5).entry_ids.shape == (0, 5)
    assert bench.counted == (0, 3)


def test_a_search_that_fails_keeps_and_counts_nothing(bench: Bench) -> None:
    def fail() -> None:
        raise DatastoreCorrupt("broken")

    queries = bench.queries(3)
    bench.cached.search(queries[:1], 5)
    bench.watched.afterwards = fail
    with pytest.raises(DatastoreCorrupt, match="broken"):
        bench.cached.search(queries, 5)
    assert bench.counted == (0, 1)
    bench.watched.afterwards = lambda: None
    assert same(bench.cached.search(queries, 5), bench.snapshot.search(queries, 5))
    assert bench.counted == (1, 3)


def test_wrappers_of_one_snapshot_are_equal_and_read_it(bench: Bench) -> None:
    other = Cached(bench.snapshot, bench.snapshot, bench.cache)
    assert other == bench.cached
    assert len({other, bench.cached}) == 1
    bench.living.delete(["doc/0"])
    now = bench.living.snapshot(bench.store)
    assert Cached(now, now, bench.cache) != bench.cached
    assert bench.cached != bench.snapshot
    queries, ids = bench.queries(2), torch.tensor([[50, 3], [-1, 64]])
    assert same(bench.cached.lookup(queries, ids), bench.snapshot.lookup(queries, ids))
    assert torch.equal(bench.cached.next_entry(ids), bench.snapshot.next_entry(ids))


# -- the bound ---------------------------------------------------------------------------------------------------------


def bytes_of_one(k: int) -> int:
    """What one result of k neighbours takes."""
    cache = QueryCache(MIB)
    cache.keep(
        (0, (), b""),
        torch.zeros(DIM),
        Neighbors(*(torch.zeros(k, dtype=d) for d in (torch.int64, torch.float32, torch.int64))),
    )
    return cache.use.used_bytes


def test_a_result_is_counted_with_all_its_numbers() -> None:
    assert bytes_of_one(1000) - bytes_of_one(0) == 1000 * (8 + 4 + 8)
    assert bytes_of_one(0) >= 4 * DIM


def test_the_bound_holds_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=4 * bytes_of_one(5) + 50)
    queries = bench.queries(5)
    for row in range(4):
        bench.cached.search(queries[row : row + 1], 5)
    bench.cached.search(queries[:1], 3)  # used again
    bench.cached.search(queries[4:], 5)  # pushes out the second
    assert bench.cache.use.used_bytes == 4 * bytes_of_one(5)
    bench.watched.searches.clear()
    for row in (0, 2, 3, 4):
        bench.cached.search(queries[row : row + 1], 5)
    assert bench.watched.searches == []
    bench.cached.search(queries[1:2], 5)
    assert bench.watched.searches == [1]
    bench.store.close()


def test_a_result_beyond_the_bound_pushes_nothing_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=bytes_of_one(20))
    queries = bench.queries(2)
    bench.cached.search(queries[:1], 20)
    used = bench.cache.use.used_bytes
    assert same(bench.cached.search(queries[1:], 21), bench.snapshot.search(queries[1:], 21))
    assert bench.cache.use.used_bytes == used
    bench.cached.search(queries[:1], 20)
    assert bench.counted == (1, 2)
    bench.store.close()


def test_a_bound_below_zero_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="`query_cache_bytes` must be at least 0, got -1"):
        QueryCache(-1)


# -- what changes meanwhile --------------------------------------------------------------------------------------------


def new_document(document_id: str, keys: np.ndarray) -> NewDocument:
    """Its text is one word per token, the first of which makes no entry."""
    starts = (np.arange(len(keys)) + 1) * len(WORD)
    spans = np.stack([starts, starts + len(WORD)], axis=1)
    return NewDocument(Document(document_id, WORD * (len(keys) + 1)), keys, 7 + np.arange(len(keys)), spans)


def test_deleted_documents_never_come_back_not_even_to_older_snapshots(bench: Bench) -> None:
    queries = bench.snapshot.keys(torch.arange(40, 60))  # of doc/1
    before = bench.cached.search(queries, 5)
    assert before.entry_ids[:, 0].tolist() == list(range(40, 60))
    bench.living.delete(["doc/1"])
    now = bench.living.snapshot(bench.store)
    for view in (bench.cached, Cached(now, now, bench.cache)):
        for _ in range(2):
            found = view.search(queries, 5)
            assert same(found, now.search(queries, 5))
            assert not ((found.entry_ids >= 40) & (found.entry_ids < 65)).any()


def test_results_without_the_deleted_document_go_on_serving(bench: Bench) -> None:
    queries = bench.queries(30)
    found = bench.cached.search(queries, 2).entry_ids
    touched = int((found < 40).any(dim=1).sum())
    assert 0 < touched < 30
    bench.living.delete(["doc/0"])
    assert same(bench.cached.search(queries, 2), bench.snapshot.search(queries, 2))
    assert bench.watched.searches == [30, touched]


def test_a_deletion_during_a_search_reaches_what_is_kept_of_it(bench: Bench) -> None:
    queries = bench.snapshot.keys(torch.arange(40, 50))
    bench.watched.afterwards = lambda: bench.living.delete(["doc/1"])
    assert bench.cached.search(queries, 5).entry_ids[0, 0] == 40, "found before it was deleted"
    bench.watched.afterwards = lambda: None
    found = bench.cached.search(queries, 5)
    assert same(found, bench.snapshot.search(queries, 5))
    assert not ((found.entry_ids >= 40) & (found.entry_ids < 65)).any()


def test_a_search_between_ledger_and_bitmaps_leaves_nothing_of_a_deleted_document(bench: Bench) -> None:
    """A deletion is in the ledger first, and hidden a moment later: the revision alone does not tell."""
    queries, hide = bench.snapshot.keys(torch.arange(40, 50)), bench.living._hide
    between: list[int] = []

    def search_and_hide(*given: Any) -> None:
        if bench.living.state.is_deleted("doc/1"):
            between.append(int(bench.cached.search(queries, 5).entry_ids[0, 0]))
        hide(*given)

    bench.living._hide = search_and_hide  # type: ignore[method-assign]
    bench.living.delete(["doc/1"])
    assert between == [40]
    assert same(bench.cached.search(queries, 5), bench.snapshot.search(queries, 5))


def test_what_is_learned_is_found_at_once(bench: Bench) -> None:
    queries = bench.queries(3)
    bench.cached.search(queries, 5)
    bench.living.add([new_document("new", queries.numpy().astype(np.float16))], bench.snapshot)
    now = bench.living.snapshot(bench.store)
    found = Cached(now, now, bench.cache).search(queries, 5)
    assert same(found, now.search(queries, 5))
    assert found.entry_ids[:, 0].tolist() == [sum(SIZES) + i for i in range(3)]


def test_a_cache_keeps_no_snapshot_alive_and_drops_its_results(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    queries = bench.queries(3)
    bench.cached.search(queries, 5)
    used = bench.cache.use.used_bytes
    gone = weakref.ref(bench.snapshot)
    bench.living.add([new_document("new", random_keys(4, DIM, seed=5))], bench.snapshot)
    now = bench.living.snapshot(bench.store)
    view = Cached(now, now, bench.cache)
    view.search(queries[:1], 5)
    assert bench.cache.use.used_bytes == used + used // 3, "a request may still hold the older one"
    del bench.snapshot, bench.watched, bench.cached
    assert gone() is None
    view.search(queries[:1], 5)
    assert bench.cache.use == (1, 4, used // 3, MIB)
    bench.store.close()


def test_another_version_is_another_datastore(tmp_path: Path) -> None:
    one = Bench(tmp_path)
    queries = one.queries(4)
    one.cached.search(queries, 5)
    with open_new(tmp_path, Plan(random_keys(90, DIM, seed=9), document_sizes=(90,), salt=1)) as store:
        swapped = one.living.snapshot(store)
        found = Cached(swapped, swapped, one.cache).search(queries, 5)
        assert same(found, swapped.search(queries, 5))
    assert one.counted == (0, 8)
    one.store.close()
    with pytest.raises(AssertionError, match="used after close"):  # as a search of it
        one.cached.search(queries, 5)


EXCLUSIONS = ((), (EntryRange(0, 20),), (EntryRange(10, 30), EntryRange(40, 41)))


class Machine(RuleBasedStateMachine):
    """One cache before all snapshots of a living name; after each search a plain one of the same snapshot."""

    hits = misses = 0  # of all examples

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.store: Datastore = open_new(root, Plan(random_keys(60, 4), cuts=(25,), document_sizes=(20, 0, 30, 10)))
        self.living = LivingName(root, "law")
        self.cache = QueryCache(
            12 * 2500
        )  # some twelve results; those of three snapshots and of three exclusions compete
        self.contexts = torch.from_numpy(random_keys(9, 4, seed=3).astype(np.float32))
        self.pinned: list[Snapshot] = []
        self.draw = np.random.default_rng(0)

    def teardown(self) -> None:
        Machine.hits += self.cache.use.hits
        Machine.misses += self.cache.use.misses
        self.living.close()
        self.store.close()
        self.folder.cleanup()

    @invariant()
    def searches_are_those_of_the_snapshot(self) -> None:
        for snapshot in (self.living.snapshot(self.store), *self.pinned):
            rows = self.draw.integers(0, len(self.contexts), self.draw.integers(1, 7))
            k = int(self.draw.choice([1, 3, 8, 80]))
            excluded = EXCLUSIONS[self.draw.integers(0, len(EXCLUSIONS))]
            noise = torch.from_numpy(1e-6 * self.draw.standard_normal((len(rows), 4)).astype(np.float32))
            self.check(snapshot, self.contexts[rows] * (1 + noise), k, excluded)

    def check(self, snapshot: Snapshot, queries: Tensor, k: int, excluded: tuple[EntryRange, ...]) -> None:
        have = Cached(snapshot, snapshot, self.cache).search(queries, k, exclude=excluded)
        need = snapshot.search(queries, k, exclude=excluded)
        # Noise may settle a near-tie either way: the entries found are as near as those of the plain search, and
        # every one of them may be found.
        looked_up = snapshot.lookup(queries, have.entry_ids, exclude=excluded)
        for distances in (have.distances, looked_up.distances):
            torch.testing.assert_close(distances, need.distances, rtol=1e-4, atol=1e-4)
        assert torch.equal(have.values, snapshot.values(have.entry_ids))

    @rule(number=st.integers(0, 6))
    def delete(self, number: int) -> None:
        if self.living.snapshot(self.store).has_document(f"doc/{number}"):
            self.living.delete([f"doc/{number}"])

    @rule(number=st.integers(0, 6), size=st.integers(1, 8), seed=st.integers(0, 99))
    def learn(self, number: int, size: int, seed: int) -> None:
        into = self.living.snapshot(self.store)
        self.living.add([new_document(f"doc/{number}", random_keys(size, 4, seed))], into, replace=True)

    @precondition(lambda self: len(self.pinned) < 3)
    @rule()
    def pin(self) -> None:
        self.pinned.append(self.living.snapshot(self.store))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.pinned.pop(0)

    @invariant()
    def the_bound_holds(self) -> None:
        assert 0 <= self.cache.use.used_bytes <= self.cache.use.max_bytes


def test_a_cached_datastore_answers_as_a_plain_one_through_any_sequence_of_changes() -> None:
    """KNNLM_TEST_STEPS=10000 for a long run."""
    per_example = 50
    profile = settings(
        max_examples=max(2, STEPS // per_example), stateful_step_count=per_example, deadline=None, derandomize=True
    )
    run_state_machine_as_test(Machine, settings=profile)
    assert min(Machine.hits, Machine.misses) > 100
