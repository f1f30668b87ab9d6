"""Shadow-exact measures what an index misses, never holds up the engine, and never holds on to a datastore."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from live_server import wait_until
from small_stores import Published

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreCorrupt, InvalidParameter
from knnlm_core.types import EntryRange, Neighbors
from knnlm_server.engine.shadow import MAX_WAITING, ROWS_AT_ONCE, ShadowSearch
from knnlm_server.telemetry.metrics import EngineMetrics

K = 8


class Leases:
    """Pins one datastore, as a registry would: none is given out once it is retired."""

    def __init__(self, datastore: Datastore) -> None:
        self._datastore = weakref.ref(datastore)
        self.held = self.given = 0
        self.retired = False
        self.gate = threading.Event()  # searches begin when it is set
        self.gate.set()

    def pin(self, datastore: object) -> Leases | None:
        assert datastore is self._datastore()
        if self.retired:
            return None
        self.held += 1
        self.given += 1
        self.gate.wait()
        return self

    def release(self) -> None:
        self.held -= 1


class Watched:
    """A shadow over a store, and what it has counted."""

    def __init__(self, store: Datastore, fraction: float = 1.0, seed: int = 0) -> None:
        self.metrics = EngineMetrics()
        self.leases = Leases(store)
        self.shadow = ShadowSearch(fraction, self.leases.pin, self.metrics, seed=seed)
        self.shadow.start()

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def observed(self) -> tuple[int, float]:
        """Rows and the sum of their recalls."""
        return int(self.sample("knnlm_shadow_recall_count")), self.sample("knnlm_shadow_recall_sum")

    def dropped(self, reason: str) -> int:
        return int(self.sample("knnlm_shadow_dropped_total", reason=reason))

    @property
    def done(self) -> int:
        return self.observed[0] + sum(self.dropped(r) for r in ("queue_full", "superseded", "failed", "stopped"))


@pytest.fixture
def store(published: Published) -> Iterator[Datastore]:
    with Datastore.open(published.root, "law") as store:
        yield store


@pytest.fixture
def watched(store: Datastore) -> Iterator[Watched]:
    watched = Watched(store)
    yield watched
    watched.leases.gate.set()
    watched.shadow.stop()
    assert watched.leases.held == 0


def queries(store: Datastore, count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(store.entries, (count,), generator=draw)
    return store.keys(ids) + torch.randn(count, store.dim, generator=draw)


def test_the_recall_of_each_row_is_observed(store: Datastore, watched: Watched) -> None:
    rows = queries(store, 70)
    # An index that does not see half of the store.
    found = store.search(rows, K, exclude=[EntryRange(0, store.entries // 2)])
    nearest = store.search_exact(rows, K)
    with torch.inference_mode():  # as the engine's steps are
        watched.shadow.offer(store, rows + 0, Neighbors(*(column + 0 for column in found)))
    wait_until(lambda: watched.done == 70)
    need = [
        len(set(have.tolist()) & set(exact.tolist())) / K
        for have, exact in zip(found.entry_ids, nearest.entry_ids, strict=True)
    ]
    assert 0 < sum(need) < 70
    assert watched.observed == (70, pytest.approx(sum(need)))
    assert watched.leases.given == 3  # 32 rows at a time
    at_most = {0.5: sum(share <= 0.5 for share in need), 1.0: 70}
    for bound, count in at_most.items():
        assert watched.sample("knnlm_shadow_recall_bucket", le=f"{bound}") == count


def test_an_index_that_finds_everything_has_recall_one_whatever_is_excluded(store: Datastore, watched: Watched) -> None:
    rows, exclude = queries(store, 20), (EntryRange(5, 90), EntryRange(100, 101))
    watched.shadow.offer(store, rows, store.search(rows, K, exclude=exclude), exclude)
    wait_until(lambda: watched.done == 20)
    assert watched.observed == (20, 20.0)


def test_rows_that_may_find_nothing_say_nothing(store: Datastore, watched: Watched) -> None:
    rows, exclude = queries(store, 3), (EntryRange(0, store.entries),)
    watched.shadow.offer(store, rows, store.search(rows, K, exclude=exclude), exclude)
    watched.shadow.offer(store, rows, store.search(rows, K))
    wait_until(lambda: watched.done == 3)
    assert watched.observed == (3, 3.0)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_share_is_drawn_row_by_row_and_the_same_for_a_seed(store: Datastore, fraction: float) -> None:
    rows = queries(store, 40)
    found = store.search(rows, K)
    counts = []
    for seed in (1, 1, 2):
        watched = Watched(store, fraction, seed)
        for _ in range(10):
            watched.shadow.offer(store, rows, found)
        watched.shadow.stop()
        counts.append(watched.done)
    assert counts[0] == counts[1]
    assert abs(counts[0] - 400 * fraction) <= 40
    if fraction in (0, 1):
        assert counts == [int(400 * fraction)] * 3


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(store: Datastore, fraction: float) -> None:
    with pytest.raises(InvalidParameter, match="`shadow_exact` must be in 0 … 1, got"):
        ShadowSearch(fraction, Leases(store).pin, EngineMetrics())


def test_what_the_engine_does_with_its_tensors_afterwards_does_not_matter(store: Datastore, watched: Watched) -> None:
    rows = queries(store, 10)
    found = store.search(rows, K)
    watched.leases.gate.clear()
    watched.shadow.offer(store, rows, found)
    rows.zero_()
    found.distances.fill_(1e9)
    watched.leases.gate.set()
    wait_until(lambda: watched.done == 10)
    assert watched.observed == (10, 10.0)


def test_a_full_queue_drops_and_counts_and_never_waits(store: Datastore, watched: Watched) -> None:
    rows = queries(store, ROWS_AT_ONCE)
    found = store.search(rows, 1)
    watched.leases.gate.clear()
    watched.shadow.offer(store, rows, found)
    wait_until(lambda: watched.leases.held == 1)  # taken from the queue, and held up
    for _ in range(MAX_WAITING + 5):
        watched.shadow.offer(store, rows, found)
    assert watched.dropped("queue_full") == 5 * ROWS_AT_ONCE
    watched.leases.gate.set()
    wait_until(lambda: watched.done == (MAX_WAITING + 6) * ROWS_AT_ONCE)
    assert watched.observed[0] == (MAX_WAITING + 1) * ROWS_AT_ONCE


def test_what_waits_holds_neither_a_lease_nor_the_datastore(published: Published) -> None:
    store = Datastore.open(published.root, "law")
    watched = Watched(store)
    rows = queries(store, 4)
    found = store.search(rows, K)
    watched.leases.gate.clear()
    for _ in range(3):
        watched.shadow.offer(store, rows, found)
    wait_until(lambda: watched.leases.held == 1)
    assert watched.leases.given == 1  # of the one that is searched
    watched.leases.retired = True
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is not None  # it is being searched
    watched.leases.gate.set()
    wait_until(lambda: watched.done == 12)
    assert (watched.observed[0], watched.dropped("superseded")) == (4, 8)
    gc.collect()
    assert gone() is None
    watched.shadow.stop()


def test_a_retired_version_is_not_searched_again(store: Datastore, watched: Watched) -> None:
    rows = queries(store, 5)
    watched.leases.retired = True
    watched.shadow.offer(store, rows, store.search(rows, K))
    wait_until(lambda: watched.done == 5)
    assert watched.dropped("superseded") == 5


def test_a_search_that_fails_gives_its_lease_back_and_the_next_one_is_made(
    store: Datastore, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = queries(store, 5)
    found = store.search(rows, K)

    def fails(*_: object, **__: object) -> Any:
        raise DatastoreCorrupt("unreadable")

    with monkeypatch.context() as patch:
        patch.setattr(Datastore, "search_exact", fails)
        watched.shadow.offer(store, rows, found)
        wait_until(lambda: watched.done == 5)
    assert (watched.dropped("failed"), watched.leases.held) == (5, 0)
    watched.shadow.offer(store, rows, found)
    wait_until(lambda: watched.done == 10)
    assert watched.observed == (5, 5.0)


def test_stopping_ends_with_the_search_under_way_and_drops_the_rest(store: Datastore) -> None:
    watched = Watched(store)
    rows = queries(store, 5)
    found = store.search(rows, K)
    watched.leases.gate.clear()
    for _ in range(4):
        watched.shadow.offer(store, rows, found)
    wait_until(lambda: watched.leases.held == 1)
    stopping = threading.Thread(target=watched.shadow.stop)
    stopping.start()
    wait_until(lambda: watched.dropped("stopped") == 15)
    watched.leases.gate.set()
    stopping.join()
    watched.shadow.offer(store, rows, found)
    assert (watched.observed, watched.leases.held, watched.done) == ((5, 5.0), 0, 20)


def test_a_shadow_that_was_never_started_stops(store: Datastore) -> None:
    metrics = EngineMetrics()
    shadow = ShadowSearch(1.0, Leases(store).pin, metrics)
    rows = queries(store, 5)
    shadow.offer(store, rows, store.search(rows, K))
    shadow.stop()
    assert metrics.registry.get_sample_value("knnlm_shadow_dropped_total", {"reason": "stopped"}) == 5
