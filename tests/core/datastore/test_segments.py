"""Segments of the tail: what is learned is read back bit for bit, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_segments import CONTEXT, DIM, LM, NAME, new_document, tail_folders, teach

from knnlm_core.datastore.arrays import ValueColumns, write_values
from knnlm_core.datastore.checksums import hash_file
from knnlm_core.datastore.documents import Document, DocumentsWriter
from knnlm_core.datastore.ledger import LedgerState, SegmentRecord, ledger_lock, read_ledger
from knnlm_core.datastore.manifest import FileRecord
from knnlm_core.datastore.segments import NewDocument, Segment, SegmentManifest, open_segment, write_segment
from knnlm_core.errors import (
    BuildError,
    DatastoreConflict,
    DatastoreCorrupt,
    DatastoreMismatch,
    InvalidParameter,
    KnnlmError,
)
from knnlm_core.types import EntryRange

ARRAYS = ("keys.arrow", "values.arrow")
FILES = (*ARRAYS, "documents.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / NAME).mkdir()
    return tmp_path


def write(root: Path, *documents: NewDocument, revision: int = 1) -> SegmentRecord:
    return write_segment(root, NAME, revision, LM, CONTEXT, documents)


def reopen(root: Path, record: SegmentRecord, *, checksums: bool = False) -> Segment:
    return open_segment(root, NAME, record, checksums=checksums)


def folder_of(root: Path, revision: int = 1) -> Path:
    return root / NAME / "tail" / f"{revision:016d}"


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), as_tensors=st.booleans())
def test_what_was_written_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], as_tensors: bool
) -> None:
    root = tmp_path_factory.mktemp("root")
    (root / NAME).mkdir()
    documents = [new_document(f"doc/{at}", size, seed=at) for at, size in enumerate(sizes)]
    given_documents = documents
    if as_tensors:
        given_documents = [
            NewDocument(new.document, torch.from_numpy(new.keys).float(), *map(torch.from_numpy, new[2:]))
            for new in documents
        ]
    record = write(root, *given_documents, revision=12)
    assert record[:3] == (12, sum(sizes), len(sizes))
    with reopen(root, record, checksums=True) as segment:
        assert (segment.revision, segment.entries, segment.dim) == (12, sum(sizes), DIM)
        assert (segment.manifest.lm, segment.manifest.context) == (LM, CONTEXT)
        assert segment.keys.dtype == np.float16
        assert segment.keys.shape == (sum(sizes), DIM)
        assert np.array_equal(segment.keys, np.concatenate([new.keys for new in documents]))
        assert np.array_equal(segment.columns.values, np.concatenate([new.values for new in documents]))
        spans = np.stack([segment.columns.char_starts, segment.columns.char_ends], axis=1)
        assert np.array_equal(spans, np.concatenate([new.char_spans for new in documents]))
        assert segment.documents.ids() == [new.document.id for new in documents]
        first = 0
        for new, size in zip(documents, sizes, strict=True):
            assert segment.documents.document(new.document.id) == new.document
            assert segment.documents.entries_of(new.document.id) == EntryRange(first, first + size)
            first += size
        assert segment.num_bytes == sum((segment.folder / file).stat().st_size for file in segment.manifest.files)


def test_keys_are_mapped_and_not_loaded(root: Path) -> None:
    with reopen(root, write(root, new_document("a", 5))) as segment:
        maps = Path("/proc/self/maps").read_text()
        assert all(str(folder_of(root) / file) in maps for file in ARRAYS)
        with pytest.raises(ValueError, match="read-only"):
            segment.keys[0] = 0


def test_a_segment_without_entries_has_documents_and_no_arrays(root: Path) -> None:
    record = write(root, new_document("one token", 0), new_document("another", 0))
    assert sorted(os.listdir(folder_of(root))) == ["documents.parquet", "segment.json"]
    with reopen(root, record, checksums=True) as segment:
        assert segment.keys.shape == (0, DIM)
        assert [len(column) for column in segment.columns] == [0, 0, 0]
        assert segment.documents.document("one token").text == "ab"
        assert segment.documents.entries_of("another") == EntryRange(0, 0)


def test_learning_again_kills_what_was_learned_before(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        teach(writer, new_document("a", 2), new_document("b", 2))
        state = teach(writer, new_document("a", 0, seed=1))
    assert [state.killed_before(id_) <= 1 for id_ in ("a", "b")] == [False, True]
    assert [record.revision for record in state.segments] == [1, 2]
    with reopen(root, state.segments[1]) as segment:
        assert segment.documents.document("a").uri == "https://example.org/1"


def bad(**changes: Any) -> NewDocument:
    return new_document("a", 3)._replace(**changes)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (bad(keys=np.full((3, DIM), np.nan)), "holds NaN or infinity"),
        (bad(keys=np.full((3, DIM), 1e6)), "float16 holds at most 65504"),
        (bad(keys=np.ones((3, DIM + 1))), "must have the shapes"),
        (bad(keys=np.ones((2, DIM))), "must have the shapes"),
        (bad(values=np.ones(0, dtype=np.int64)), "must have the shapes"),
        (bad(values=np.array([1, 2, LM.vocab_size])), "'a': values must be in 0 … 511, got 512"),
        (bad(values=np.array([1, 2, -1])), "must be in 0 … 2³¹ − 1"),
        (bad(values=np.array([1.0, 2.0, 3.0])), "must be integers"),
        (bad(char_spans=np.array([[2, 1]] * 3)), "start ≤ end"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(root: Path, document: NewDocument, message: str) -> None:
    with ledger_lock(root, NAME) as writer:
        with pytest.raises(BuildError, match=message):
            teach(writer, new_document("good", 2), document)
        assert tail_folders(root) == []
        assert teach(writer, new_document("good", 2)).revision == 1


def test_keys_without_values_are_not_dropped_where_nothing_else_has_entries(root: Path) -> None:
    with pytest.raises(BuildError, match="must have the shapes"):
        write(root, bad(values=np.ones(0, dtype=np.int64)))
    assert tail_folders(root) == []


def test_a_segment_json_that_nobody_could_read_is_not_written(root: Path) -> None:
    nothing = new_document("", 0)
    documents = [nothing._replace(document=Document(f"{at:04096d}", "")) for at in range(1_050)]
    with pytest.raises(InvalidParameter, match=r"at most 4194304 bytes of segment\.json, 1050 need 43"):
        write(root, *documents)
    assert tail_folders(root) == []
    with reopen(root, write(root, *documents[:1_000])) as segment:
        assert len(segment.documents) == 1_000


def test_two_documents_of_one_id_and_no_document_at_all_are_refused(root: Path) -> None:
    for documents in ([], [new_document("a", 1), new_document("a", 2)]):
        with pytest.raises(InvalidParameter, match="`documents` must hold"):
            write(root, *documents)
    assert tail_folders(root) == []


def test_a_segment_is_never_replaced_but_an_unfinished_one_is(root: Path) -> None:
    unfinished = folder_of(root).with_name("0000000000000001.tmp")
    unfinished.mkdir(parents=True)
    (unfinished / "keys.arrow.part").write_bytes(b"half")
    record = write(root, new_document("a", 2))
    with pytest.raises(DatastoreConflict, match="0000000000000001 exists already"):
        write(root, new_document("b", 2))
    with reopen(root, record, checksums=True) as segment:
        assert segment.documents.ids() == ["a"]


@pytest.mark.parametrize("file", FILES)
def test_missing_truncated_longer_and_linked_files_are_refused_at_every_open(root: Path, file: str) -> None:
    record = write(root, new_document("a", 4))
    path = folder_of(root) / file
    content = path.read_bytes()
    for other in (b"", content[:-1], content[: len(content) // 2], content + b"\0"):
        path.write_bytes(other)
        with pytest.raises(DatastoreCorrupt, match=f"{file} has {len(other)} bytes, the manifest needs"):
            reopen(root, record)
    path.unlink()
    with pytest.raises(DatastoreCorrupt, match=f"{file} is missing"):
        reopen(root, record)
    (root / "elsewhere").write_bytes(content)
    path.symlink_to(root / "elsewhere")
    with pytest.raises(DatastoreCorrupt, match=f"{file} must be a regular file"):
        reopen(root, record)


def test_a_file_that_segment_json_does_not_name_is_refused(root: Path) -> None:
    record = write(root, new_document("a", 0))
    (folder_of(root) / "keys.arrow").write_bytes(b"")
    with pytest.raises(DatastoreCorrupt, match=r"keys\.arrow is not in the manifest"):
        reopen(root, record)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_found_by_checksums(root: Path, file: str) -> None:
    record = write(root, new_document("a", 4))
    path = folder_of(root) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatastoreCorrupt, match=f"{file} has sha256"):
        reopen(root, record, checksums=True)


def test_a_flipped_bit_in_any_byte_and_every_truncation_of_segment_json_is_refused(root: Path) -> None:
    record = write(root, new_document("a", 1))
    path = folder_of(root) / "segment.json"
    content = path.read_bytes()
    variants = [content[:size] for size in range(len(content))] + [content + b" "]
    variants += [content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :] for at in range(len(content))]
    for variant in variants:
        path.write_bytes(variant)
        with pytest.raises((DatastoreCorrupt, DatastoreMismatch), match=r"segment\.json|format_version"):
            reopen(root, record)
    path.write_bytes(content)
    reopen(root, record, checksums=True).close()


def change_segment(root: Path, record: SegmentRecord, change: Callable[[dict[str, Any]], object]) -> SegmentRecord:
    """Change segment.json and let the ledger's record agree with it, as an attacker would."""
    path = folder_of(root) / "segment.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return record._replace(sha256=hash_file(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(revision=2), "segment.json: revision is 2, LEDGER needs 1"),
        (lambda c: c.update(revision=-1), "segment.json: revision"),
        (lambda c: c.update(entries=8), r"entries must be the sum over the documents \(7\), it is 8"),
        (lambda c: c.update(entries=float("nan")), "is not JSON"),
        (lambda c: c["documents"][0].update(entries=-4), "documents.0.entries"),
        (lambda c: c["documents"][0].update(entries=2**63), "documents.0.entries"),
        (lambda c: (c["documents"][0].update(entries=2**62), c.update(entries=2**62 + 3)), "LEDGER needs 7"),
        (lambda c: c["documents"].reverse(), "documents.parquet has 'a', segment.json has not"),
        (lambda c: (c["documents"][0].update(entries=3), c["documents"][1].update(entries=4)), "has 4 entries of doc"),
        (lambda c: c["documents"][1].update(id="a"), "documents has the same id twice"),
        (lambda c: c.update(documents=[]), "documents"),
        (lambda c: c["documents"].pop(), "entries must be the sum"),
        (lambda c: c["files"].pop("keys.arrow"), "files must be documents.parquet, keys.arrow, values.arrow, they are"),
        (lambda c: c["files"].update({"../../CURRENT": c["files"].pop("keys.arrow")}), "files must be"),
        (lambda c: c["files"].update({"/etc/passwd": c["files"]["keys.arrow"]}), "files"),
        (lambda c: c["files"]["keys.arrow"].update(bytes=2**62), "keys.arrow has .* bytes, the manifest needs"),
        (lambda c: c["files"]["keys.arrow"].update(sha256="x"), "files.keys.arrow.sha256"),
        (lambda c: c["lm"].update(key_dim=DIM + 1), "keys.arrow has the columns .*4.* needs .*5"),
        (lambda c: c["lm"].update(key_dim=10**9), "lm.key_dim"),
        (lambda c: c["lm"].update(vocab_size=1), r"values must be in 0 … 0, they are in"),
        (lambda c: c["context"].update(stride=99), "context"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.update(format_version="1"), "format_version must be an integer"),
    ],
)
def test_a_segment_json_that_contradicts_itself_the_files_or_the_ledger_is_refused(
    root: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    record = write(root, new_document("a", 4), new_document("b", 3))
    with pytest.raises(DatastoreCorrupt, match=message):
        reopen(root, change_segment(root, record, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": 8}, "entries is 7, LEDGER needs 8"),
        ({"documents": 1}, "documents is 2, LEDGER needs 1"),
        ({"sha256": "0" * 64}, f"sha256 is .*, LEDGER needs {'0' * 64}"),
        ({"revision": 2}, r"0000000000000002/segment.json is missing; LEDGER lists it"),
    ],
)
def test_a_segment_that_is_not_the_one_in_the_ledger_is_refused(
    root: Path, change: dict[str, Any], message: str
) -> None:
    record = write(root, new_document("a", 4), new_document("b", 3))
    with pytest.raises(DatastoreCorrupt, match=message):
        reopen(root, record._replace(**change))


def test_the_folder_of_another_revision_is_not_taken_for_it(root: Path) -> None:
    first, second = write(root, new_document("a", 4)), write(root, new_document("a", 4, seed=1), revision=2)
    shutil.rmtree(folder_of(root))
    folder_of(root, 2).rename(folder_of(root))
    with pytest.raises(DatastoreCorrupt, match="revision is 2, LEDGER needs 1"):
        reopen(root, first)
    with pytest.raises(DatastoreCorrupt, match="is missing"):
        reopen(root, second)


def replace_file(root: Path, record: SegmentRecord, file: str) -> SegmentRecord:
    path = folder_of(root) / file
    size = FileRecord(bytes=path.stat().st_size, sha256=hash_file(path)).model_dump()
    return change_segment(root, record, lambda content: content["files"].update({file: size}))


def test_files_of_another_segment_are_refused_even_where_segment_json_names_them(root: Path) -> None:
    record = write(root, new_document("a", 4))
    column = np.arange(5, dtype=np.int32)
    write_values(folder_of(root) / "values.arrow", ValueColumns(column, column, column))
    with pytest.raises(DatastoreCorrupt, match=r"values\.arrow has 5 entries, the manifest needs 4"):
        reopen(root, replace_file(root, record, "values.arrow"))
    write_values(folder_of(root) / "values.arrow", ValueColumns(-column[:4], column[:4], column[:4]))
    with pytest.raises(DatastoreCorrupt, match=r"values must be in 0 … 511, they are in -3 … 0"):
        reopen(root, replace_file(root, record, "values.arrow"))
    with DocumentsWriter(folder_of(root) / "documents.parquet") as documents:
        documents.add(Document("b", "text"), 4)
    with pytest.raises(DatastoreCorrupt, match=r"documents\.parquet has 'b', segment\.json has not"):
        reopen(root, replace_file(root, record, "documents.parquet"))


def test_a_segment_of_another_format_is_refused_naming_have_and_need(root: Path) -> None:
    record = write(root, new_document("a", 1))
    with pytest.raises(DatastoreMismatch, match="'law' does not fit: format_version is 2, this reader needs 1"):
        reopen(root, change_segment(root, record, lambda content: content.update(format_version=2)))


@pytest.mark.parametrize(
    ("field", "need"),
    [("model_fingerprint", "e" * 32), ("tokenizer_fingerprint", "1" * 32), ("vocab_size", 513), ("key_tap", "other")],
)
def test_a_segment_learned_with_another_lm_is_refused_on_request(root: Path, field: str, need: object) -> None:
    with reopen(root, write(root, new_document("a", 1))) as segment:
        same = segment.manifest.lm.identity()
        segment.require_fits(replace(same, model_name="the same, by another name"))
        with pytest.raises(DatastoreMismatch, match=f"'law' does not fit: {field} is") as caught:
            segment.require_fits(replace(same, **{field: need}))
        assert (caught.value.field, caught.value.have, caught.value.need) == (field, getattr(same, field), need)


def test_refusing_a_segment_keeps_no_file_open(root: Path) -> None:
    record = write(root, new_document("a", 4))
    wrong = change_segment(root, record, lambda content: content["lm"].update(vocab_size=1))
    before, refusals = os.listdir("/proc/self/fd"), []
    for _ in range(3):
        with pytest.raises(KnnlmError) as caught:
            reopen(root, wrong)
        refusals.append(caught.value)  # whose traceback holds whatever was not closed
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_is_on_the_disk_does_not_depend_on_when_it_was_written(root: Path) -> None:
    first = write(root, new_document("a", 4), new_document("b", 0))
    kept = (folder_of(root) / "segment.json").read_bytes()
    shutil.rmtree(folder_of(root))
    assert write(root, new_document("a", 4), new_document("b", 0)) == first
    assert (folder_of(root) / "segment.json").read_bytes() == kept
    assert SegmentManifest.read(folder_of(root) / "segment.json", NAME).documents[1].entries == 0


def test_a_segment_on_the_disk_is_nothing_until_the_ledger_lists_it(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        record = write(root, new_document("a", 4), revision=writer.next_revision)
        assert read_ledger(root, NAME) == LedgerState()
        writer.add(record, ["a"])
        assert read_ledger(root, NAME).segments == (record,)
