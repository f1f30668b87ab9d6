"""What is exported is what is alive; two versions are told apart by their documents and settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from maintained_store import ALIVE, NAME, change_a_lot, forget, living, publish_store, store_keys, teach

from knnlm_builder.corpus import read_documents
from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.index import ivf_spec
from knnlm_core.datastore.maintenance import export as export_module
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.maintenance.diff import Change, diff
from knnlm_core.datastore.maintenance.export import document_line, export_documents, export_entries
from knnlm_core.datastore.segments import NewDocument
from knnlm_core.errors import DatastoreNotFound, InvalidParameter


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_the_builder_reads_the_living_documents_back(tmp_path: Path, suffix: str) -> None:
    publish_store(tmp_path / "stores")
    change_a_lot(tmp_path / "stores")
    path = tmp_path / f"out{suffix}"
    assert export_documents(tmp_path / "stores", NAME, path) == len(ALIVE)
    snapshot = living(tmp_path / "stores")
    read = [Document(d.id, d.text, d.uri, d.title, d.licence, d.tags) for d in read_documents((path,))]
    assert read == [snapshot.document(document_id) for document_id in ALIVE]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [path.name]
    content = path.read_bytes()
    export_documents(tmp_path / "stores", NAME, path)
    assert path.read_bytes() == content


def test_held_out_documents_are_added_on_request(tmp_path: Path) -> None:
    publish_store(tmp_path)
    forget(tmp_path, "doc/2")
    path = tmp_path / "out.jsonl"
    assert export_documents(tmp_path, NAME, path, held_out=True) == 6
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()][-1] == "held/1"


@pytest.mark.parametrize("rows", [10, 65_536])
def test_entries_have_the_ids_that_a_search_returns(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "ROW_GROUP_ENTRIES", rows)
    publish_store(tmp_path)
    change_a_lot(tmp_path)
    snapshot = living(tmp_path)
    path = tmp_path / "entries.parquet"
    written = export_entries(tmp_path, NAME, path, keys=True)
    table = pq.read_table(path).to_pydict()
    ids = torch.tensor(table["entry_id"])
    assert written == len(ids) == int(snapshot.is_visible(0, snapshot.entries).sum())
    places = snapshot.locate(ids.tolist())
    assert [p and (p.document_id, p.char_start, p.char_end) for p in places] == list(
        zip(table["document_id"], table["char_start"], table["char_end"], strict=True)
    )
    assert snapshot.values(ids).tolist() == table["token_id"]
    assert torch.equal(snapshot.keys(ids), torch.tensor(np.array(table["key"], dtype=np.float32)))
    assert export_entries(tmp_path, NAME, path) == written
    assert pq.read_schema(path).names == ["entry_id", "document_id", "token_id", "char_start", "char_end"]


def test_an_older_version_is_exported_with_what_was_learned_since(tmp_path: Path) -> None:
    old = publish_store(tmp_path)
    change_a_lot(tmp_path)
    compact(tmp_path, NAME)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    export_documents(tmp_path, NAME, a, version=old)
    export_documents(tmp_path, NAME, b)
    assert a.read_bytes() == b.read_bytes()


def test_a_file_that_cannot_be_written_is_refused_and_none_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_store(tmp_path)
    for path in (tmp_path / "out.txt", tmp_path / "absent" / "out.jsonl"):
        with pytest.raises(InvalidParameter, match="`path`"):
            export_documents(tmp_path, NAME, path)
    with pytest.raises(InvalidParameter, match=r"\.parquet"):
        export_entries(tmp_path, NAME, tmp_path / "out.jsonl")

    def fail(document: Document) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(export_module, "document_line", fail)
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        export_documents(tmp_path, NAME, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


def test_a_diff_names_documents_and_settings(tmp_path: Path) -> None:
    old = publish_store(tmp_path, spec=ivf_spec(3, nprobe=2, train_vectors=120))
    text = living(tmp_path).document("doc/5").text
    change_a_lot(tmp_path)
    same = NewDocument(Document("doc/5", text), store_keys()[:3], np.arange(3), np.tile([0, 8], (3, 1)))
    teach(tmp_path, same)  # the same text again
    new = compact(tmp_path, NAME)
    found = diff(tmp_path, NAME, old, new)
    assert (found.a, found.b, found.unchanged) == (old, new, 4)
    assert found.added == ("new/empty", "new/c", "new/a")
    assert found.removed == ("doc/0",)
    assert found.changed == ("doc/3",)
    assert found.entries == Change(150, living(tmp_path).entries)
    assert found.settings["revision"] == Change(0, 9)
    assert found.settings["parent_version"] == Change(None, old)
    assert found.settings["index.nlist"] == Change(3, 0)
    assert "lm.model_fingerprint" not in found.settings
    assert diff(tmp_path, NAME, new, new)._replace(unchanged=0) == (
        new, new, Change(found.entries.b, found.entries.b), (), (), (), 0, {}
    )  # fmt: skip
    back = diff(tmp_path, NAME, new, old)
    assert (back.added, back.removed) == (("doc/0",), ("new/empty", "new/c", "new/a"))


def test_a_diff_with_an_unknown_version_says_which_there_are(tmp_path: Path) -> None:
    version = publish_store(tmp_path)
    with pytest.raises(DatastoreNotFound, match=f"no version '{'0' * 16}'; published: {version}"):
        diff(tmp_path, NAME, version, "0" * 16)


def test_gzip_is_gzip(tmp_path: Path) -> None:
    publish_store(tmp_path)
    export_documents(tmp_path, NAME, tmp_path / "a.jsonl")
    export_documents(tmp_path, NAME, tmp_path / "a.jsonl.gz")
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == (tmp_path / "a.jsonl").read_bytes()


def test_a_document_is_one_line_whatever_a_reader_takes_for_its_end() -> None:
    text = "a\x85b\u2028c\u2029d\x0be\x0cf\x1cg\r\nh"
    line = document_line(Document("an\x85id", text, title="\u2028"))
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"id": "an\x85id", "text": text, "title": "\u2028"}
