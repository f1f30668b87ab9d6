"""A build killed at any moment publishes nothing, and the next one ends as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_build import Recorder, build, given, opened, prose, write_jsonl

from knnlm_builder.pipeline import run_build
from knnlm_builder.settings import BuildSettings
from knnlm_core.datastore import layout
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import BuildConflict, DatastoreNotFound
from tiny import save_tiny

# Overlapping windows make encoding slow enough to be met in the middle.
OPTIONS = {"window": 64, "stride": 4, "shard_entries": 450, "held_out_fraction": 0.1, "held_out_max_tokens": 300}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [prose(seed) for seed in range(20)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "pages.jsonl", texts)


@pytest.fixture(scope="module")
def uninterrupted(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    settings = given(tmp_path_factory.mktemp("whole"), corpus, model=str(model), **OPTIONS)
    run_build(settings, Recorder())
    return opened(settings)


def command(settings: BuildSettings) -> list[str]:
    options = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in OPTIONS]
    inputs = [f"--input={path}" for path in settings.inputs]
    places = [f"--model={settings.model}", f"--output={settings.output}", f"--name={settings.name}"]
    return [sys.executable, "-m", "knnlm_cli", "build", *places, *inputs, *options]


@contextmanager
def running_build(settings: BuildSettings, until: str) -> Iterator[subprocess.Popen[str]]:
    """`knnlm build` in a process of its own, from the moment when a file like ``until`` appears; killed at the end."""
    process = subprocess.Popen(command(settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not any((settings.output / settings.name).glob(until)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, f"{until} did not appear"
            time.sleep(0.001)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def kill(settings: BuildSettings, until: str) -> None:
    with running_build(settings, until) as process:
        pass
    assert process.returncode == -signal.SIGKILL  # it had not ended by itself


MOMENTS = {
    "while the third shard is encoded": "*.tmp/shard-00002/keys.raw",
    "while shards are indexed": "*.tmp/shard-00000/index.faiss",
    "between calibration and publication": "calibrations/*/calibration.json",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_publishes_nothing_and_the_next_run_completes_it(
    model: Path, corpus: Path, uninterrupted: Datastore, tmp_path: Path, moment: str
) -> None:
    settings = given(tmp_path, corpus, model=str(model), **OPTIONS)
    kill(settings, MOMENTS[moment])

    home = tmp_path / "law"
    assert not (home / layout.CURRENT).exists()
    assert layout.published_names(tmp_path) == layout.published_versions(tmp_path, "law") == []
    with pytest.raises(DatastoreNotFound):
        opened(settings)
    finished = {path: path.stat().st_mtime_ns for path in home.glob("*.tmp/shard-*/keys.arrow")}
    assert len(finished) >= 2

    recorder = Recorder()
    result = run_build(settings, recorder)
    assert (result.version, result.was_published) == (uninterrupted.version, False)
    with opened(settings) as store:
        have, need = store.manifest, uninterrupted.manifest
        assert have.files == need.files  # every byte of keys, values, indexes and documents
        assert have == need
        assert store.calibration == uninterrupted.calibration
        for path, written in finished.items():  # what was finished was not done again
            assert (store.folder / path.parent.name / path.name).stat().st_mtime_ns == written
        assert dict(recorder.stages)["Encode"] == (store.entries, store.entries)
    assert sorted(path.name for path in home.iterdir()) == sorted(
        ["CURRENT", "HISTORY", "build.lock", "calibrations", result.version]
    )
    assert len(layout.calibration_ids(tmp_path, "law")) == 1


def test_the_published_version_stays_current_and_readable_through_a_killed_build(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    first = given(tmp_path, corpus, model=str(model), window=64, stride=32, held_out_fraction=0.1)
    old = build(first)
    query = torch.zeros(1, 64)
    second = given(tmp_path, corpus, model=str(model), **OPTIONS)
    with opened(first) as held:
        before = held.search(query, 5)
        with running_build(second, "*.tmp/shard-00001/keys.raw") as process:
            assert layout.read_current(tmp_path, "law").version == old.version
            with opened(first) as during:
                assert torch.equal(during.search(query, 5).entry_ids, before.entry_ids)
            with pytest.raises(BuildConflict, match="another build of this datastore is under way"):
                build(second)
            assert process.poll() is None  # the first one is not disturbed
        assert process.returncode == -signal.SIGKILL
        assert layout.read_current(tmp_path, "law").version == old.version
        assert layout.published_versions(tmp_path, "law") == [old.version]
        assert torch.equal(held.search(query, 5).entry_ids, before.entry_ids)

        # What it left is of no use to a build of other inputs.
        (left,) = (tmp_path / "law").glob("*.tmp/shard-00000")
        third = given(tmp_path, corpus, model=str(model), window=64, stride=40, held_out_fraction=0.1)
        recorder = Recorder()
        new = build(third, reporter=recorder)
        assert f"Discarding the unfinished build {left.parent.name} of other inputs" in recorder.said
        assert not list((tmp_path / "law").glob("*.tmp"))
        assert layout.read_current(tmp_path, "law").version == new.version
        assert torch.equal(held.search(query, 5).entry_ids, before.entry_ids)
    with opened(first, old.version) as again:
        assert torch.equal(again.search(query, 5).entry_ids, before.entry_ids)


def test_a_version_that_was_renamed_but_not_made_current_is_completed(corpus: Path, tmp_path: Path) -> None:
    settings = given(tmp_path, corpus, window=64, stride=32, held_out_fraction=0.1)
    result = build(settings)
    (tmp_path / "law" / layout.CURRENT).unlink()  # what a crash between the two last steps leaves
    again = build(settings)
    assert again == result._replace(was_published=True)
    with opened(settings) as store:
        assert store.calibration == result.calibration
