"""Retention: what is current, what can be gone back to and what was asked for stays; nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maintained_store import NAME, all_entries, change_a_lot, forget, living, new_document, publish_store, teach

from knnlm_core.datastore import layout
from knnlm_core.datastore.history import read_history, rollback
from knnlm_core.datastore.ledger_file import LedgerState, SegmentRecord, read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.maintenance.prune import _unneeded, prune
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreBusy, DatastoreNotFound, InvalidParameter


def folders(root: Path) -> set[str]:
    home = root / NAME
    return {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_dir()}


@pytest.fixture
def five(tmp_path: Path) -> list[str]:
    return [publish_store(tmp_path, salt=salt) for salt in range(5)]


def test_the_last_versions_stay_with_their_calibrations(tmp_path: Path, five: list[str]) -> None:
    calibrations = {entry.version: entry.calibration for entry in read_history(tmp_path, NAME)}
    removed = prune(tmp_path, NAME, 3)
    assert set(removed) == {*five[:2], *(f"calibrations/{calibrations[version]}" for version in five[:2])}
    assert layout.published_versions(tmp_path, NAME) == sorted(five[2:])
    assert set(layout.calibration_ids(tmp_path, NAME)) == {calibrations[version] for version in five[2:]}
    assert [entry.version for entry in read_history(tmp_path, NAME)] == five[2:]
    assert prune(tmp_path, NAME, 3) == []
    for version in five[2:]:
        Datastore.open(tmp_path, NAME, version, checksums=True).close()


def test_what_is_current_and_what_was_before_it_always_stay(tmp_path: Path, five: list[str]) -> None:
    set_current(tmp_path, NAME, five[0])
    prune(tmp_path, NAME, 1)
    assert layout.published_versions(tmp_path, NAME) == sorted([five[0], five[4]])
    assert layout.read_current(tmp_path, NAME).version == five[0]
    assert rollback(tmp_path, NAME).version == five[4]


def test_what_somebody_serves_stays(tmp_path: Path, five: list[str]) -> None:
    prune(tmp_path, NAME, 1, protect=[five[1]])
    assert layout.published_versions(tmp_path, NAME) == sorted([five[1], five[3], five[4]])


def test_a_version_that_never_was_current_counts_as_older_than_those_that_were(tmp_path: Path, five: list[str]) -> None:
    rollback(tmp_path, NAME)
    rollback(tmp_path, NAME)
    (tmp_path / NAME / layout.HISTORY).unlink()
    assert set(prune(tmp_path, NAME, 2, dry_run=True)) & set(five) == {five[0], five[1], five[3]}


def test_a_dry_run_names_the_same_and_removes_nothing(tmp_path: Path, five: list[str]) -> None:
    change_a_lot(tmp_path)
    before = folders(tmp_path)
    planned = prune(tmp_path, NAME, 2, dry_run=True)
    assert folders(tmp_path) == before
    assert prune(tmp_path, NAME, 2) == planned
    assert before - folders(tmp_path) >= set(planned)
    assert not set(planned) & folders(tmp_path)


def test_dead_and_folded_segments_go_and_nothing_that_is_seen_changes(tmp_path: Path) -> None:
    publish_store(tmp_path)
    change_a_lot(tmp_path)
    before = all_entries(living(tmp_path))
    assert prune(tmp_path, NAME, 1) == ["tail/0000000000000007"]  # dead
    assert all_entries(living(tmp_path)) == before
    compact(tmp_path, NAME)
    teach(tmp_path, new_document("new/later", 3, 60))
    assert prune(tmp_path, NAME, 1) == []  # the version before the compaction is kept, and shows them
    assert len(living(tmp_path, read_history(tmp_path, NAME)[0].version).document_ids()) == 9
    forget(tmp_path, "doc/1")
    compact(tmp_path, NAME)
    removed = prune(tmp_path, NAME, 1)
    assert [folder for folder in removed if folder.startswith("tail")] == [
        f"tail/{revision:016d}" for revision in (1, 2, 4, 6)
    ]
    left = {place: entry for place, entry in before.items() if place[0] != "doc/1"}
    for version in layout.published_versions(tmp_path, NAME):
        seen = all_entries(living(tmp_path, version))
        assert {place: entry for place, entry in seen.items() if place[0] != "new/later"} == left
        assert len({place for place in seen if place[0] == "new/later"}) == 3
    publish_store(tmp_path, salt=9)  # built later, from the text: it has what was not folded in, and nothing deleted
    assert [id_ for id_ in living(tmp_path).document_ids() if id_.startswith("new")] == ["new/later"]
    assert "doc/1" not in living(tmp_path).document_ids()


@given(st.data())
def test_no_kept_version_needs_what_is_removed(data: st.DataObject) -> None:
    """Whatever was learned and deleted: a removed segment shows no living document beside a version ≥ ``folded``."""
    state = LedgerState()
    held: dict[int, list[str]] = {}
    for _ in range(data.draw(st.integers(0, 12))):
        ids = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
        if data.draw(st.booleans()):
            record = SegmentRecord(state.revision + 1, 1, len(ids), "0" * 64)
            state, held[record.revision] = state.after_add(record, ids), ids
        else:
            state = state.after_delete(ids)
    folded = data.draw(st.integers(0, state.revision))
    gone = set(_unneeded(state, folded))
    for revision, ids in held.items():
        living_ones = [id_ for id_ in ids if state.killed_before(id_) <= revision]
        assert (revision in gone) == (revision <= folded or not living_ones)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    publish_store(tmp_path)
    with pytest.raises(InvalidParameter, match="`keep` must be at least 1, got 0"):
        prune(tmp_path, NAME, 0)
    with pytest.raises(DatastoreNotFound):
        prune(tmp_path, "absent", 1)
    with lock_versions(tmp_path, NAME), pytest.raises(DatastoreBusy):
        prune(tmp_path, NAME, 1)
    assert read_ledger(tmp_path, NAME) == LedgerState()
