"""Loading: what is checked before a version serves, what it may cost, and what remains of a load that fails."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from registry_stores import DIM, Open, Stores, held_from, is_open
from small_store import identity

from knnlm_core.datastore import layout
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import (
    DatastoreBudget,
    DatastoreBusy,
    DatastoreCorrupt,
    DatastoreMismatch,
    DatastoreNotFound,
    InvalidParameter,
    KnnlmError,
    ShuttingDown,
)
from knnlm_server.registry import loading
from knnlm_server.registry.progress import Stage
from knnlm_server.registry.registry import Registry


def damage(manifest: Path, change: dict[str, Any]) -> None:
    content = json.loads(manifest.read_text())
    del content["sha256"]
    content["lm"] |= change
    manifest.write_text(json.dumps(content))


def num_bytes(stores: Stores, version: str) -> int:
    with Datastore.open(stores.root, "law", version) as datastore:
        return datastore.manifest.num_bytes


def refused(registry: Registry) -> dict[tuple[str, str], float]:
    """Loads refused, by datastore and code."""
    return {
        (sample.labels["datastore"], sample.labels["code"]): sample.value
        for metric in registry.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "knnlm_datastore_refused_loads_total"
    }


# -- loads that fail -------------------------------------------------------------------------------------------------


def test_a_failed_load_leaves_everything_as_it_was(
    stores: Stores, open_registry: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry = open_registry(state=tmp_path / "state.json")
    old = registry.load("law", stores.law[0]).status
    new = stores.root / "law" / stores.law[1]
    manifest = (new / layout.MANIFEST).read_text()
    held, used, state = held_from(stores.root), registry.budget.used, (tmp_path / "state.json").read_text()

    def fails(kind: type[KnnlmError], version: str = stores.law[1], match: str | None = None) -> None:
        with pytest.raises(kind, match=match):
            registry.load("law", version)
        assert registry.status("law") == old
        assert is_open(old.datastore)
        assert held_from(stores.root) == held
        assert registry.budget.used == used
        assert (tmp_path / "state.json").read_text() == state

    damage(new / layout.MANIFEST, {"tokenizer_fingerprint": "1" * 32})
    fails(DatastoreMismatch)
    (new / layout.MANIFEST).write_text("no JSON")
    fails(DatastoreCorrupt)
    (new / layout.MANIFEST).write_text(manifest)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "warm", lambda path, progress: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        fails(DatastoreCorrupt, match="'law' cannot be read: .*Input/output error")
    (stores.root / "law" / layout.LEDGER).write_text("no JSON")
    fails(DatastoreCorrupt, match="LEDGER")
    (stores.root / "law" / layout.LEDGER).unlink()
    (new / "shard-00000" / layout.VALUES).unlink()
    fails(DatastoreCorrupt)
    fails(DatastoreNotFound, "f" * 16)
    fails(InvalidParameter, "../" + stores.law[1])
    assert refused(registry) == {
        ("law", "datastore_mismatch"): 1,
        ("law", "datastore_corrupt"): 4,
        ("law", "datastore_not_found"): 1,
        ("law", "invalid_parameter"): 1,
    }
    assert registry.load("law", stores.law[0]).status.generation == 2


def test_a_load_of_what_was_never_loaded_is_refused_under_no_name(registry: Registry) -> None:
    """Names from outside must not become labels."""
    with pytest.raises(DatastoreNotFound):
        registry.load("absent")
    assert refused(registry) == {("", "datastore_not_found"): 1}


def test_a_registry_without_a_root_loads_nothing() -> None:
    registry = Registry(None, identity(DIM))
    assert (registry.published(), registry.is_persistent) == ([], False)
    with pytest.raises(DatastoreNotFound, match="without --datastores"):
        registry.load("law")
    registry.close()


def test_closing_ends_a_load_under_way(registry: Registry, stores: Stores) -> None:
    def close_at(wanted: Stage) -> None:
        def report(stage: Stage, done: int, total: int) -> None:
            if stage is wanted:
                registry.close()

        with pytest.raises(ShuttingDown):
            registry.load("law", report=report)

    close_at(Stage.WARM)
    assert held_from(stores.root) == []
    close_at(Stage.SWAP)  # closed at the last moment before the swap
    assert registry.names() == []
    assert held_from(stores.root) == []
    assert registry.budget.used == 0


# -- one change at a time --------------------------------------------------------------------------------------------


def test_of_concurrent_changes_of_a_name_one_wins_and_others_are_busy(registry: Registry) -> None:
    inside, go = Event(), Event()

    def wait(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.WARM and not done:
            inside.set()
            assert go.wait(30)

    registry.load("news")
    with ThreadPoolExecutor(1) as pool:
        winner = pool.submit(registry.load, "law", report=wait)
        assert inside.wait(10)
        for change in (registry.load, registry.roll_back, lambda name: registry.unload(name, 0)):
            with pytest.raises(DatastoreBusy, match="'law' is being changed"):
                change("law")
        registry.unload("news", 0)  # another name is free
        go.set()
        assert winner.result().status.generation == 1
    assert registry.load("law").status.generation == 2


# -- verifying and testing -------------------------------------------------------------------------------------------


def stages(registry: Registry, name: str = "law", version: str | None = None) -> list[tuple[Stage, int, int]]:
    told: list[tuple[Stage, int, int]] = []
    registry.load(name, version, report=lambda stage, done, total: told.append((stage, done, total)))
    return told


def test_progress_tells_every_stage_from_nothing_to_everything(open_registry: Open, tmp_path: Path) -> None:
    registry = open_registry(verified=tmp_path / "verified")
    told = stages(registry)
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == list(Stage)
    for stage in Stage:
        done = [(done, total) for at, done, total in told if at is stage]
        assert done[0][0] == 0
        assert done[-1][0] == done[-1][1] > 0
        assert done == sorted(done)
        assert len({total for _, total in done}) == 1
    assert (
        next(total for stage, _, total in told if stage is Stage.VERIFY)
        == registry.status("law").datastore.manifest.num_bytes
    )


def test_files_are_read_in_full_once_per_version_and_machine(
    stores: Stores, open_registry: Open, tmp_path: Path
) -> None:
    first, second = open_registry(verified=tmp_path / "verified"), open_registry(verified=tmp_path / "verified")
    assert Stage.VERIFY in {stage for stage, _, _ in stages(first)}
    for registry in (first, second):
        assert Stage.VERIFY not in {stage for stage, _, _ in stages(registry)}
    assert Stage.VERIFY in {stage for stage, _, _ in stages(second, version=stores.law[0])}
    values = stores.root / "law" / stores.law[1] / "shard-00000" / layout.VALUES
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(bytes(content))
    for _ in range(2):  # a version that failed is not remembered as verified
        with pytest.raises(DatastoreCorrupt, match="sha256"):
            first.load("law", stores.law[1])


def test_all_canaries_are_asked_at_the_first_load_and_eight_later(
    stores: Stores, open_registry: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    real = loading.self_test

    def spy(datastore: Datastore, *, queries: int | None = None) -> Any:
        asked.append(queries)
        if broken:
            raise DatastoreCorrupt("recall@32 is 0.1")
        return real(datastore, queries=queries)

    broken = True
    monkeypatch.setattr(loading, "self_test", spy)
    registry = open_registry(verified=tmp_path / "verified")
    for _ in range(2):  # what failed is no easier the second time
        with pytest.raises(DatastoreCorrupt, match="recall"):
            registry.load("law")
    broken = False
    for _ in range(2):
        registry.load("law")
    open_registry(verified=tmp_path / "verified").load("law")
    assert asked == [None, None, None, 8, 8]
    asked.clear()
    forgetful = open_registry()
    for version in (stores.law[0], stores.law[0], stores.law[1]):
        forgetful.load("law", version)
    assert asked == [None, 8, None]


# -- budget ----------------------------------------------------------------------------------------------------------


def test_a_load_beyond_the_budget_is_refused_with_its_figures(stores: Stores, open_registry: Open) -> None:
    small, large = num_bytes(stores, stores.law[0]), num_bytes(stores, stores.law[2])
    registry = open_registry(max_bytes=small + large - 1)
    registry.load("law", stores.law[0])
    with pytest.raises(
        DatastoreBudget,
        match=rf"'law' version {stores.law[2]} needs {large} bytes, but of `datastore_bytes` = "
        rf"{small + large - 1} bytes {small} are used",
    ):
        registry.load("law", stores.law[2])
    assert (registry.status("law").datastore.version, registry.budget.used) == (stores.law[0], small)
    registry.load("law", stores.law[0])
    registry._swaps._closer.wait()
    assert registry.budget.used == small


def test_a_generation_that_drains_counts_until_it_is_closed(stores: Stores, open_registry: Open) -> None:
    sizes = [num_bytes(stores, version) for version in stores.law]
    registry = open_registry(max_bytes=sum(sizes))
    leases = []
    for i, version in enumerate(stores.law):
        registry.load("law", version)
        leases.append(registry.lease("law"))
        assert registry.budget.used == sum(sizes[: i + 1])
    with pytest.raises(DatastoreBudget):
        registry.load("news")
    leases[1].release()
    registry.load("news")
    assert registry.budget.used == sizes[0] + sizes[2] + registry.status("news").datastore.manifest.num_bytes


def test_loads_at_the_same_time_share_the_budget(stores: Stores, open_registry: Open) -> None:
    """Neither of two loads that fit alone, but not together, is counted only once it serves."""
    law, news = num_bytes(stores, stores.law[2]), open_registry().load("news").status.datastore.manifest.num_bytes
    registry = open_registry(max_bytes=law + news - 1)

    def load_news_meanwhile(stage: Stage, done: int, total: int) -> None:
        if stage is Stage.TEST and not done:
            with pytest.raises(DatastoreBudget):
                registry.load("news")

    registry.load("law", report=load_news_meanwhile)
    assert registry.names() == ["law"]


def test_a_version_is_refused_before_it_is_read(
    stores: Stores, open_registry: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "verify_files", lambda *_: pytest.fail("read"))
    with pytest.raises(DatastoreBudget):
        open_registry(max_bytes=1, verified=tmp_path).load("law")
    other_lm = Registry(stores.root, identity(DIM + 1))
    with pytest.raises(DatastoreMismatch):
        other_lm.load("law")


def test_a_root_that_disappears_is_not_found(registry: Registry, stores: Stores) -> None:
    registry.load("law")
    shutil.rmtree(stores.root)
    with pytest.raises(DatastoreNotFound):
        registry.load("law")
    assert is_open(registry.status("law").datastore)
