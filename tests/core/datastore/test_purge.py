"""Purging: whatever a document left, in whichever file, is gone afterwards or said to be there."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from maintained_store import (
    ALIVE,
    DIM,
    NAME,
    SIZES,
    all_entries,
    change_a_lot,
    forget,
    living,
    new_document,
    publish_store,
    queries,
    store_keys,
    teach,
)
from small_store import document, random_keys

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.canaries import canaries_of, self_test
from knnlm_core.datastore.history import read_history
from knnlm_core.datastore.index import EXACT_UP_TO, ivf_spec
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.maintenance import purge as purge_module
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.maintenance.purge import purge
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreConflict, DocumentNotFound, InvalidParameter, VerifyFailed

SECRET = "doc/3"


def everything(root: Path) -> dict[str, bytes]:
    """Every file under a name, tables as text: what somebody with the disk in hand could read."""
    found = {}
    for path in sorted((root / NAME).rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content = json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
            found[path.relative_to(root / NAME).as_posix()] = content
    return found


def files_with(root: Path, *sought: bytes) -> set[str]:
    """An independent search: plain substrings of every file."""
    return {path for path, content in everything(root).items() if any(word in content for word in sought)}


def own_rows(keys: np.ndarray, first: int, stop: int) -> list[bytes]:  # type: ignore[type-arg]
    """Keys that only the entries first … stop − 1 have."""
    others = {row.tobytes() for row in np.concatenate([keys[:first], keys[stop:]])}
    return [row.tobytes() for row in keys[first:stop] if row.tobytes() not in others]


def test_a_purged_document_is_in_no_file_and_all_others_are_as_they_were(tmp_path: Path) -> None:
    publish_store(tmp_path, salt=1)
    publish_store(tmp_path)
    keys = store_keys()
    first = sum(SIZES[:3])
    rows = own_rows(keys, first, first + SIZES[3])
    text = document(3, SIZES[3]).text.encode()
    holding = files_with(tmp_path, text, *rows)
    assert {path.rpartition("/")[2] for path in holding} == {"documents.parquet", "keys.arrow", "index.faiss"}
    alive = [f"doc/{number}" for number in (0, 1, 2, 4, 5)]
    with living(tmp_path).datastore:
        before = all_entries(living(tmp_path))

    report = purge(tmp_path, NAME, [SECRET], actor="test")
    assert files_with(tmp_path, text, *rows) == set()
    assert files_with(tmp_path, SECRET.encode()) == {layout.LEDGER, layout.AUDIT}  # by design
    with Datastore.open(tmp_path, NAME, checksums=True) as store:
        assert store.document_ids() == alive
        assert all_entries(store) == {place: entry for place, entry in before.items() if place[0] != SECRET}
        assert self_test(store).recall_at_32 == 1.0
    assert (report.documents, report.revision, report.segments) == ((SECRET,), 1, {})
    assert len(report.versions) == 2
    assert set(report.versions.values()) == set(layout.published_versions(tmp_path, NAME))
    assert not report.versions.keys() & set(layout.published_versions(tmp_path, NAME))
    assert report.sought == {"texts": 1, "keys": len({row.tobytes() for row in keys[first : first + 40]} | {
        row.tobytes() for row in store_keys(1)[first : first + 40]}), "runs of tokens": 2 * 25 - 25}  # fmt: skip
    assert all(search.left == 0 for search in report.proof.searches)
    assert {search.path for search in report.proof.searches} >= everything(tmp_path).keys() - {layout.AUDIT}


def test_rows_that_other_documents_share_are_counted_and_stay(tmp_path: Path) -> None:
    keys = random_keys(sum(SIZES), DIM, 4)
    keys[0:5] = keys[95:100]  # doc/0 and doc/4 begin alike: so do their keys
    publish_store(tmp_path, keys=keys, cuts=(50,))
    report = purge(tmp_path, NAME, ["doc/4"])
    shared = {
        (s.path.partition("/")[2], s.found, s.shared) for s in report.proof.searches if s.sought == "keys" and s.found
    }
    assert shared == {("shard-00000/keys.arrow", 5, 5), ("shard-00000/index.faiss", 5, 5)}
    assert report.proof.same_text == ()


def test_a_document_with_the_same_text_is_reported(tmp_path: Path) -> None:
    publish_store(tmp_path)
    one = new_document("first", 9, 40)
    other = one._replace(document=one.document.__class__("second", one.document.text))
    teach(tmp_path, one)
    teach(tmp_path, other)
    report = purge(tmp_path, NAME, ["first"])
    assert report.proof.same_text == ("second",)
    again = purge(tmp_path, NAME, ["second"])
    assert again.proof.same_text == ()
    assert files_with(tmp_path, one.document.text.encode()) == set()


def test_current_history_and_calibrations_follow(tmp_path: Path) -> None:
    first = publish_store(tmp_path, salt=1)
    second = publish_store(tmp_path)
    before = read_history(tmp_path, NAME)
    assert [entry.version for entry in before] == [first, second]
    report = purge(tmp_path, NAME, ["doc/2"])
    after = read_history(tmp_path, NAME)
    assert [entry.version for entry in after] == [report.versions[first], report.versions[second]]
    assert layout.read_current(tmp_path, NAME) == after[-1]
    assert {entry.calibration for entry in after} == set(layout.calibration_ids(tmp_path, NAME))
    for entry, old in zip(after, before, strict=True):
        calibration = read_calibration(tmp_path, NAME, str(entry.calibration))
        assert calibration.datastore_version == entry.version
        # The end of doc/2 was held out: neither its name nor its digest is kept.
        assert calibration.protocol["held_out_documents"] == ["held/1"]
        assert calibration.protocol["held_out_digests"] == ["digest of held/1"]
        assert calibration.report["held_out_documents"] == ["held/1"]
        assert calibration.protocol["copied_from"] == old.calibration


def test_held_out_text_and_its_canaries_go_too(tmp_path: Path) -> None:
    publish_store(tmp_path)
    with Datastore.open(tmp_path, NAME) as store:
        canaries = canaries_of(store)
        assert canaries is not None
        gone = [q.numpy().tobytes() for q, d in zip(canaries.queries, canaries.documents, strict=True) if d == "held/1"]
    assert len(files_with(tmp_path, *gone)) == 1
    purge(tmp_path, NAME, ["held/1"])
    assert files_with(tmp_path, b"Held out whole.", b'held/1"', *gone) <= {layout.LEDGER, layout.AUDIT}
    purge(tmp_path, NAME, ["doc/2"])
    with Datastore.open(tmp_path, NAME, checksums=True) as store:
        assert not {layout.CANARIES, layout.HELD_OUT} & store.manifest.files.keys()
    assert files_with(tmp_path, b"The end of doc/2.") == set()


def test_the_tail_forgets_and_keeps_what_else_it_holds(tmp_path: Path) -> None:
    publish_store(tmp_path)
    change_a_lot(tmp_path)
    both = new_document("new/d", 8, 50), new_document("new/e", 6, 51)
    teach(tmp_path, *both)  # revision 9
    before = all_entries(living(tmp_path))
    report = purge(tmp_path, NAME, ["new/d", "new/a", "new/gone", "doc/0"])
    # Segment 1 keeps new/empty, which is alive; 6 held new/a alone, 7 nothing that is alive.
    assert {old: new is not None for old, new in report.segments.items()} == {1: True, 6: False, 7: False, 9: True}
    snapshot = living(tmp_path)
    assert sorted(snapshot.document_ids()) == sorted([*(set(ALIVE) - {"new/a"}), "new/e"])
    assert all_entries(snapshot) == {k: v for k, v in before.items() if k[0] not in {"new/d", "new/a"}}
    traces = [row.tobytes() for row in np.asarray(both[0].keys)]
    assert files_with(tmp_path, both[0].document.text.encode(), *traces) == set()
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME) as store:
        assert all_entries(store) == all_entries(snapshot)


def test_a_purged_document_stays_away_after_a_rollback_and_a_rebuild(tmp_path: Path) -> None:
    publish_store(tmp_path)
    purge(tmp_path, NAME, [SECRET])
    publish_store(tmp_path, salt=7)  # a rebuild of text that still holds it
    assert SECRET not in living(tmp_path).document_ids()


def test_lists_are_trained_anew(tmp_path: Path) -> None:
    """Centroids are means of keys, of purged ones too; here one is exactly a key."""
    n, secret = EXACT_UP_TO + 7_000, 5_000
    keys = np.random.default_rng(0).standard_normal((n, DIM)).astype(np.float16)
    keys[-secret:] = 60  # far from everything: a list of their own
    spec = ivf_spec(64, nprobe=8, train_vectors=n)
    version = publish_store(tmp_path, keys=keys, sizes=(n - secret - 500, 500, secret), cuts=(), spec=spec)

    def centroids(version: str) -> np.ndarray:  # type: ignore[type-arg]
        path = layout.version_folder(tmp_path, NAME, version) / layout.TRAINED
        index = faiss.read_index(str(path))
        return faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)  # type: ignore[no-any-return]

    assert (centroids(version) == 60).all(axis=1).any()
    report = purge(tmp_path, NAME, ["doc/2"])
    new = report.versions[version]
    assert new is not None
    assert not (centroids(new) == 60).all(axis=1).any()
    searched = {s.path.rpartition("/")[2]: s for s in report.proof.searches if s.sought == "centroids"}
    assert searched.keys() == {"trained.faiss", "index.faiss"}


def test_unfinished_builds_are_discarded(tmp_path: Path) -> None:
    version = publish_store(tmp_path)
    for name in ("0123456789abcdef.tmp", "plan.tmp"):
        shutil.copytree(layout.version_folder(tmp_path, NAME, version), tmp_path / NAME / name)
    purge(tmp_path, NAME, [SECRET])
    assert not list((tmp_path / NAME).glob("*.tmp"))


def test_an_old_version_that_would_be_empty_is_removed_and_the_current_one_is_refused(tmp_path: Path) -> None:
    old = publish_store(tmp_path, keys=random_keys(20, DIM), sizes=(20,), cuts=(), salt=1, held_out=())
    publish_store(tmp_path)
    report = purge(tmp_path, NAME, ["doc/0"])
    assert report.versions[old] is None
    assert len(layout.published_versions(tmp_path, NAME)) == 1
    assert len(read_history(tmp_path, NAME)) == 1
    before = everything(tmp_path)
    with pytest.raises(DatastoreConflict, match="no entry but those of the documents"):
        purge(tmp_path, NAME, [f"doc/{number}" for number in range(1, 6)])
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("ids", "error"), [(["absent"], DocumentNotFound), ([], InvalidParameter), (["doc/1", "doc/1"], InvalidParameter)]
)
def test_what_cannot_be_purged_is_refused_and_nothing_changes(
    tmp_path: Path, ids: list[str], error: type[Exception]
) -> None:
    publish_store(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(error):
        purge(tmp_path, NAME, ids)
    after = everything(tmp_path)
    after.pop("build.lock", None)
    assert after == before


def test_purging_again_is_fine(tmp_path: Path) -> None:
    publish_store(tmp_path)
    forget(tmp_path, SECRET)
    first = purge(tmp_path, NAME, [SECRET])
    assert first.revision == 1  # it was deleted already
    again = purge(tmp_path, NAME, [SECRET])
    assert (again.versions, again.removed, again.sought["keys"]) == ({}, (), 0)


Plant = Callable[[Path, Path], Path]


def _stray_keys(home: Path, old: Path) -> Path:
    keys = (old / "shard-00001" / layout.KEYS).read_bytes()
    path = home / "backup.bin"
    path.write_bytes(b"x" * 4_194_301 + keys)  # across a block, at an odd offset
    return path


def _stray_text(home: Path, old: Path) -> Path:
    path = home / "notes.txt"
    path.write_text("note: " + document(3, SIZES[3]).text)
    return path


def _stray_json(home: Path, old: Path) -> Path:
    path = home / "calibrations" / "list.json"
    path.write_text(json.dumps([SECRET]))
    return path


def _stray_table(home: Path, old: Path) -> Path:
    (home / "old").mkdir()
    return Path(shutil.copy(old / layout.DOCUMENTS, home / "old" / layout.DOCUMENTS))


def _stray_gzip(home: Path, old: Path) -> Path:
    path = home / "export.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"id": "other", "text": document(3, SIZES[3]).text}))
    return path


@pytest.mark.parametrize("plant", [_stray_keys, _stray_text, _stray_json, _stray_table, _stray_gzip])
def test_a_leftover_in_any_file_is_found_and_the_purge_can_be_completed(tmp_path: Path, plant: Plant) -> None:
    version = publish_store(tmp_path)
    planted = plant(tmp_path / NAME, layout.version_folder(tmp_path, NAME, version))
    with pytest.raises(VerifyFailed, match=planted.name):
        purge(tmp_path, NAME, [SECRET])
    assert SECRET not in living(tmp_path).document_ids()
    assert version in layout.published_versions(tmp_path, NAME)
    planted.unlink()
    report = purge(tmp_path, NAME, [SECRET])
    assert report.sought["keys"] > 0
    assert version not in layout.published_versions(tmp_path, NAME)


def _patch_bytes(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("file", [layout.KEYS, layout.INDEX, layout.VALUES, layout.DOCUMENTS, layout.TRAINED])
def test_a_leftover_inside_a_rewritten_version_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """As if rewriting had a defect: what it made is changed before the proof looks at it; sizes stay the same."""
    many = EXACT_UP_TO if file == layout.TRAINED else 500  # a version of few entries has no lists
    keys = random_keys(many + 400, DIM, 1)
    spec = ivf_spec(16, nprobe=16, train_vectors=many) if file == layout.TRAINED else None
    publish_store(tmp_path, keys=keys, sizes=(many, 380, 20), cuts=(), spec=spec)
    real = purge_module.prove

    def prove_after_planting(root: Path, name: str, *rest: object) -> object:
        folder = layout.version_folder(root, name, layout.read_current(root, name).version)
        shard = folder / "shard-00000"
        if file in {layout.KEYS, layout.INDEX}:
            _patch_bytes(shard / file, keys[7].tobytes(), keys[-15].tobytes())
        elif file == layout.VALUES:
            values = np.arange(many + 380, many + 400).astype(np.int32) % 500
            content = bytearray((shard / file).read_bytes())
            at = content.find((np.arange(40).astype(np.int32) % 500).tobytes())
            content[at : at + 80] = values.tobytes()
            (shard / file).write_bytes(bytes(content))
        elif file == layout.TRAINED:
            index = faiss.read_index(str(folder / file))
            centroid = faiss.downcast_index(index.quantizer).reconstruct_n(0, 1)
            _patch_bytes(folder / file, centroid.tobytes(), keys[-15].astype(np.float32).tobytes())
        else:
            read = "knnlm_core.datastore.maintenance.purge_proof.read_documents"
            monkeypatch.setattr(read, lambda path: [document(2, 20)])
        return real(root, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(purge_module, "prove", prove_after_planting)
    with pytest.raises(VerifyFailed, match=file):
        purge(tmp_path, NAME, ["doc/2"])


def test_search_results_of_what_stays_do_not_change(tmp_path: Path) -> None:
    publish_store(tmp_path)
    forget(tmp_path, SECRET)
    before = living(tmp_path).search(queries(), 30)
    purge(tmp_path, NAME, [SECRET])
    after = living(tmp_path).search(queries(), 30)
    assert torch.equal(before.distances, after.distances)
    assert torch.equal(before.values, after.values)
    assert read_ledger(tmp_path, NAME).is_deleted(SECRET)
