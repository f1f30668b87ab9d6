"""Compaction: a new version that finds what the old one and its tail found together, and nothing that was deleted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from maintained_store import (
    ALIVE,
    DIM,
    HELD_OUT,
    NAME,
    SIZES,
    all_entries,
    change_a_lot,
    forget,
    living,
    new_document,
    places,
    publish_store,
    queries,
    teach,
)
from small_store import random_keys

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.canaries import canaries_of, self_test
from knnlm_core.datastore.index import EXACT_UP_TO, ivf_spec
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.manifest import version_of
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreBusy, DatastoreConflict, DatastoreCorrupt, DatastoreMismatch, DatastoreNotFound

IVF = ivf_spec(3, nprobe=2, train_vectors=120)


def test_a_compacted_version_finds_what_version_and_tail_found_together(tmp_path: Path) -> None:
    old = publish_store(tmp_path)
    change_a_lot(tmp_path)
    asked = queries()
    with living(tmp_path).datastore:
        before = living(tmp_path)
        assert before.document_ids() == ALIVE
        found, exact = before.search(asked, 20), before.search_exact(asked, 20)
        needed = places(before, found.entry_ids)
        entries, texts = all_entries(before), [before.document(document_id) for document_id in ALIVE]

    new = compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME, checksums=True) as after:
        assert after.version == new != old
        assert after.document_ids() == ALIVE
        assert all_entries(after) == entries
        assert [after.document(document_id) for document_id in ALIVE] == texts
        for search, needs in ((after.search, found), (after.search_exact, exact)):
            has = search(asked, 20)
            assert torch.equal(has.distances, needs.distances)
            assert torch.equal(has.values, needs.values)
            assert places(after, has.entry_ids) == needed
    # The tail is folded in: a living snapshot adds nothing to the version.
    snapshot = living(tmp_path)
    assert (snapshot.learned_entries, snapshot.counts.documents) == (0, len(ALIVE))
    assert snapshot.document_ids() == ALIVE


def test_the_new_version_says_what_it_was_made_from(tmp_path: Path) -> None:
    old = publish_store(tmp_path)
    change_a_lot(tmp_path)
    before = Datastore.open(tmp_path, NAME)
    new = compact(tmp_path, NAME, actor="test")
    with before, Datastore.open(tmp_path, NAME) as after:
        manifest = after.manifest
        assert (manifest.parent_version, manifest.revision) == (old, 8)
        assert manifest.build["compacted_from"] == old
        assert version_of(manifest.build) == new
        assert [shard.entries for shard in manifest.shards] == [60, 60, 1]  # the old ones had 60, 60 and 30
        assert (manifest.quality["helps"], manifest.quality["recall_queries_from"]) == (True, "canaries")
        assert manifest.quality["recall_at_32"] == manifest.quality["self_recall"] == 1.0
        assert "recall_at_k" not in manifest.quality  # nobody measured it for this version
        assert [d.id for d in after.held_out_documents()] == [d.id for d in HELD_OUT]
        canaries = canaries_of(after)
        assert canaries is not None
        assert len(canaries.queries) == 12
        exact = after.search_exact(canaries.queries, 32)
        assert torch.equal(canaries.entry_ids, exact.entry_ids)
        assert torch.equal(canaries.distances, exact.distances)
        assert self_test(after).recall_at_32 == 1.0
        assert before.calibration is not None
        assert after.calibration is not None
        assert after.calibration.protocol == {**before.calibration.protocol, "copied_from": before.calibration.id}
        same = {"id": before.calibration.id, "datastore_version": old, "protocol": before.calibration.protocol}
        assert after.calibration.model_copy(update=same) == before.calibration
    audit = (tmp_path / NAME / layout.AUDIT).read_text(encoding="utf-8").splitlines()
    assert '"compact"' in audit[-1]
    assert '"test"' in audit[-1]


def test_what_is_compacted_to_is_a_hash_of_what_went_in(tmp_path: Path) -> None:
    for root in (tmp_path / "a", tmp_path / "b"):
        publish_store(root)
        change_a_lot(root)
    assert compact(tmp_path / "a", NAME) == compact(tmp_path / "b", NAME)


def test_nothing_to_fold_changes_nothing(tmp_path: Path) -> None:
    version = publish_store(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    assert compact(tmp_path, NAME) == version
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != layout.BUILD_LOCK] == files
    teach(tmp_path, new_document("new", 5, 1))
    forget(tmp_path, "new")
    assert compact(tmp_path, NAME) == version  # it came and went: the version says the same
    teach(tmp_path, new_document("new", 5, 1))
    newer = compact(tmp_path, NAME)
    assert newer != version
    assert compact(tmp_path, NAME) == newer


def test_what_happens_during_a_compaction_is_not_lost(tmp_path: Path) -> None:
    publish_store(tmp_path)
    change_a_lot(tmp_path)
    changed = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "copy documents" and not changed:
            changed.append(forget(tmp_path, "doc/5", "new/c"))
            changed.append(teach(tmp_path, new_document("new/during", 6, 30), new_document("doc/2", 4, 31)))

    compact(tmp_path, NAME, progress=progress)
    assert changed == [9, 10]
    with Datastore.open(tmp_path, NAME) as store:
        assert store.document_ids() == ALIVE  # as of the beginning
        assert store.manifest.revision == 8
    alive = ["doc/1", "doc/4", "new/empty", "doc/3", "new/a", "new/during", "doc/2"]
    assert living(tmp_path).document_ids() == alive
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME) as store:
        assert store.document_ids() == alive


def test_deleted_documents_do_not_come_back_by_going_back(tmp_path: Path) -> None:
    old = publish_store(tmp_path)
    change_a_lot(tmp_path)
    compact(tmp_path, NAME)
    back = living(tmp_path, old)
    assert back.document_ids() == ALIVE  # the old version with the tail beside it
    forget(tmp_path, "doc/1")
    for version in layout.published_versions(tmp_path, NAME):
        assert living(tmp_path, version).document_ids() == ALIVE[1:]


def test_the_held_out_text_of_a_deleted_document_goes_with_it(tmp_path: Path) -> None:
    publish_store(tmp_path)
    forget(tmp_path, "doc/2")
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME) as store:
        assert [document.id for document in store.held_out_documents()] == ["held/1"]
        canaries = canaries_of(store)
        assert canaries is not None
        assert set(canaries.documents) == {"held/1"}


def test_a_version_without_held_out_text_is_gated_on_its_own_keys(tmp_path: Path) -> None:
    publish_store(tmp_path, held_out=())
    forget(tmp_path, "doc/2")
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME, checksums=True) as store:
        assert store.manifest.quality["recall_queries_from"] == "stored keys"
        assert not {layout.CANARIES, layout.HELD_OUT} & store.manifest.files.keys()


@pytest.mark.parametrize("deleted", [("doc/4",), ("doc/0", "doc/3")])
def test_lists_are_kept_while_the_size_is_about_the_same(tmp_path: Path, deleted: tuple[str, ...]) -> None:
    old = publish_store(tmp_path, spec=IVF)
    forget(tmp_path, *deleted)
    new = compact(tmp_path, NAME)
    left = sum(SIZES) - sum(SIZES[int(document_id[-1])] for document_id in deleted)
    trained = [layout.version_folder(tmp_path, NAME, version) / layout.TRAINED for version in (old, new)]
    with Datastore.open(tmp_path, NAME, checksums=True) as store:
        assert store.entries == left
        spec = store.manifest.index
        if left >= 0.8 * sum(SIZES):
            assert trained[0].read_bytes() == trained[1].read_bytes()
            assert spec.nlist == 3
            assert store.manifest.build["trained_entries"] == sum(SIZES)
        else:
            assert not trained[1].exists()
            assert spec.family == "SQfp16"
        exact = store.search_exact(queries(), 32)
        found = store.search(queries(), 32, nprobe=spec.nlist or None)
        assert torch.equal(found.entry_ids, exact.entry_ids)


def test_the_size_that_lists_are_for_is_remembered_over_many_compactions(tmp_path: Path) -> None:
    publish_store(tmp_path, spec=IVF)
    for document_id in ("doc/4", "doc/2"):  # 130 and 105 of 150 entries are left: each is more than 80 % of the last
        forget(tmp_path, document_id)
        compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME) as store:
        assert store.manifest.index.family == "SQfp16"


def test_nprobe_grows_until_recall_passes(tmp_path: Path) -> None:
    # Queries between the lists: with one list of eight most of their 32 neighbours are missed.
    keys = random_keys(400, DIM, 3)
    publish_store(tmp_path, keys=keys, sizes=(395, 5), cuts=(), spec=ivf_spec(8, nprobe=1, train_vectors=400))
    forget(tmp_path, "doc/1")
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME) as store:
        spec, quality = store.manifest.index, store.manifest.quality
        assert spec.nprobe in {2, 4, 8}
        assert float(quality["recall_at_32"]) >= 0.95
        canaries = canaries_of(store)
        assert canaries is not None
        found = store.search(canaries.queries, 32, nprobe=spec.nprobe // 2)
        assert float((found.distances[:, -1] <= canaries.distances[:, -1]).double().mean()) < 0.95


def test_a_store_that_grew_past_exact_search_gets_lists(tmp_path: Path) -> None:
    first = EXACT_UP_TO - 100
    rng = np.random.default_rng(0)
    publish_store(tmp_path, keys=rng.standard_normal((first, DIM)).astype(np.float16), sizes=(first,), cuts=(30_000,))
    teach(tmp_path, new_document("new", 4_000, 1))
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME, checksums=True) as store:
        assert store.manifest.index.family == "IVF_SQfp16"
        assert [shard.entries for shard in store.manifest.shards] == [30_000, first + 4_000 - 30_000]
        assert float(store.manifest.quality["recall_at_32"]) >= 0.95


def test_shards_have_the_size_that_the_build_was_told(tmp_path: Path) -> None:
    publish_store(tmp_path, shard_entries=50)
    teach(tmp_path, new_document("new", 7, 1))
    compact(tmp_path, NAME)
    with Datastore.open(tmp_path, NAME) as store:
        assert [shard.entries for shard in store.manifest.shards] == [50, 50, 50, 7]
        assert store.manifest.build["shard_entries"] == 50


def test_damage_is_not_given_checksums_of_its_own(tmp_path: Path) -> None:
    version = publish_store(tmp_path)
    revision = teach(tmp_path, new_document("new", 7, 1))
    for folder in (
        layout.version_folder(tmp_path, NAME, version) / "shard-00001",
        layout.segment_folder(tmp_path, NAME, revision),
    ):
        path = folder / layout.KEYS
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(DatastoreCorrupt, match=r"keys\.arrow has sha256"):
            compact(tmp_path, NAME)
        path.write_bytes(whole)
    assert not list((tmp_path / NAME).glob("*.tmp"))
    compact(tmp_path, NAME)


def test_documents_learned_with_another_model_are_refused(tmp_path: Path) -> None:
    publish_store(tmp_path)
    with Datastore.open(tmp_path, NAME) as store:
        lm, context = store.manifest.lm, store.manifest.context
    from knnlm_core.datastore.ledger import ledger_lock
    from knnlm_core.datastore.segments import learn

    with ledger_lock(tmp_path, NAME) as writer:
        learn(writer, lm.model_copy(update={"model_fingerprint": "e" * 32}), context, [new_document("new", 3, 1)])
    with pytest.raises(DatastoreMismatch, match="model_fingerprint"):
        compact(tmp_path, NAME)
    forget(tmp_path, "new")  # what is dead stands in nobody's way
    forget(tmp_path, "doc/1")
    compact(tmp_path, NAME)


def test_nothing_left_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    version = publish_store(tmp_path)
    forget(tmp_path, *(f"doc/{number}" for number in range(len(SIZES))))
    with pytest.raises(DatastoreConflict, match="no entry of version"):
        compact(tmp_path, NAME)
    assert layout.published_versions(tmp_path, NAME) == [version]
    assert not list((tmp_path / NAME).glob("*.tmp"))


def test_a_build_and_a_compaction_exclude_each_other(tmp_path: Path) -> None:
    from knnlm_builder.journal import exclusive
    from knnlm_core.errors import BuildConflict

    publish_store(tmp_path)
    forget(tmp_path, "doc/1")
    with exclusive(tmp_path / NAME), pytest.raises(DatastoreBusy, match="under way"):
        compact(tmp_path, NAME)
    with lock_versions(tmp_path, NAME), pytest.raises(BuildConflict), exclusive(tmp_path / NAME):
        pass
    with pytest.raises(DatastoreNotFound):
        compact(tmp_path, "absent")


def test_an_unfinished_build_survives_a_compaction(tmp_path: Path) -> None:
    publish_store(tmp_path)
    forget(tmp_path, "doc/1")
    unfinished = tmp_path / NAME / "0123456789abcdef.tmp"
    unfinished.mkdir()
    compact(tmp_path, NAME)
    assert unfinished.is_dir()


def test_a_name_that_means_something_else_meanwhile_is_left_alone(tmp_path: Path) -> None:
    old = publish_store(tmp_path, salt=1)
    version = publish_store(tmp_path)
    forget(tmp_path, "doc/1")

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "checksums":
            layout.write_current(tmp_path, NAME, layout.Current(old, None))

    with pytest.raises(DatastoreConflict, match=f"was made to mean version {old} while {version} was compacted"):
        compact(tmp_path, NAME, progress=progress)
    assert layout.read_current(tmp_path, NAME).version == old


def test_progress_names_every_stage_and_reaches_its_end(tmp_path: Path) -> None:
    publish_store(tmp_path, spec=IVF)
    change_a_lot(tmp_path)
    stages: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        assert done >= stages.get(stage, (0, 0))[0]
        stages[stage] = done, total

    compact(tmp_path, NAME, progress=progress)
    assert list(stages) == ["verify", "copy entries", "copy documents", "add to index", "checksums", "recall gate"]
    assert all(done == total > 0 for done, total in stages.values()), stages
    assert not math.isnan(stages["checksums"][0])
    assert read_calibration(tmp_path, NAME, str(layout.read_current(tmp_path, NAME).calibration)).k == 8
