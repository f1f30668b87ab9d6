"""What a name learns and deletes while it is served: whom it is shown to, and what stays as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from registry_stores import DIM, Open, Stores, held_from, new_document
from small_store import identity

from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreBudget, DatastoreBusy, DatastoreNotFound
from knnlm_server.registry.progress import Stage
from knnlm_server.registry.registry import Registry


def learn(registry: Registry, document_id: str) -> None:
    with registry.change("law") as change:
        change.living.add([new_document(document_id)], change.lease.datastore)


def forget(registry: Registry, document_id: str) -> None:
    with registry.change("law") as change:
        change.living.delete([document_id])


def test_new_leases_see_what_was_learned_and_old_ones_do_not(registry: Registry, stores: Stores) -> None:
    registry.load("law")
    before = registry.lease("law")
    learn(registry, "added")
    after = registry.lease("law")
    assert (before.label, after.label) == (f"law:{stores.law[2]}:1.0", f"law:{stores.law[2]}:1.1")
    assert [lease.datastore.has_document("added") for lease in (before, after)] == [False, True]
    assert after.datastore.entries == before.datastore.entries + 3
    status = registry.status("law")
    assert (status.datastore.counts.learned, status.datastore.counts.deleted, status.leases) == (1, 0, 2)


def test_what_is_deleted_is_gone_for_old_leases_too(registry: Registry) -> None:
    registry.load("law")
    lease = registry.lease("law")
    assert lease.datastore.has_document("doc/1")
    forget(registry, "doc/1")
    assert not lease.datastore.has_document("doc/1")
    assert lease.label.endswith(":1.0")  # as it was admitted
    status = registry.status("law")
    assert (status.datastore.revision, *status.datastore.counts[1:]) == (1, 0, 1)


def test_swaps_and_rollbacks_keep_what_was_learned_and_bring_nothing_back(registry: Registry, stores: Stores) -> None:
    registry.load("law", stores.law[1])
    learn(registry, "added")
    forget(registry, "doc/1")
    for load in (registry.load, registry.roll_back, registry.load):
        datastore = load("law").status.datastore
        assert (datastore.has_document("added"), datastore.has_document("doc/1")) == (True, False)
        assert datastore.revision == 2


def test_what_is_learned_while_a_version_loads_is_in_it(registry: Registry) -> None:
    registry.load("law")

    def learn_meanwhile(stage: Stage, done: int, total: int) -> None:
        if stage in (Stage.TEST, Stage.SWAP) and not done:
            learn(registry, f"during {stage}")
            forget(registry, {Stage.TEST: "doc/1", Stage.SWAP: "doc/2"}[stage])

    datastore = registry.load("law", report=learn_meanwhile).status.datastore
    assert [datastore.has_document(f"during {stage}") for stage in (Stage.TEST, Stage.SWAP)] == [True, True]
    assert [datastore.has_document(f"doc/{i}") for i in (0, 1, 2)] == [True, False, False]
    assert registry.status("law").datastore.revision == 4


def test_changes_of_one_name_take_turns(registry: Registry) -> None:
    registry.load("law")
    registry.load("news")
    inside, go = Event(), Event()

    def change_slowly() -> None:
        with registry.change("law"):
            inside.set()
            assert go.wait(30)

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(change_slowly)
        assert inside.wait(10)
        with pytest.raises(DatastoreBusy, match="'law' is being changed"), registry.change("law", wait_s=0.01):
            pass
        with pytest.raises(DatastoreBusy):
            registry.refresh("law")
        with registry.change("news"):
            pass
        waiting = pool.submit(learn, registry, "later")
        registry.load("law")  # a swap waits for nobody
        go.set()
        slow.result(10)
        waiting.result(10)
    assert registry.status("law").datastore.has_document("later")


def test_unloading_waits_for_a_change(registry: Registry) -> None:
    registry.load("law")
    with registry.change("law"), pytest.raises(DatastoreBusy, match="still has 1 leases"):
        registry.unload("law", 0)
    registry.unload("law", 0)
    with pytest.raises(DatastoreNotFound), registry.change("law"):
        pass


def test_a_change_that_fails_half_way_shows_what_it_did(registry: Registry) -> None:
    def fail_half_way() -> None:
        with registry.change("law") as change:
            change.living.add([new_document("added")], change.lease.datastore)
            raise ZeroDivisionError

    registry.load("law")
    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert registry.status("law").datastore.has_document("added")
    assert registry.status("law").leases == 0


def test_what_another_process_did_is_seen_after_a_refresh(registry: Registry, stores: Stores) -> None:
    registry.load("law")
    assert not registry.refresh("law")
    with Datastore.open(stores.root, "law") as datastore:
        other = LivingName(stores.root, "law")
        other.add([new_document("elsewhere")], other.snapshot(datastore))
        other.delete(["doc/1"])
    lease = registry.lease("law")
    assert not lease.datastore.has_document("elsewhere")
    assert registry.refresh("law")
    assert not registry.refresh("law")
    status = registry.status("law")
    assert (status.datastore.revision, status.datastore.has_document("elsewhere")) == (2, True)
    assert not lease.datastore.has_document("doc/1")


def test_what_was_learned_counts_in_the_budget_and_leaves_with_its_name(stores: Stores, open_registry: Open) -> None:
    registry = open_registry(max_bytes=10_000_000)
    registry.load("law")
    loaded = registry.budget.used
    learn(registry, "added")
    assert registry.budget.used == loaded + 3 * 2 * DIM
    with registry.change("law") as change:
        change.require_room(1000)
        with pytest.raises(DatastoreBudget, match="learning in datastore 'law' needs 10000000 bytes"):
            change.require_room(10_000_000)
    registry.unload("law", 0)
    assert registry.budget.used == 0
    del change
    assert held_from(stores.root) == []


def test_learned_entries_are_found_by_searches(registry: Registry) -> None:
    registry.load("law")
    learn(registry, "added")
    lease = registry.lease("law")
    datastore = lease.datastore
    first, stop = datastore.document_entries("added")
    found = datastore.search(datastore.keys(torch.arange(first, stop)), 1)
    assert found.entry_ids.flatten().tolist() == list(range(first, stop))
    lease.release()
    assert identity(DIM).key_dim == datastore.dim
