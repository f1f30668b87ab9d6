"""`knnlm datastore`: every subcommand on a real datastore, as people and as scripts meet it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "datastore"))

from maintained_store import ALIVE, NAME, change_a_lot, forget, living, new_document, publish_store, teach

from knnlm_builder.corpus import read_documents
from knnlm_cli import datastore_progress
from knnlm_cli.datastore_place import Place, read_place
from knnlm_cli.datastore_table import size
from knnlm_cli.main import make_app
from knnlm_core.datastore import layout
from knnlm_core.datastore.history import read_history
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.errors import DatastoreNotFound, InvalidParameter


def knnlm(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(make_app(), ["datastore", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def told(*arguments: object) -> Any:
    """The JSON of a subcommand; stdout holds nothing else."""
    return json.loads(knnlm(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    publish_store(root, salt=1)
    publish_store(root)
    change_a_lot(root)
    return root


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """ROOT/NAME with two versions, learned and deleted documents."""
    return Path(shutil.copytree(original, tmp_path / "root")) / NAME


def current(store: Path) -> str:
    return layout.read_current(store.parent, NAME).version


def test_list_names_every_datastore_and_what_was_learned_and_deleted(store: Path) -> None:
    found = told("list", store.parent)
    (card,) = found["data"]
    assert found["object"] == "list"
    assert (card["object"], card["name"], card["version"]) == ("datastore", NAME, current(store))
    counts = ("revision", "entries", "documents", "learned_documents", "deleted_documents", "versions")
    assert [card[count] for count in counts] == [8, 150, 6, 4, 3, 2]
    assert card["calibration"]["lambda"] == 0.25
    assert card["previous"] == read_history(store.parent, NAME)[0].version
    table = knnlm("list", store.parent).stdout
    assert NAME in table
    assert current(store) in table


def test_a_datastore_that_cannot_be_read_does_not_hide_the_others(store: Path) -> None:
    broken = store.with_name("broken")
    broken.mkdir()
    (broken / layout.CURRENT).write_text("nonsense")
    cards = {card["name"]: card for card in told("list", store.parent)["data"]}
    assert cards["broken"]["error"]["code"] == "datastore_corrupt"
    assert "error" not in cards[NAME]
    assert "nonsense" in knnlm("list", store.parent).stdout


def test_inspect_shows_versions_tail_and_manifest(store: Path) -> None:
    found = told("inspect", store)
    assert found["current"] is True
    assert found["manifest"]["lm"]["key_dim"] == 8
    assert [each["version"] for each in found["versions"]] == layout.published_versions(store.parent, NAME)
    assert [(each["revision"], each["living_documents"]) for each in found["tail"]] == [
        (1, 1), (2, 1), (4, 1), (6, 1), (7, 0)
    ]  # fmt: skip
    assert [entry["version"] for entry in found["history"]] == [
        each.version for each in read_history(store.parent, NAME)
    ]
    older = found["previous"]
    assert told("inspect", f"{store}@{older}")["current"] is False
    text = knnlm("inspect", store).stdout
    for words in ("SQfp16", "scanned whole", "16 tokens, stride 8", "4 documents, 73 entries", older):
        assert words in text


def test_verify_reads_everything(store: Path) -> None:
    found = told("verify", store)
    assert {each["version"] for each in found["versions"]} == set(layout.published_versions(store.parent, NAME))
    assert all(each["self_test"]["recall_at_32"] == 1.0 for each in found["versions"])
    assert (found["revision"], found["segments"], found["calibrations"], found["leftovers"]) == (8, 5, 2, [])
    assert len(told("verify", f"{store}@{current(store)}")["versions"]) == 1
    (store / "0123456789abcdef.tmp").mkdir()
    result = knnlm("verify", store)
    assert "law is whole: 2 versions, 5 segments" in result.stdout
    assert "0123456789abcdef.tmp" in result.stdout
    assert "checksums: " in result.stderr


@pytest.mark.parametrize("damaged", ["version", "segment", "calibration", "ledger", "history"])
def test_verify_names_what_is_damaged(store: Path, damaged: str) -> None:
    path = {
        "version": store / read_history(store.parent, NAME)[0].version / "shard-00001" / layout.INDEX,
        "segment": layout.segment_folder(store.parent, NAME, 4) / layout.VALUES,
        "calibration": store / layout.CALIBRATIONS / layout.calibration_ids(store.parent, NAME)[0] / layout.CALIBRATION,
        "ledger": store / layout.LEDGER,
        "history": store / layout.HISTORY,
    }[damaged]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    result = knnlm("verify", store, code=1)
    assert path.name in result.stderr
    assert "datastore_corrupt" in result.stderr
    assert result.stdout == ""


def test_compact_then_diff_then_rollback_then_prune(store: Path) -> None:
    old = current(store)
    done = told("compact", store)
    new = done["datastore"]["version"]
    assert (done["compacted_from"], done["changed"]) == (old, True)
    assert current(store) == new != old
    assert told("compact", store)["changed"] is False
    assert "nothing to fold" in knnlm("compact", store).stdout

    found = told("diff", store)
    assert (found["a"], found["b"]) == (old, new)
    assert found["removed"] == ["doc/0"]
    assert found["changed"] == ["doc/3"]
    assert found["settings"]["revision"] == {"a": 0, "b": 8}
    text = knnlm("diff", store).stdout
    assert "− doc/0" in text
    assert told("diff", store, new, old)["added"] == ["doc/0"]

    back = told("rollback", store)
    assert (back["from"]["version"], back["to"]["version"]) == (new, old)
    assert "back from version" in knnlm("rollback", store).stdout
    assert "nothing was current before" in knnlm("rollback", store, code=1).stderr
    layout.write_current(store.parent, NAME, layout.Current(new, back["from"]["calibration"]))

    planned = told("prune", store, "--keep", 1, "--dry-run")
    assert planned["dry_run"] is True
    assert "would remove" in knnlm("prune", store, "--keep", 1, "--dry-run").stdout
    assert told("prune", store, "--keep", 1)["removed"] == planned["removed"]
    assert knnlm("prune", store, "--keep", 1).stdout == "nothing to remove\n"
    assert "must be at least 1, got 0" in knnlm("prune", store, "--keep", 0, code=1).stderr
    assert told("verify", store)["leftovers"] == []


def test_prune_protects_a_version(store: Path) -> None:
    for salt in (3, 4):
        publish_store(store.parent, salt=salt)
    first = read_history(store.parent, NAME)[0].version
    removed = told("prune", store, "--keep", 1, "--protect", first)["removed"]
    assert first not in removed
    assert removed


def test_forget_deletes_what_is_alive_and_nothing_else(store: Path) -> None:
    answer = told("forget", store, "doc/5", "new/c")
    assert (answer["object"], answer["revision"], answer["documents"]) == ("datastore.revision", 9, ["doc/5", "new/c"])
    assert living(store.parent).document_ids() == [id_ for id_ in ALIVE if id_ not in {"doc/5", "new/c"}]
    result = knnlm("forget", store, "doc/1", "doc/5", code=1)
    assert "doc/5" in result.stderr
    assert "document_not_found" in result.stderr
    assert "doc/1" in living(store.parent).document_ids()
    line = (store / layout.AUDIT).read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(line)["actor"]


def test_purge_asks_first_and_reports_every_file(store: Path) -> None:
    before = current(store)
    assert "give --yes" in knnlm("purge", store, "doc/3", code=1).stderr
    assert current(store) == before
    answer = told("purge", store, "doc/3", "--yes")
    assert answer["replaced_versions"][before] == current(store)
    assert answer["replaced_segments"] == {"2": None}
    assert before in answer["removed"]
    assert all(search["found"] == search["shared"] for search in answer["searches"])
    assert {"path", "sought", "found", "shared"} == answer["searches"][0].keys()
    text = knnlm("purge", store, "doc/4", "--yes").stdout
    assert "nothing is left" in text
    assert "doc/4" not in living(store.parent).document_ids()


def test_a_purge_that_finds_a_leftover_fails_and_says_where(store: Path) -> None:
    text = living(store.parent).document("doc/4").text
    (store / "notes.txt").write_text(text)
    result = knnlm("purge", store, "doc/4", "--yes", code=1)
    assert "notes.txt" in result.stderr
    assert "verify_failed" in result.stderr


def test_export_is_read_by_build(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.gz"
    assert told("export", store, path)["documents"] == len(ALIVE)
    assert [document.id for document in read_documents((path,))] == ALIVE
    assert told("export", store, path, "--held-out")["documents"] == len(ALIVE) + 2
    table = tmp_path / "entries.parquet"
    assert "121 entries" in knnlm("export", store, table, "--keys").stdout
    assert "key" in pq.read_schema(table).names
    assert "--keys means nothing" in knnlm("export", store, path, "--keys", code=1).stderr
    assert "--held-out means nothing" in knnlm("export", store, table, "--held-out", code=1).stderr
    assert "must end in" in knnlm("export", store, tmp_path / "out.txt", code=1).stderr


def test_work_under_way_is_an_error_in_one_line(store: Path) -> None:
    with lock_versions(store.parent, NAME):
        for command in (("compact", store), ("purge", store, "doc/1", "--yes"), ("prune", store, "--keep", 1)):
            result = knnlm(*command, code=1)
            assert "datastore_busy" in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said_to_be_so(store: Path) -> None:
    store.chmod(0o500)
    try:
        for command in (("compact", store), ("forget", store, "doc/1"), ("rollback", store)):
            assert "datastore_read_only" in knnlm(*command, code=1).stderr
    finally:
        store.chmod(0o700)


def test_where_a_datastore_is(store: Path) -> None:
    version = current(store)
    assert read_place(str(store)) == Place(store.parent, NAME, None)
    assert read_place(f"{store}@{version}", with_version=True) == Place(store.parent, NAME, version)
    with pytest.raises(InvalidParameter, match="ROOT/NAME, got"):
        read_place(f"{store}@{version}")
    for given in ("/", "..", f"{store}@current"):
        with pytest.raises(InvalidParameter):
            read_place(given, with_version=True)
    with pytest.raises(DatastoreNotFound, match=f"under {store.parent}: {NAME}"):
        read_place(str(store.with_name("absent")))
    folder = store.parent.rename(store.parent.with_name("stores"))
    with pytest.raises(DatastoreNotFound, match=f"add the name of one: {NAME}"):
        read_place(str(folder))
    assert "has no version '0000000000000000'" in knnlm("inspect", f"{folder / NAME}@{'0' * 16}", code=1).stderr


def test_a_datastore_without_a_past_has_nothing_to_compare_with(tmp_path: Path) -> None:
    publish_store(tmp_path)
    assert "was current before; name two of" in knnlm("diff", tmp_path / NAME, code=1).stderr


def test_ids_are_no_markup(store: Path) -> None:
    teach(store.parent, new_document("[red]odd[/red]", 3, 70))
    knnlm("compact", store)
    assert "+ [red]odd[/red]" in knnlm("diff", store).stdout
    forget(store.parent, "doc/1")


def test_a_stage_that_comes_again_gets_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=100, record=True)
    monkeypatch.setattr(datastore_progress, "Console", lambda **options: console)
    with datastore_progress.shown_progress() as progress:
        for _ in range(2):
            for done in (0, 5, 10):
                progress("checksums", done, 10)
    shown = console.export_text()
    assert shown.splitlines()[-2:].count(shown.splitlines()[-1]) >= 1
    assert sum("10 / 10" in line for line in shown.splitlines()[-2:]) == 2


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_sizes_are_for_people(count: int, shown: str) -> None:
    assert size(count) == shown
