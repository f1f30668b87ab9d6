"""Old versions leave the disk once nobody uses them, and not before."""

from __future__ import annotations

import pytest
from registry_stores import Open, Stores

from knnlm_core.datastore import layout
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.publish import set_current
from knnlm_core.errors import DatastoreNotFound
from knnlm_server.registry.registry import Registry


def published(stores: Stores) -> set[str]:
    return set(layout.published_versions(stores.root, "law"))


def swap(registry: Registry, stores: Stores, version: str) -> None:
    set_current(stores.root, "law", version)
    registry.load("law")
    registry._swaps._closer.wait()


def test_by_default_every_version_stays(registry: Registry, stores: Stores) -> None:
    for version in stores.law:
        swap(registry, stores, version)
    assert published(stores) == set(stores.law)


def test_versions_in_use_stay_until_they_are_not(stores: Stores, open_registry: Open) -> None:
    first, second, third = stores.law
    registry = open_registry(keep_versions=1)
    swap(registry, stores, first)
    lease = registry.lease("law")
    swap(registry, stores, second)
    assert published(stores) == {first, second, third}  # the third was current before, so a rollback goes there
    swap(registry, stores, third)
    assert published(stores) == {first, second, third}  # leased, gone back to, served
    lease.release()
    registry._swaps._closer.wait()
    assert published(stores) == {second, third}
    assert registry.roll_back("law").status.datastore.version == second


def test_what_cannot_be_removed_is_tried_again_at_the_next_swap(
    stores: Stores, open_registry: Open, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = stores.law
    registry = open_registry(keep_versions=1)
    with lock_versions(stores.root, "law"):
        for version in (first, second, third):
            swap(registry, stores, version)
    assert published(stores) == {first, second, third}
    swap(registry, stores, third)
    assert published(stores) == {second, third}
    assert "old versions not removed" not in caplog.text


def test_versions_that_were_written_anew_are_gone_back_to(registry: Registry, stores: Stores) -> None:
    first, second, third = stores.law
    registry.load("law", first)
    registry.load("law", third)
    registry.replaced("law", {first: second})
    assert registry.status("law").served.previous == second
    assert registry.roll_back("law").status.datastore.version == second
    assert registry.status("law").served.previous == third
    registry.replaced("law", {second: None, third: None})  # nothing was left in them
    status = registry.status("law")
    assert (status.served.previous, status.served.serving) == (None, second)
    registry.replaced("absent", {first: second})
    with pytest.raises(DatastoreNotFound):
        registry.status("absent")
