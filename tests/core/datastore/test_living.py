"""Learning and deleting beside open versions: every snapshot always equals a plain list of copies."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from small_store import WORD, Plan, open_new, random_keys, reference

from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.index import ivf_spec
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.overlap import longest_matches
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import NewDocument
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreCorrupt, DocumentExists, DocumentNotFound, InvalidParameter

DIM = 3
STEPS = int(os.environ.get("KNNLM_TEST_STEPS", "150"))


def new_document(document_id: str, keys: np.ndarray, first_value: int = 7) -> NewDocument:
    """Its text is one word per token, the first of which makes no entry."""
    n = len(keys)
    starts = (np.arange(n) + 1) * len(WORD)
    spans = np.stack([starts, starts + len(WORD)], axis=1)
    values = first_value + np.arange(n)
    return NewDocument(Document(document_id, WORD * (n + 1), title=f"of {document_id}"), keys, values, spans)


class Copy(NamedTuple):
    """A copy of a document, and the revision at which it was made."""

    document_id: str
    revision: int
    keys: np.ndarray


class Pinned(NamedTuple):
    """A snapshot, and what the version and the tail held when it was taken."""

    snapshot: Snapshot
    copies: list[Copy]


class Livings(RuleBasedStateMachine):
    """One name with a version of three documents; what is learned and deleted is mirrored in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        sizes = (5, 0, 12)
        keys = np.random.default_rng(0).integers(0, 3, (sum(sizes), DIM)).astype(np.float16)
        self.store = open_new(self.root, Plan(keys, cuts=(9,), document_sizes=sizes))
        self.living = LivingName(self.root, "law")
        ends = np.cumsum(sizes)
        self.copies = [
            Copy(f"doc/{i}", 0, keys[end - size : end]) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
        self.killed: dict[str, int] = {}
        self.learned: dict[str, int] = {}  # of them, those whose last operation was to be learned
        self.revision = 0
        self.pinned: list[Pinned] = []
        self.made = 0

    def teardown(self) -> None:
        self.living.close()
        self.store.close()
        self.folder.cleanup()

    def alive(self, copies: list[Copy]) -> set[str]:
        return {copy.document_id for copy in copies if self.killed.get(copy.document_id, 0) <= copy.revision}

    @rule(
        sizes=st.lists(st.integers(0, 6), min_size=1, max_size=3),
        names=st.permutations([f"doc/{i}" for i in range(6)]),
        replace=st.booleans(),
        seed=st.integers(0, 99),
    )
    def add(self, sizes: list[int], names: list[str], replace: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        keys = [rng.integers(0, 3, (size, DIM)).astype(np.float16) for size in sizes]
        documents = [new_document(name, made) for name, made in zip(names, keys, strict=False)]
        known = self.alive(self.copies) & {new.document.id for new in documents}
        into = self.living.snapshot(self.store)
        if known and not replace:
            with pytest.raises(DocumentExists, match="is in datastore 'law' already"):
                self.living.add(documents, into)
            return
        state = self.living.add(documents, into, replace=replace)
        self.revision += 1
        assert state.revision == self.revision
        self.copies = [
            *self.copies,
            *(Copy(new.document.id, self.revision, np.asarray(new.keys)) for new in documents),
        ]
        self.killed |= {new.document.id: self.revision for new in documents}
        self.learned |= {new.document.id: self.revision for new in documents}

    @rule(number=st.integers(0, 6))
    def delete(self, number: int) -> None:
        document_id = f"doc/{number}"
        if document_id not in self.alive(self.copies):
            with pytest.raises(DocumentNotFound, match=f"no document '{document_id}'"):
                self.living.delete([document_id])
            return
        self.living.delete([document_id])
        self.note_deletion(document_id)

    def note_deletion(self, document_id: str) -> None:
        self.revision += 1
        self.killed[document_id] = self.revision
        self.learned.pop(document_id, None)

    @precondition(lambda self: len(self.pinned) < 4)
    @rule()
    def pin(self) -> None:
        self.pinned.append(Pinned(self.living.snapshot(self.store), self.copies))

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.pinned.pop(0)

    @rule()
    def restart(self) -> None:
        self.pinned.clear()
        self.living.close()
        self.store.close()
        self.store = Datastore.open(self.root, "law")
        self.living = LivingName(self.root, "law")
        # What was learned by one request is not read again once all of it is dead.
        self.copies = [copy for copy in self.copies if copy.revision in {0, *self.learned.values()}]

    @rule(number=st.integers(0, 6))
    def another_process_deletes(self, number: int) -> None:
        other = LivingName(self.root, "law")
        with Datastore.open(self.root, "law") as store:
            if f"doc/{number}" in other.snapshot(store).document_ids():
                other.delete([f"doc/{number}"])
                self.note_deletion(f"doc/{number}")
                assert self.living.refresh()
        assert not self.living.refresh()

    @invariant()
    def every_snapshot_is_its_list(self) -> None:
        now = Pinned(self.living.snapshot(self.store), self.copies)
        assert now.snapshot.revision == self.revision
        documents, deleted = len(self.alive(self.copies)), len(self.killed) - len(self.learned)
        assert now.snapshot.counts == (documents, len(self.learned), deleted)
        for snapshot, copies in (now, *self.pinned):
            check(snapshot, copies, self.killed)


def check(snapshot: Snapshot, copies: list[Copy], killed: dict[str, int]) -> None:
    keys = np.concatenate([copy.keys for copy in copies])
    owner = np.repeat(np.arange(len(copies)), [len(copy.keys) for copy in copies])
    dead = [killed.get(copy.document_id, 0) > copy.revision for copy in copies]
    hidden = {i for i in range(len(keys)) if dead[owner[i]]}
    alive = [copy for copy, is_dead in zip(copies, dead, strict=True) if not is_dead]

    assert snapshot.entries == len(keys)
    assert snapshot.document_ids() == [copy.document_id for copy in alive]
    for query in (keys[0] + 1.0, keys[-1] * 0.0):
        k = 5
        for method in (snapshot.search, snapshot.search_exact):
            found = method(torch.from_numpy(query[None].astype(np.float32)), k)
            ids, distances = reference(keys, query[None].astype(np.float32), k, hidden)
            assert found.entry_ids.tolist() == ids.tolist()
            assert found.distances.tolist() == distances.tolist()
    every = torch.arange(len(keys))
    np.testing.assert_array_equal(snapshot.keys(every).numpy(), keys)
    following = snapshot.next_entry(every).tolist()
    for i, place in enumerate(snapshot.locate(every.tolist())):
        copy = copies[owner[i]]
        assert (place is None) == (i in hidden)
        assert place is None or place.document_id == copy.document_id
        is_last = i + 1 == len(keys) or owner[i + 1] != owner[i]
        assert following[i] == (-1 if is_last or i in hidden else i + 1)
    for copy in alive:
        first, stop = snapshot.document_entries(copy.document_id)
        np.testing.assert_array_equal(keys[first:stop], copy.keys)
        assert snapshot.document(copy.document_id).id == copy.document_id
    for document_id in {copy.document_id for copy in copies} - {copy.document_id for copy in alive}:
        with pytest.raises(DocumentNotFound):
            snapshot.document(document_id)
        with pytest.raises(DocumentNotFound):
            snapshot.document_entries(document_id)


def test_snapshots_follow_any_sequence_of_changes() -> None:
    """KNNLM_TEST_STEPS=10000 for a long run."""
    per_example = 50
    profile = settings(
        max_examples=max(1, STEPS // per_example), stateful_step_count=per_example, deadline=None, derandomize=True
    )
    run_state_machine_as_test(Livings, settings=profile)


def test_additions_one_by_one_are_searched_as_one_list(tmp_path: Path) -> None:
    base, learned = random_keys(60, 8), random_keys(70, 8, seed=3)
    with open_new(tmp_path, Plan(base)) as store:
        living = LivingName(tmp_path, "law")
        for i, key in enumerate(learned):
            living.add([new_document(f"learned/{i}", key[None])], living.snapshot(store))
        snapshot = living.snapshot(store)
        assert len(snapshot._parts()) < 1 + 8, "blocks are joined"
        queries = random_keys(5, 8, seed=4).astype(np.float32)
        found = snapshot.search(torch.from_numpy(queries), 40)
        ids, distances = reference(np.concatenate([base, learned]), queries, 40, set())
        np.testing.assert_array_equal(found.entry_ids.numpy(), ids)
        np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-5)


def test_a_deletion_during_a_request_reaches_its_snapshot(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(30, 4), document_sizes=(10, 20))) as store:
        living = LivingName(tmp_path, "law")
        snapshot = living.snapshot(store)
        query = snapshot.keys(torch.tensor([3]))
        assert snapshot.search(query, 1).entry_ids.item() == 3
        living.delete(["doc/0"])
        assert not set(snapshot.search(query, 30).entry_ids.flatten().tolist()) & set(range(10))
        assert snapshot.revision == 0
        assert living.snapshot(store).revision == 1


@pytest.mark.parametrize("where", ["IVF_SQfp16", "SQfp16", "learned"])
def test_none_of_10000_queries_finds_a_deleted_document_that_they_found(tmp_path: Path, where: str) -> None:
    dim, sizes = 16, (2_000, 500, 1_500)
    keys = random_keys(sum(sizes), dim)
    spec = ivf_spec(16, nprobe=4, train_vectors=640) if where == "IVF_SQfp16" else None
    with open_new(tmp_path, Plan(keys, cuts=(2_200,), document_sizes=sizes, spec=spec)) as store:
        living = LivingName(tmp_path, "law")
        if where == "learned":
            living.add([new_document("doc/1", keys[2_000:2_500])], living.snapshot(store), replace=True)
        snapshot = living.snapshot(store)
        first, stop = snapshot.document_entries("doc/1")
        draw = np.random.default_rng(1)
        near = snapshot.keys(torch.arange(first, stop)).numpy()[draw.integers(0, stop - first, 10_000)]
        queries = torch.from_numpy(near + 0.05 * draw.standard_normal(near.shape).astype(np.float32))

        def finds(view: Snapshot, method: str) -> np.ndarray:
            found = getattr(view, method)(queries, 8).entry_ids
            return ((found >= first) & (found < stop)).any(dim=1).numpy()

        for method in ("search", "search_exact"):
            assert finds(snapshot, method).mean() > 0.999
        living.delete(["doc/1"])
        again = Datastore.open(tmp_path, "law")
        views = {
            "pinned": snapshot,
            "new": living.snapshot(store),
            "reopened": LivingName(tmp_path, "law").snapshot(again),
        }
        for view in views.values():
            for method in ("search", "search_exact"):
                assert not finds(view, method).any()
            # One by one, as decoding asks: another path than that of many queries.
            assert not any(
                first <= entry < stop
                for query in queries[:200]
                for entry in view.search(query[None], 8).entry_ids[0].tolist()
            )
            if stop <= view.entries:  # what was learned and deleted is not read again
                assert view.locate(range(first, stop)) == [None] * (stop - first)
                assert set(view.next_entry(torch.arange(first, stop)).tolist()) == {-1}
        again.close()


def test_deleted_text_is_no_overlap(tmp_path: Path) -> None:
    values = np.arange(30)
    with open_new(tmp_path, Plan(random_keys(30, 4), values=values, document_sizes=(10, 20))) as store:
        living = LivingName(tmp_path, "law")
        living.add([new_document("new", random_keys(6, 4), first_value=100)], living.snapshot(store))
        text = np.array([5, 6, 7, 8, 20, 21, 22, 23, 101, 102])
        before = longest_matches(living.snapshot(store), [text])[0].tolist()
        assert before == [1, 2, 2, 4, 1, 2, 2, 4, 1, 2]
        living.delete(["doc/0", "new"])
        assert longest_matches(living.snapshot(store), [text])[0].tolist() == [0, 0, 0, 0, 1, 2, 2, 4, 0, 0]


def test_what_a_segment_claims_wrongly_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    with open_new(tmp_path, Plan(random_keys(30, 4))) as store:
        living = LivingName(tmp_path, "law")
        two = [new_document("a", random_keys(2, 4)), new_document("a", random_keys(2, 4))]
        with pytest.raises(InvalidParameter, match="each id once"):
            living.add(two, living.snapshot(store))
        living.add([new_document("a", random_keys(2, 4))], living.snapshot(store))
        other = LivingName(tmp_path, "law")
        (segment,) = (tmp_path / "law" / "tail").iterdir()
        (segment / "segment.json").write_text("{}")
        with pytest.raises(DatastoreCorrupt):
            other.snapshot(store)
        assert living.snapshot(store).document_ids() == ["doc/0", "a"]
