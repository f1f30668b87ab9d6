"""HISTORY and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from maintained_store import NAME, living, new_document, publish_store, teach

from knnlm_core.datastore import layout
from knnlm_core.datastore.history import MAX_HISTORY, previous, read_history, rollback
from knnlm_core.datastore.layout import Current, read_current, write_current
from knnlm_core.datastore.publish import set_current
from knnlm_core.errors import DatastoreConflict, DatastoreCorrupt, DatastoreNotFound


def versions(root: Path) -> list[str]:
    return [entry.version for entry in read_history(root, NAME)]


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    return [publish_store(tmp_path, salt=salt) for salt in range(3)]


def test_history_names_what_was_current_newest_last(tmp_path: Path, three: list[str]) -> None:
    assert versions(tmp_path) == three
    assert read_history(tmp_path, NAME)[-1] == read_current(tmp_path, NAME)
    content = json.loads((tmp_path / NAME / layout.HISTORY).read_text())
    assert [sorted(entry) for entry in content] == [["calibration", "version"]] * 3


def test_rollback_goes_back_one_by_one_and_then_says_that_nothing_came_before(tmp_path: Path, three: list[str]) -> None:
    first, second, third = three
    assert rollback(tmp_path, NAME).version == second
    assert read_current(tmp_path, NAME).version == second
    assert rollback(tmp_path, NAME).version == first
    with pytest.raises(DatastoreConflict, match=f"nothing was current before version {first}"):
        rollback(tmp_path, NAME)
    assert third in layout.published_versions(tmp_path, NAME)
    calibration = [entry for entry in (read_current(tmp_path, NAME).calibration,) if entry]
    set_current(tmp_path, NAME, first, calibration[0])  # again the same: nothing to go back to
    assert versions(tmp_path) == [first]


def test_a_version_that_was_made_current_again_can_be_undone(tmp_path: Path, three: list[str]) -> None:
    first, second, third = three
    set_current(tmp_path, NAME, first)
    assert rollback(tmp_path, NAME).version == third
    assert rollback(tmp_path, NAME).version == second


def test_rollback_passes_over_versions_that_are_gone(tmp_path: Path, three: list[str]) -> None:
    layout.version_folder(tmp_path, NAME, three[1]).rename(tmp_path / "elsewhere")
    assert rollback(tmp_path, NAME).version == three[0]


def test_rollback_leaves_what_was_learned_and_deleted(tmp_path: Path, three: list[str]) -> None:
    teach(tmp_path, new_document("new", 3, 1))
    rollback(tmp_path, NAME)
    assert "new" in living(tmp_path).document_ids()
    assert '"rollback"' in (tmp_path / NAME / layout.AUDIT).read_text()


def test_only_the_last_are_remembered(tmp_path: Path, three: list[str]) -> None:
    for number in range(MAX_HISTORY):
        set_current(tmp_path, NAME, three[number % 2])
    assert len(read_history(tmp_path, NAME)) == MAX_HISTORY


def test_a_crash_between_history_and_current_is_of_no_consequence(tmp_path: Path, three: list[str]) -> None:
    first, second, third = three
    write_current(tmp_path, NAME, Current(second, None))
    set_current(tmp_path, NAME, second)
    path = tmp_path / NAME / layout.HISTORY
    before = read_history(tmp_path, NAME)
    # Made current by nobody in the end: HISTORY names it, CURRENT does not.
    path.write_text(json.dumps([e._asdict() for e in (*before, Current(first, None))]))
    assert read_history(tmp_path, NAME) == before
    # Gone back to by nobody in the end: HISTORY ends before what CURRENT names.
    path.write_text(json.dumps([e._asdict() for e in before[:1]]))
    assert read_history(tmp_path, NAME) == (before[0], before[-1])
    path.unlink()
    assert read_history(tmp_path, NAME) == (Current(second, None),)
    assert previous(tmp_path, NAME) is None
    assert third in layout.published_versions(tmp_path, NAME)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"version": "../../etc", "calibration": null}]', "[" * 100_000, '[{"version": 1}]']
)
def test_a_history_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    version = publish_store(tmp_path)
    (tmp_path / NAME / layout.HISTORY).write_text(content)
    for change in (read_history, rollback, lambda *name: set_current(*name, version)):
        with pytest.raises(DatastoreCorrupt, match="HISTORY"):
            change(tmp_path, NAME)
    assert read_current(tmp_path, NAME).version == version


def test_a_name_that_is_not_published_has_no_history(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert read_history(tmp_path, NAME) == ()
    with pytest.raises(DatastoreNotFound):
        rollback(tmp_path, NAME)
