"""From an entry to the next one, to its document and to its text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import Plan, document, identity, open_new, random_keys

from knnlm_core.datastore.documents import ROW_GROUP_CHARS, Document, DocumentsWriter, DocumentTable, read_documents
from knnlm_core.errors import DatastoreMismatch, DatastoreNotFound, DuplicateDocument, InvalidParameter
from knnlm_core.types import EntryRange, LMIdentity

SIZES = (0, 3, 0, 0, 5, 1, 0)  # documents without entries at both ends and in between


@pytest.fixture
def plan() -> Plan:
    return Plan(random_keys(9, 4), cuts=(2, 6), document_sizes=SIZES, values=np.arange(100, 109))


def test_keys_and_values_come_back_bit_for_bit(tmp_path: Path, plan: Plan) -> None:
    with open_new(tmp_path, plan) as store:
        ids = torch.tensor([[8, 0], [5, 2], [6, 6]])
        assert np.array_equal(store.keys(ids).numpy(), plan.keys[ids.numpy()].astype(np.float32))
        assert store.values(ids).tolist() == [[108, 100], [105, 102], [106, 106]]
        assert store.values(torch.tensor([-1, 3])).tolist() == [-1, 103]


@pytest.mark.parametrize("exclude", [(), (EntryRange(1, 3), EntryRange(7, 8))], ids=["all", "excluded"])
def test_entries_are_looked_up_as_a_search_finds_them(
    tmp_path: Path, plan: Plan, exclude: tuple[EntryRange, ...]
) -> None:
    queries = torch.from_numpy(random_keys(5, 4, seed=3)).float()
    with open_new(tmp_path, plan) as store:
        found = store.search(queries, 9, exclude=exclude)
        shuffled = torch.stack([torch.randperm(9) for _ in range(5)])
        looked_up = store.lookup(queries, shuffled, exclude=exclude)
        assert torch.equal(looked_up.entry_ids, found.entry_ids)
        assert torch.equal(looked_up.values, found.values)
        torch.testing.assert_close(looked_up.distances, found.distances)
        some = store.lookup(queries[:1], torch.tensor([[-1, 5, -1, 0]]), exclude=exclude)
        assert sorted(some.entry_ids[0].tolist()) == [-1, -1, 0, 5]
        assert some.distances[0, 2:].tolist() == [np.inf, np.inf]
        assert store.lookup(queries, torch.empty(5, 0, dtype=torch.int64)).entry_ids.shape == (5, 0)
        with pytest.raises(InvalidParameter, match=r"`entry_ids` must be in -1 … 8, got 9 … 9"):
            store.lookup(queries[:1], torch.tensor([[9]]))


def test_next_entry_crosses_shards_and_stops_at_document_ends(tmp_path: Path, plan: Plan) -> None:
    with open_new(tmp_path, plan) as store:
        # documents 1, 4 and 5 have the entries 0-2, 3-7 and 8; shards begin at 2 and 6
        assert store.next_entry(torch.arange(-1, 9)).tolist() == [-1, 1, 2, -1, 4, 5, 6, 7, -1, -1]
        assert store.next_entry(torch.tensor([[0, 2], [5, 8]])).tolist() == [[1, -1], [6, -1]]
        assert store.next_entry(torch.empty(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("bos", [(), (1,)], ids=["without BOS", "with BOS"])
def test_an_entry_leads_to_its_documents_text(tmp_path: Path, plan: Plan, bos: tuple[int, ...]) -> None:
    plan.bos_token_ids = bos
    with open_new(tmp_path, plan) as store:
        located = store.locate([8, 0, 4, 2])
        assert [place.document_id for place in located] == ["doc/5", "doc/1", "doc/4", "doc/1"]
        assert [place.token_offset for place in located] == [o + (not bos) for o in (0, 0, 1, 2)]
        for place in located:
            number = int(place.document_id[4:])
            text = store.document(place.document_id).text
            assert text[place.char_start : place.char_end] == f"{(number + place.token_offset) % 10}bcdefg "
            assert (place.uri, place.title, place.licence) == (f"https://example.org/{number}", None, "CC0")


def test_documents_come_back_as_they_were_written(tmp_path: Path, plan: Plan) -> None:
    plan.held_out = (Document("held", "out"), Document("held-2", "", tags=("a", "b")))
    with open_new(tmp_path, plan) as store:
        assert store.document_ids() == [f"doc/{n}" for n in range(7)]
        assert [store.document(f"doc/{n}") for n in range(7)] == [document(n, size) for n, size in enumerate(SIZES)]
        assert store.document_entries("doc/4") == EntryRange(3, 8)
        assert store.document_entries("doc/0") == EntryRange(0, 0)
        assert store.document_entries("doc/6") == EntryRange(9, 9)
        assert list(store.held_out_documents()) == list(plan.held_out)
        for lookup in (store.document, store.document_entries):
            with pytest.raises(DatastoreNotFound, match="no document 'doc/7'"):
                lookup("doc/7")


def test_texts_in_different_row_groups_are_found(tmp_path: Path) -> None:
    path = tmp_path / "documents.parquet"
    texts = [str(n) * (ROW_GROUP_CHARS // 2 + n) for n in range(9)]
    with DocumentsWriter(path) as writer:
        for n, text in enumerate(texts):
            assert writer.add(Document(f"{n}", text), 2) == EntryRange(2 * n, 2 * n + 2)
    table = DocumentTable(path, documents=9, entries=18)
    for n in (8, 0, 3, 8, *range(9)):
        assert table.document(f"{n}").text == texts[n]
    table.close()
    assert [found.text for found in read_documents(path)] == texts


def test_an_interrupted_documents_writer_leaves_no_file(tmp_path: Path) -> None:
    def add_twice() -> None:
        with DocumentsWriter(tmp_path / "documents.parquet") as writer:
            writer.add(Document("a", ""), 0)
            writer.add(Document("a", ""), 0)

    with pytest.raises(DuplicateDocument, match="'a'"):
        add_twice()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "e" * 32),
        ("tokenizer_fingerprint", "1" * 32),
        ("vocab_size", 511),
        ("key_tap", "final_hidden"),
        ("key_dim", 5),
    ],
)
def test_another_lm_is_refused_naming_the_field(tmp_path: Path, plan: Plan, field: str, value: object) -> None:
    own = {name: getattr(identity(4), name) for name in identity(4).__slots__}
    with open_new(tmp_path, plan) as store:
        store.require_fits(LMIdentity(**own))
        store.require_fits(LMIdentity(**{**own, "model_name": "the same weights elsewhere"}))
        with pytest.raises(DatastoreMismatch) as caught:
            store.require_fits(LMIdentity(**{**own, field: value}))
        assert (caught.value.field, caught.value.have, caught.value.need) == (field, own[field], value)
        assert all(repr(part) in str(caught.value) for part in (own[field], value))
