"""What a server serves survives its restart; what would not survive is said, and never lost in silence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from registry_stores import Open, Stores

from knnlm_core.datastore import layout
from knnlm_core.datastore.publish import set_current
from knnlm_core.errors import DatastoreConflict, DatastoreCorrupt, DatastoreNotFound, InvalidParameter, ShuttingDown
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.serving import Labels
from knnlm_server.registry.startup import Wishes, restore


@pytest.fixture
def state(stores: Stores) -> Path:
    return stores.root / "serving.json"


@pytest.fixture
def restart(open_registry: Open, state: Path) -> Any:
    """Closes the last registry and opens another one, as a restarted server does."""
    running: list[Registry] = []

    def start(**wishes: Any) -> Registry:
        if running:
            running.pop().close()
        registry = open_registry(state=state)
        running.append(registry)
        restore(registry, Wishes(**wishes), lambda name: None)
        return registry

    return start


def versions(registry: Registry) -> dict[str, str]:
    return {status.name: status.datastore.version for status in registry.statuses()}


def generations(registry: Registry) -> dict[str, int]:
    return {status.name: status.generation for status in registry.statuses()}


def test_without_a_state_everything_published_is_loaded(restart: Any, stores: Stores, state: Path) -> None:
    registry = restart()
    assert versions(registry) == {"law": stores.law[2], "news": stores.news}
    assert registry.is_persistent
    assert json.loads(state.read_text())["names"]["law"] == {
        "loaded": True,
        "version": "current",
        "serving": stores.law[2],
        "previous": None,
        "generation": 1,
    }


def test_versions_aliases_default_and_previous_come_back(restart: Any, stores: Stores) -> None:
    before = restart()
    before.load("law", stores.law[0], labels=Labels(aliases=["statutes", "acts"], default=True))
    before.unload("news", 0)
    after = restart()
    assert versions(after) == {"law": stores.law[0]}
    status = after.status("statutes")
    assert (status.name, status.aliases, status.served.previous) == ("law", ("acts", "statutes"), stores.law[2])
    assert (status.served.follows_current, after.serving.default) == (False, "law")
    assert after.roll_back("acts").status.datastore.version == stores.law[2]


def test_a_name_that_follows_comes_back_as_what_is_current_then(restart: Any, stores: Stores) -> None:
    set_current(stores.root, "law", stores.law[1])
    restart()
    set_current(stores.root, "law", stores.law[2])
    status = restart().status("law")
    assert (status.datastore.version, status.served.previous) == (stores.law[2], stores.law[1])


def test_generation_numbers_are_never_used_again(restart: Any) -> None:
    seen: list[int] = []
    for _ in range(3):
        registry = restart()
        seen.append(registry.status("law").generation)
        seen.append(registry.load("law").status.generation)
        registry.unload("law", 0)
        seen.append(registry.load("law").status.generation)
    assert seen == list(range(1, 10))


def test_a_number_is_written_before_its_generation_serves(
    restart: Any, open_registry: Open, stores: Stores, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that dies between the two gives its next generation another number."""
    registry = restart()

    def die(*_: object) -> None:
        raise ShuttingDown("dead")

    with monkeypatch.context() as patch:
        patch.setattr(registry._table, "retarget", die)
        with pytest.raises(ShuttingDown):
            registry.load("law", stores.law[0])
    assert generations(registry)["law"] == 1
    assert generations(restart())["law"] == 3


def test_load_overrides_which_names_are_loaded_and_nothing_else(restart: Any, stores: Stores) -> None:
    first = restart()
    first.load("law", stores.law[0])
    first.unload("news", 0)
    assert versions(restart(load=["news"])) == {"news": stores.news}
    assert versions(restart(load=["law"])) == {"law": stores.law[0]}  # its pinned version
    assert versions(restart()) == {"law": stores.law[0], "news": stores.news}


