"""Leases pin what a request sees; swaps, unloads and closing wait for them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from registry_stores import Stores, held_from, is_open, wait_until

from knnlm_core.errors import DatastoreBusy, DatastoreNotFound, InvalidParameter
from knnlm_server.registry.generation import Lease
from knnlm_server.registry.registry import Registry

# -- leases and swaps ------------------------------------------------------------------------------------------------


def test_a_lease_pins_its_version_through_a_swap(registry: Registry, stores: Stores) -> None:
    first = registry.load("law", stores.law[0])
    assert (first.created, first.status.generation, first.status.leases) == (True, 1, 0)
    lease = registry.lease("law")
    assert lease.label == f"law:{stores.law[0]}:1.0"
    second = registry.load("law")
    assert (second.created, second.status.generation, second.status.leases) == (False, 2, 1)
    assert second.status.datastore.version == stores.law[2]
    assert lease.datastore.version == stores.law[0]
    assert is_open(lease.datastore)
    other = registry.lease("law")
    assert other.label == f"law:{stores.law[2]}:2.0"
    other.release()
    assert is_open(second.status.datastore)
    lease.release()
    wait_until(lambda: not is_open(first.status.datastore))


def test_the_old_version_closes_when_its_last_lease_ends(registry: Registry, stores: Stores) -> None:
    old = registry.load("law", stores.law[0]).status.datastore
    leases = [registry.lease("law") for _ in range(3)]
    registry.load("law")
    for lease in leases:
        registry._swaps._closer.wait()
        assert is_open(old)
        lease.release()
    wait_until(lambda: not is_open(old))


def test_a_version_without_leases_closes_at_the_swap(registry: Registry, stores: Stores) -> None:
    old = registry.load("law", stores.law[0]).status.datastore
    registry.load("law")
    wait_until(lambda: not is_open(old))


def test_releasing_twice_is_harmless(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    kept, lease = registry.lease("law"), registry.lease("law")
    for _ in range(3):
        lease.release()
    assert registry.status("law").leases == 1
    assert is_open(store)
    kept.release()
    assert registry.status("law").leases == 0


def test_a_lease_released_by_many_threads_at_once_is_released_once(registry: Registry) -> None:
    registry.load("law")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(100):
            kept, lease = registry.lease("law"), registry.lease("law")
            for done in [pool.submit(lease.release) for _ in range(4)]:
                done.result()
            assert registry.status("law").leases == 1
            kept.release()


def test_fifty_swaps_under_leases_give_everything_back(registry: Registry, stores: Stores) -> None:
    process = psutil.Process()
    for version in stores.law[:2]:  # what the first loads leave in caches is no leak
        registry.load("law", version)
    registry._swaps._closer.wait()
    num_fds, held = process.num_fds(), held_from(stores.root)
    assert held, "an open datastore should show"
    leases: list[Lease] = []
    for i in range(50):
        leases.append(registry.lease("law"))
        registry.load("law", stores.law[i % 2])
        if len(leases) == 3:
            leases.pop(0).release()
    registry._swaps._closer.wait()
    assert len(held_from(stores.root)) > len(held)
    for lease in leases:
        lease.release()
    assert registry.status("law").generation == 52
    registry._swaps._closer.wait()
    assert held_from(stores.root) == held
    assert process.num_fds() <= num_fds
    registry.close()
    assert held_from(stores.root) == []


def test_generation_numbers_never_repeat(registry: Registry) -> None:
    numbers = []
    for _ in range(3):
        numbers += [registry.load("law").status.generation for _ in range(2)]
        registry.unload("law", timeout_s=1)
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert registry.load("news").status.generation == 1  # each name counts for itself


def test_leases_and_swaps_from_many_threads_add_up(registry: Registry, stores: Stores) -> None:
    registry.load("law", stores.law[0])
    done = threading.Event()
    wrong: list[str] = []

    def use() -> None:
        while not done.is_set():
            lease = registry.lease("law")
            if not is_open(lease.datastore):
                wrong.append(lease.label)
            lease.release()

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        for i in range(20):
            registry.load("law", stores.law[(i + 1) % 2])
        done.set()
        for user in users:
            user.result()
    assert wrong == []
    assert registry.status("law").leases == 0
    assert len(registry._table.open_generations()) == 1


@pytest.mark.parametrize("name", ["../law", "law/..", "/etc", "", ".", "..", "LAW", "law\0"])
def test_a_name_that_is_none_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidParameter):
        registry.load(name)
    with pytest.raises(DatastoreNotFound):
        registry.lease(name)


def test_what_is_not_loaded_is_not_found(registry: Registry) -> None:
    assert registry.published() == ["law", "news"]
    for ask in (registry.status, registry.lease, registry.load, registry.roll_back, registry.refresh):
        with pytest.raises(DatastoreNotFound, match="'absent'"):
            ask("absent")
    with pytest.raises(DatastoreNotFound, match="'absent'"):
        registry.unload("absent", 0)
    registry.load("news")
    with pytest.raises(DatastoreNotFound, match="'law' is not loaded; loaded: news"):
        registry.lease("law")


# -- unload ----------------------------------------------------------------------------------------------------------


def test_unload_waits_for_leases(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    lease = registry.lease("law")
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(registry.unload, "law", 30)
        wait_until(lambda: registry.status("law").state == "draining")
        with pytest.raises(DatastoreNotFound, match="being unloaded"):
            registry.lease("law")
        with pytest.raises(DatastoreBusy):
            registry.load("law")
        assert is_open(store)
        assert not unloading.done()
        lease.release()
        unloading.result(10)
    assert not is_open(store)
    assert registry.names() == []


def test_unload_waits_for_leases_of_replaced_versions_too(registry: Registry, stores: Stores) -> None:
    registry.load("law", stores.law[0])
    lease = registry.lease("law")
    registry.load("law")
    with pytest.raises(DatastoreBusy, match="still has 1 leases"):
        registry.unload("law", timeout_s=0)
    lease.release()
    registry.unload("law", timeout_s=0)


def test_unload_that_times_out_serves_again(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    lease = registry.lease("law")
    with pytest.raises(DatastoreBusy, match=r"still has 1 leases after 0\.05 s; it stays loaded"):
        registry.unload("law", timeout_s=0.05)
    assert registry.status("law").state == "ready"
    second = registry.lease("law")
    assert (second.generation, is_open(store)) == (1, True)
    for held in (lease, second):
        held.release()
    registry.unload("law", timeout_s=0.05)


def test_close_leaves_leased_versions_to_their_last_lease(registry: Registry) -> None:
    law, news = registry.load("law").status.datastore, registry.load("news").status.datastore
    lease = registry.lease("law")
    registry.close()
    assert (is_open(law), is_open(news), registry.names()) == (True, False, [])
    lease.release()
    assert not is_open(law)


# -- looking at what somebody else has leased --------------------------------------------------------------------------


def test_a_pin_holds_what_a_lease_is_of(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    lease = registry.lease("law")
    pinned = registry.pin(lease.datastore)
    assert pinned is not None
    assert pinned.datastore is lease.datastore
    lease.release()
    with pytest.raises(DatastoreBusy):
        registry.unload("law", 0)
    pinned.release()
    registry.unload("law", 0)
    assert not is_open(store)


def test_what_is_replaced_or_unloaded_is_not_pinned(registry: Registry, stores: Stores) -> None:
    registry.load("law", stores.law[0])
    lease = registry.lease("law")
    registry.load("law", stores.law[0])
    assert registry.pin(lease.datastore) is None  # another generation, though of the same version
    current = registry.lease("law")
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(registry.unload, "law", 30)
        wait_until(lambda: registry.status("law").state == "draining")
        assert registry.pin(current.datastore) is None
        for held in (lease, current):
            held.release()
        unloading.result(10)
    assert registry.pin(current.datastore) is None
