"""Following what other processes publish, learn and delete."""

from __future__ import annotations

import logging
import shutil

import pytest
from registry_stores import Open, Stores, new_document, wait_until

from knnlm_core.datastore import layout
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.watch import MAX_PAUSE_S, Watcher

INTERVAL_S = 2.0


class Clock:
    """Goes as the test wishes."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watcher(registry: Registry, clock: Clock) -> Watcher:
    return Watcher(registry, INTERVAL_S, clock)


def serving(registry: Registry) -> tuple[str, int]:
    status = registry.status("law")
    return status.datastore.version, status.generation


def refused(registry: Registry) -> float:
    return sum(
        sample.value
        for metric in registry.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "knnlm_datastore_refused_loads_total"
    )


def test_a_name_follows_what_is_published_and_a_pinned_one_stays(
    registry: Registry, watcher: Watcher, stores: Stores
) -> None:
    set_current(stores.root, "law", stores.law[0])
    registry.load("law")
    watcher.look()
    assert serving(registry) == (stores.law[0], 1)
    set_current(stores.root, "law", stores.law[1])
    lease = registry.lease("law")
    watcher.look()
    assert serving(registry) == (stores.law[1], 2)
    assert lease.datastore.version == stores.law[0]
    lease.release()
    watcher.look()
    assert serving(registry) == (stores.law[1], 2)
    registry.roll_back("law")
    watcher.look()
    assert serving(registry) == (stores.law[0], 3)  # or no rollback would last
    registry.load("law")
    set_current(stores.root, "law", stores.law[2])
    watcher.look()
    assert serving(registry) == (stores.law[2], 5)
    assert registry.names() == ["law"]  # what is not loaded stays so


def test_a_new_calibration_of_the_same_version_is_loaded_too(
    registry: Registry, watcher: Watcher, stores: Stores
) -> None:
    from knnlm_core.datastore.calibration import Calibration, calibration_id, write_calibration

    registry.load("law")
    assert registry.status("law").datastore.calibration is None
    version = stores.law[2]
    made = Calibration(
        id=calibration_id(version, {"seed": 1}),
        datastore_version=version,
        k=4,
        knn_temperature=1.0,
        lmbda=0.5,
        protocol={"seed": 1},
        report={},
        helps=True,
    )
    write_calibration(stores.root, "law", made)
    set_current(stores.root, "law", version, made.id)
    watcher.look()
    assert registry.status("law").datastore.calibration == made
    watcher.look()
    assert serving(registry) == (version, 2)


def test_a_broken_version_is_logged_once_counted_and_tried_again_later(
    registry: Registry, watcher: Watcher, clock: Clock, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    set_current(stores.root, "law", stores.law[0])
    registry.load("law")
    values = stores.root / "law" / stores.law[1] / "shard-00000" / layout.VALUES
    content = values.read_bytes()
    values.write_bytes(content[:-1])
    set_current(stores.root, "law", stores.law[1])
    with caplog.at_level(logging.INFO):
        tries = []
        for _ in range(500):
            watcher.look()
            tries.append(refused(registry))
            clock.now_s += INTERVAL_S
    assert serving(registry) == (stores.law[0], 1)
    assert caplog.text.count("watch refused name=law step=load") == 1
    pauses = [later - earlier for earlier, later in zip(attempts(tries), attempts(tries)[1:], strict=False)]
    assert pauses[:4] == [2, 4, 8, 16]
    assert max(pauses) == MAX_PAUSE_S
    # Another version is tried at once; so is the same one once it is whole, after its pause.
    values.write_bytes(content)
    set_current(stores.root, "law", stores.law[2])
    watcher.look()
    assert serving(registry) == (stores.law[2], 2)
    set_current(stores.root, "law", stores.law[1])
    watcher.look()
    assert serving(registry) == (stores.law[1], 3)


def attempts(counts: list[float]) -> list[float]:
    """When a look counted one more refusal, in seconds."""
    return [INTERVAL_S * i for i, count in enumerate(counts) if count > (counts[i - 1] if i else 0)]


def test_what_other_processes_learn_is_shown_whether_or_not_the_name_follows(
    registry: Registry, watcher: Watcher, stores: Stores
) -> None:
    registry.load("law", stores.law[1])
    with Datastore.open(stores.root, "law") as datastore:
        other = LivingName(stores.root, "law")
        other.add([new_document("elsewhere")], other.snapshot(datastore))
    watcher.look()
    assert registry.status("law").datastore.has_document("elsewhere")
    assert serving(registry) == (stores.law[1], 1)


def test_a_damaged_ledger_or_current_is_logged_once_and_what_serves_goes_on(
    registry: Registry, watcher: Watcher, clock: Clock, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    registry.load("law")
    registry.load("news")
    (stores.root / "law" / layout.LEDGER).write_text("no JSON")
    (stores.root / "law" / layout.CURRENT).write_text("nonsense")
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            watcher.look()
            clock.now_s += 100
    assert caplog.text.count("watch refused") == 2
    assert serving(registry)[1] == 1
    shutil.rmtree(stores.root / "law")
    shutil.rmtree(stores.root / "news")
    watcher.look()
    assert registry.names() == ["law", "news"]


def test_the_thread_looks_until_it_is_stopped(open_registry: Open, stores: Stores) -> None:
    set_current(stores.root, "law", stores.law[0])
    registry = open_registry()
    registry.load("law")
    watcher = Watcher(registry, 0.01)
    watcher.start()
    set_current(stores.root, "law", stores.law[1])
    wait_until(lambda: serving(registry)[0] == stores.law[1])
    watcher.stop()
    watcher.join()
    set_current(stores.root, "law", stores.law[2])
    assert serving(registry) == (stores.law[1], 2)


def test_a_look_that_fails_is_not_the_last(
    open_registry: Open, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = open_registry()
    looks: list[int] = []

    def statuses() -> list[object]:
        looks.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(registry, "statuses", statuses)
    watcher = Watcher(registry, 0.001)
    watcher.start()
    wait_until(lambda: len(looks) >= 3)
    watcher.stop()
    watcher.join()
    assert "watch failed" in caplog.text
