"""What was measured of a version's keys holds for that very version, whatever its folder holds later."""

from __future__ import annotations

import shutil

from registry_stores import DIM, Open, Stores
from small_store import Plan, build, random_keys

from knnlm_core.datastore import layout
from knnlm_core.datastore.publish import publish
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import Drift


class Measure:
    """Measures what it is told to, and remembers how often."""

    def __init__(self, *results: float | None) -> None:
        self.results = list(results)
        self.calls = 0

    def __call__(self, snapshot: Snapshot) -> Drift | None:
        ratio = self.results[self.calls]
        self.calls += 1
        return None if ratio is None else Drift(ratio, 1.0, 1.0, 100)


def rebuild(stores: Stores, seed: int) -> None:
    """The current version of `law` again in the same folder: the same inputs, keys of another arithmetic."""
    version = stores.law[-1]
    shutil.rmtree(layout.version_folder(stores.root, "law", version))
    sizes = [40, *[5] * 4]
    made = build(stores.root, Plan(random_keys(sum(sizes), DIM, seed), document_sizes=sizes, name="law", salt=2))
    assert made == version
    publish(stores.root, "law", version)


def test_a_version_is_measured_once_however_often_it_is_loaded(stores: Stores, open_registry: Open) -> None:
    measure = Measure(0.01, 0.02)
    registry = open_registry(drift=measure)
    for version, ratio in ((stores.law[2], 0.01), (stores.law[1], 0.02), (stores.law[2], 0.01), (stores.law[1], 0.02)):
        registry.load("law", version=version)
        drift = registry.status("law").drift
        assert drift is not None
        assert drift.ratio == ratio
    assert measure.calls == 2


def test_a_version_built_anew_in_the_same_folder_is_measured_anew(stores: Stores, open_registry: Open) -> None:
    measure = Measure(0.01, 0.05)
    registry = open_registry(drift=measure)
    registry.load("law")
    registry.unload("law", timeout_s=5)
    rebuild(stores, seed=2)  # the same keys: the same version
    registry.load("law")
    registry.unload("law", timeout_s=5)
    assert measure.calls == 1
    rebuild(stores, seed=77)
    registry.load("law")
    drift = registry.status("law").drift
    assert drift is not None
    assert drift.ratio == 0.05


def test_that_nothing_could_be_said_is_not_remembered(stores: Stores, open_registry: Open) -> None:
    measure = Measure(None, 0.03)
    registry = open_registry(drift=measure)
    registry.load("law")
    assert registry.status("law").drift is None
    registry.unload("law", timeout_s=5)
    registry.load("law")
    assert registry.status("law").drift == Drift(0.03, 1.0, 1.0, 100)