def test_what_was_asked_for_must_load_and_the_rest_is_left_out(
    restart: Any, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    first = restart()
    first.load("law", stores.law[0])
    manifest = stores.root / "law" / stores.law[0] / layout.MANIFEST
    content = manifest.read_text()
    manifest.write_text("broken")
    assert versions(restart()) == {"news": stores.news}
    assert "datastore skipped name=law code=datastore_corrupt" in caplog.text
    with pytest.raises(DatastoreCorrupt):
        restart(load=["law"])
    manifest.write_text(content)
    assert versions(restart()) == {"law": stores.law[0], "news": stores.news}  # it was not forgotten


def test_a_version_that_is_gone_is_left_out_and_named(
    restart: Any, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    restart().load("law", stores.law[0])
    shutil.rmtree(stores.root / "law" / stores.law[0])
    assert versions(restart()) == {"news": stores.news}
    assert f"no version '{stores.law[0]}'" in caplog.text


def test_aliases_and_default_of_the_command_line_win_and_stay(restart: Any) -> None:
    first = restart(aliases={"statutes": "law", "today": "news"}, default="statutes")
    assert (first.resolve("today"), first.serving.default) == ("news", "statutes")
    second = restart(aliases={"today": "law"})
    assert second.serving.aliases == {"statutes": "law", "today": "law"}
    assert second.serving.default == "statutes"
    assert restart(load=["today"], default="law").names() == ["law"]
    assert restart().serving.default == "law"


@pytest.mark.parametrize(
    ("wishes", "error", "match"),
    [
        ({"aliases": {"statutes": "absent"}}, DatastoreNotFound, "'absent' is not loaded"),
        ({"aliases": {"news": "law"}}, DatastoreConflict, "'news' cannot be an alias: it is the name of a datastore"),
        ({"aliases": {"Statutes": "law"}}, InvalidParameter, "'Statutes' is not"),
        ({"default": "absent"}, DatastoreNotFound, "'absent' is not loaded"),
        ({"default": "/etc"}, InvalidParameter, "'/etc'"),
        ({"load": ["absent"]}, DatastoreNotFound, "'absent'"),
        ({"load": ["law"], "default": "news"}, DatastoreNotFound, "'news' is not loaded; loaded: law"),
    ],
    ids=str,
)
def test_wishes_that_cannot_be_met_end_the_start_and_change_no_label(
    restart: Any, wishes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        restart(**wishes)
    serving = restart().serving
    assert (serving.aliases, serving.default) == ({}, None)


def test_a_published_name_that_is_an_alias_here_is_left_out(
    restart: Any, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    restart(aliases={"statutes": "law"})
    shutil.copytree(stores.root / "news", stores.root / "statutes")
    assert sorted(versions(restart())) == ["law", "news"]
    assert "'statutes' is published, but here it is an alias of 'law'" in caplog.text


# -- files that are damaged, or cannot be written ----------------------------------------------------------------------


def valid(**changes: Any) -> dict[str, Any]:
    law = {"loaded": True, "version": "current", "serving": "0" * 16, "previous": None, "generation": 1}
    return {"format_version": 1, "names": {"law": law}, "aliases": {}, "default": None, **changes}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no JSON",
        "[]",
        '{"names": ',
        json.dumps(valid(format_version=2)),
        json.dumps(valid(names={"law": {}})),
        json.dumps(valid(names={"../law": valid()["names"]["law"]})),
        json.dumps(valid(names={"law": {**valid()["names"]["law"], "generation": 0}})),
        json.dumps(valid(names={"law": {**valid()["names"]["law"], "version": "../x"}})),
        json.dumps(valid(aliases={"a": "../b"})),
        json.dumps(valid(aliases={"law": "news"})),
        json.dumps(valid(aliases={"a": "b", "b": "law"})),
        json.dumps(valid(default="/etc")),
        json.dumps(valid(unknown=1)),
        " " * (4 * 1024 * 1024 + 1),
    ],
    ids=lambda content: content[:70],
)
def test_a_damaged_state_is_refused_with_the_files_name(open_registry: Open, state: Path, content: str) -> None:
    state.write_text(content)
    with pytest.raises(DatastoreCorrupt, match=r"serving\.json is not a server's state: .*mend it, or remove it"):
        open_registry(state=state)
    assert state.read_text() == content
    state.write_text(json.dumps(valid()))
    open_registry(state=state)  # the one that was refused holds no lock


def test_a_state_that_cannot_be_written_is_said_at_once(
    open_registry: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = open_registry(state=tmp_path / "absent" / "serving.json")
    assert "state not persistent file=" in caplog.text
    assert "No such file or directory" in caplog.text
    assert not registry.is_persistent
    assert registry.load("law").status.generation == 1


def test_a_disk_that_fails_later_is_said_once_and_mends(
    open_registry: Open, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = open_registry(state=state)
    registry.load("news")
    with caplog.at_level(logging.WARNING):
        state.unlink()
        state.mkdir()  # nothing can be renamed over a folder
        for _ in range(2):
            registry.load("law")
    assert (registry.is_persistent, registry.status("law").generation) == (False, 2)
    assert caplog.text.count("state not persistent") == 1
    state.rmdir()
    registry.load("law")
    assert registry.is_persistent
    assert json.loads(state.read_text())["names"]["law"]["generation"] == 3


def test_a_second_server_reads_the_state_and_leaves_it_alone(
    open_registry: Open, stores: Stores, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_registry(state=state)
    first.load("law", stores.law[0])
    content = state.read_text()
    second = open_registry(state=state)
    assert "another server uses it" in caplog.text
    restore(second, Wishes(), lambda name: None)
    assert (second.is_persistent, second.status("law").datastore.version) == (False, stores.law[0])
    second.load("law", stores.law[1])
    assert state.read_text() == content
    first.close()
    assert open_registry(state=state).serving.names["law"].generation == 1
