"""What a name has learned and deleted: remembered exactly, changed by one at a time, refused where it is not whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_segments import NAME, new_document, tail_folders, teach

from knnlm_core.datastore import ledger_file
from knnlm_core.datastore.ledger import LedgerState, SegmentRecord, append_audit, ledger_lock, read_ledger
from knnlm_core.errors import (
    DatastoreBusy,
    DatastoreConflict,
    DatastoreCorrupt,
    DatastoreMismatch,
    DatastoreNotFound,
    DatastoreReadOnly,
    InvalidParameter,
)

SHA = "a" * 64


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / NAME).mkdir()
    return tmp_path


def seal(content: dict[str, Any]) -> bytes:
    """LEDGER as docs/datastore-format.md has it, written without the module under test."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}).encode()


def ledger_content() -> dict[str, Any]:
    segments = [
        {"revision": 2, "entries": 5, "documents": 1, "sha256": SHA},
        {"revision": 3, "entries": 0, "documents": 2, "sha256": SHA},
    ]
    learned, deleted = {"a": 3, "ü/1": 2, "folded": 1}, {"b": 4, "../../etc": 5}
    return {"format_version": 1, "revision": 5, "segments": segments, "learned": learned, "deleted": deleted}


def audit_lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / NAME / "audit.jsonl").read_bytes().split(b"\n")[:-1]]


def test_a_name_without_a_ledger_has_learned_and_deleted_nothing(root: Path) -> None:
    for name in (NAME, "absent"):
        state = read_ledger(root, name)
        assert state == LedgerState(0, (), {}, {})
        assert (state.killed_before("a"), state.is_deleted("a")) == (0, False)
    assert os.listdir(root) == [NAME]
    assert os.listdir(root / NAME) == []


def test_adds_and_deletes_take_the_next_revision_and_survive_reopening(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        assert writer.next_revision == 1
        assert teach(writer, new_document("a", 2), new_document("b", 1)).revision == 1
        assert writer.delete(["b", "of the version"]).revision == 2
    with ledger_lock(root, NAME) as writer:
        assert teach(writer, new_document("b", 3)).revision == 3
    state = read_ledger(root, NAME)
    assert [(s.revision, s.entries, s.documents) for s in state.segments] == [(1, 3, 2), (3, 3, 1)]
    assert {id_: state.killed_before(id_) for id_ in ("a", "b", "of the version", "c")} == {
        "a": 1, "b": 3, "of the version": 2, "c": 0
    }  # fmt: skip
    assert [state.is_deleted(id_) for id_ in ("a", "b", "of the version", "c")] == [False, False, True, False]
    assert state.killed == {"a": 1, "b": 3, "of the version": 2}
    assert tail_folders(root) == ["0000000000000001", "0000000000000003"]


def test_a_ledger_written_by_another_program_is_read(root: Path) -> None:
    (root / NAME / "LEDGER").write_bytes(seal(ledger_content()))
    state = read_ledger(root, NAME)
    assert state.revision == 5
    assert state.segments == (SegmentRecord(2, 5, 1, SHA), SegmentRecord(3, 0, 2, SHA))
    assert state.learned == {"a": 3, "ü/1": 2, "folded": 1}
    assert state.deleted == {"b": 4, "../../etc": 5}


def test_the_file_is_what_the_format_says_byte_by_byte(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        writer.delete(["ü", "a"])
    body = '"deleted":{"a":1,"ü":1},"format_version":1,"learned":{},"revision":1,"segments":[]'
    sha256 = hashlib.sha256(f"{{{body}}}".encode()).hexdigest()
    assert (root / NAME / "LEDGER").read_bytes() == f'{{{body},"sha256":"{sha256}"}}\n'.encode()


def test_a_state_cannot_be_changed_behind_the_ledger() -> None:
    deleted = {"a": 1}
    state = LedgerState(1, deleted=deleted)
    deleted["b"] = 1
    assert state.deleted == state.killed == {"a": 1}
    with pytest.raises(TypeError):
        state.deleted["b"] = 1  # type: ignore[index]


IDS = st.lists(st.sampled_from(["a", "b", "c/d", "é", "\u2028", '"', "\\"]), min_size=1, max_size=3, unique=True)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["add", "delete"]), IDS),
    st.tuples(st.sampled_from(["lock again", "drop dead segments"]), st.just([])),
)


@settings(max_examples=40)
@given(st.lists(STEPS, min_size=1, max_size=12))
def test_the_ledger_is_a_plain_list_of_operations(steps: list[tuple[str, list[str]]]) -> None:
    """Against the rule itself: killed_before is the largest revision of the id's operations, the last one counts."""
    done: list[tuple[str, list[str]]] = []
    segments: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / NAME).mkdir()
        lock = ledger_lock(root, NAME)
        writer = lock.__enter__()
        for step, ids in steps:
            if step == "lock again":
                lock.__exit__(None, None, None)
                lock = ledger_lock(root, NAME)
                writer = lock.__enter__()
            elif step == "drop dead segments":
                alive = {writer.state.killed_before(id_) for id_ in writer.state.learned}
                writer.commit(writer.state.without_segments(set(segments) - alive))
                segments = [revision for revision in segments if revision in alive]
            else:
                done.append((step, ids))
                if step == "add":
                    writer.add(SegmentRecord(writer.next_revision, 7, len(ids), SHA), ids)
                    segments.append(len(done))
                else:
                    writer.delete(ids)
            state = read_ledger(root, NAME)
            assert state == writer.state
            assert state.revision == len(done)
            assert [record.revision for record in state.segments] == segments
            for document_id in ("a", "b", "c/d", "é", "\u2028", '"', "\\", "never"):
                touched = [(at, kind) for at, (kind, ids) in enumerate(done, 1) if document_id in ids]
                assert state.killed_before(document_id) == max((at for at, _ in touched), default=0)
                assert state.is_deleted(document_id) == (bool(touched) and touched[-1][1] == "delete")
        lock.__exit__(None, None, None)
        logged = audit_lines(root) if done else []
        assert [(line["revision"], line["operation"], line["documents"]) for line in logged] == [
            (at, kind, ids) for at, (kind, ids) in enumerate(done, 1)
        ]


def test_every_flipped_bit_is_refused_or_changes_nothing(root: Path) -> None:
    path = root / NAME / "LEDGER"
    with ledger_lock(root, NAME) as writer:
        teach(writer, new_document("a", 2))
        writer.delete(["b"])
        state = writer.state
    content, harmless, refusals = path.read_bytes(), set[int](), set[str]()
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert read_ledger(root, NAME) == state
                harmless.add(at)
            except (DatastoreCorrupt, DatastoreMismatch) as error:
                refusals.add(error.message)
    assert harmless <= {len(content) - 1}  # another white space at the end
    assert all("LEDGER" in message or "format_version is" in message for message in refusals)


def test_every_truncation_is_refused_but_that_of_the_last_newline(root: Path) -> None:
    path = root / NAME / "LEDGER"
    path.write_bytes(seal(ledger_content()) + b"\n")
    content, state = path.read_bytes(), read_ledger(root, NAME)
    for size in range(len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DatastoreCorrupt, match="LEDGER"):
            read_ledger(root, NAME)
    path.write_bytes(content[:-1])
    assert read_ledger(root, NAME) == state


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = ledger_content()
    change(content)
    return seal(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"format_version":1,"revision":NaN}', "is not JSON"),
        (b'{"format_version":1,"revision":' + b"9" * 100_000 + b"}", "is not JSON"),
        (b'{"format_version":1,"deleted":{"\\ud800":1}}', "is not JSON"),
        (b'{"format_version":1,"revision":2,"revision":1}', "'revision' stands twice"),
        (b"{}", "format_version must be an integer, it is 'None'"),
        (changed(lambda c: c.update(format_version=True)), "format_version must be an integer"),
        (changed(lambda c: c.update(format_version=1.0)), "format_version must be an integer"),
        (changed(lambda c: c.update(revision=-1)), "revision"),
        (changed(lambda c: c.update(revision=10**16)), "revision"),
        (changed(lambda c: c.update(revision=5.0)), "revision"),
        (changed(lambda c: c.update(revision=True)), "revision"),
        (changed(lambda c: c.update(surprise="/etc/passwd")), "surprise"),
        (changed(lambda c: c.pop("learned")), "learned"),
        (changed(lambda c: c["segments"].reverse()), "segments must ascend within 1 … 5, revision 2 follows 3"),
        (changed(lambda c: c["segments"].append(c["segments"][1])), "revision 3 follows 3"),
        (changed(lambda c: c["segments"][1].update(revision=6)), "revision 6 follows 2"),
        (changed(lambda c: c["segments"][0].update(revision=0)), "segments.0.revision"),
        (changed(lambda c: c["segments"][0].update(revision=-2)), "segments.0.revision"),
        (changed(lambda c: c["segments"][0].update(revision="../2")), "segments.0.revision"),
        (changed(lambda c: c["segments"][0].update(revision=10**30)), "segments.0.revision"),
        (changed(lambda c: c["segments"][0].update(entries=2**63)), "segments.0.entries"),
        (changed(lambda c: c["segments"][0].update(entries=-1)), "segments.0.entries"),
        (changed(lambda c: c["segments"][0].update(documents=0)), "segments.0.documents"),
        (changed(lambda c: c["segments"][0].update(sha256="../x")), "segments.0.sha256"),
        (changed(lambda c: c["segments"][0].update(path="/etc/passwd")), "segments.0.path"),
        (changed(lambda c: c.update(segments={"0": 1})), "segments"),
        (changed(lambda c: c["deleted"].update(c=6)), "deleted must have revisions in 1 … 5, it has 4 … 6"),
        (changed(lambda c: c["deleted"].update(c=10**40)), "deleted must have revisions in 1 … 5"),
        (changed(lambda c: c["learned"].update(c=0)), "learned must have revisions in 1 … 5, it has 0 … 3"),
        (changed(lambda c: c["learned"].update(c=-1)), "learned must have revisions in 1 … 5"),
        (changed(lambda c: c["learned"].update(c=2.0)), "'c' must have an integer, it has '2.0'"),
        (changed(lambda c: c["learned"].update(c=True)), "'c' must have an integer, it has 'True'"),
        (changed(lambda c: c["learned"].update(b=1)), "must be learned or deleted, 'b' is both"),
        (changed(lambda c: c["learned"].update({"": 1})), "1 to 4096 characters, one has 0"),
        (changed(lambda c: c["learned"].update({"x" * 5000: 1})), "1 to 4096 characters, one has 5000"),
        (changed(lambda c: c.update(deleted=[["a", 1]])), "must be an object of revisions"),
        (changed(lambda c: c.update(deleted=dict.fromkeys(map(str, range(9_999)), "x"))), "'0' must have an integer"),
        (changed(lambda c: None).replace(b'"b": 4', b'"b": 3'), "LEDGER has the sha256 .*, its content needs"),
        (changed(lambda c: None).replace(b"\\u00fc/1", b"u/1"), "LEDGER has the sha256"),
    ],
)  # fmt: skip
def test_a_hostile_ledger_is_refused_and_nothing_is_changed(root: Path, content: bytes, message: str) -> None:
    (root / NAME / "LEDGER").write_bytes(content)
    (root / NAME / "tail" / "0000000000000009").mkdir(parents=True)
    with pytest.raises(DatastoreCorrupt, match=message) as caught:
        read_ledger(root, NAME)
    assert len(caught.value.message) < 1000
    with pytest.raises(DatastoreCorrupt, match=message), ledger_lock(root, NAME):
        pytest.fail("a corrupt ledger must not be changed")
    assert (root / NAME / "LEDGER").read_bytes() == content
    assert tail_folders(root) == ["0000000000000009"]


def test_a_ledger_of_another_format_is_refused_naming_have_and_need(root: Path) -> None:
    (root / NAME / "LEDGER").write_bytes(changed(lambda c: c.update(format_version=2, future={})))
    with pytest.raises(DatastoreMismatch, match="'law' does not fit: format_version is 2, this reader needs 1"):
        read_ledger(root, NAME)


def test_a_huge_ledger_is_refused_unread(root: Path) -> None:
    with (root / NAME / "LEDGER").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DatastoreCorrupt, match="at most 16777216 bytes, it has 1099511627776"):
        read_ledger(root, NAME)


@pytest.mark.parametrize("make", [Path.mkdir, lambda p: p.symlink_to(p.with_name("other")), os.mkfifo])
def test_a_ledger_that_is_no_regular_file_is_refused(root: Path, make: Callable[[Path], object]) -> None:
    (root / NAME / "other").write_bytes(seal(ledger_content()))
    make(root / NAME / "LEDGER")
    with pytest.raises(DatastoreCorrupt, match="LEDGER must be a regular file"):
        read_ledger(root, NAME)


def test_a_reader_that_meets_the_first_writer_sees_its_ledger(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look_for_traces = ledger_file._trace

    def write_meanwhile(folder: Path) -> Path | None:
        monkeypatch.setattr(ledger_file, "_trace", look_for_traces)
        with ledger_lock(root, NAME) as writer:
            teach(writer, new_document("a", 1))
        return look_for_traces(folder)

    monkeypatch.setattr(ledger_file, "_trace", write_meanwhile)
    assert read_ledger(root, NAME).learned == {"a": 1}


@pytest.mark.parametrize("trace", ["audit.jsonl", "tail/0000000000000001"])
def test_a_lost_ledger_is_not_taken_for_one_that_never_was(root: Path, trace: str) -> None:
    with ledger_lock(root, NAME) as writer:
        teach(writer, new_document("a", 2))
    for file in ("LEDGER", "audit.jsonl" if trace.startswith("tail") else "tail/0000000000000001/segment.json"):
        (root / NAME / file).unlink()
    if trace == "audit.jsonl":
        (root / NAME / "tail/0000000000000001").rename(root / NAME / "moved away")
    with pytest.raises(DatastoreCorrupt, match=f"LEDGER is missing, but .*{trace} shows that there was one"):
        read_ledger(root, NAME)
    with pytest.raises(DatastoreCorrupt, match="LEDGER is missing"), ledger_lock(root, NAME):
        pytest.fail("a lost ledger must not be begun anew")
    assert not (root / NAME / "LEDGER").exists()


def test_an_unfinished_segment_or_a_foreign_file_in_the_tail_is_no_trace_of_a_ledger(root: Path) -> None:
    (root / NAME / "tail" / "0000000000000001.tmp").mkdir(parents=True)
    (root / NAME / "tail" / "notes").write_text("kept")
    assert read_ledger(root, NAME) == LedgerState()
    with ledger_lock(root, NAME) as writer:
        teach(writer, new_document("a", 1))
    assert tail_folders(root) == ["0000000000000001", "notes"]


def test_the_next_writer_removes_what_the_ledger_does_not_list(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        teach(writer, new_document("a", 1))
        teach(writer, new_document("b", 1))
        writer.commit(writer.state.without_segments([1]))  # and then a crash
    (root / NAME / "tail" / "0000000000000003").mkdir()
    (root / NAME / "tail" / "0000000000000003" / "keys.arrow").write_bytes(b"half")
    (root / NAME / "tail" / "0000000000000004.tmp").mkdir()
    (root / NAME / "LEDGER.part").write_bytes(b"half")
    with ledger_lock(root, NAME) as writer:
        assert tail_folders(root) == ["0000000000000002"]
        assert writer.next_revision == 3
        assert writer.state.killed_before("a") == 0  # the versions that hold it speak for themselves
        teach(writer, new_document("c", 1))
    assert tail_folders(root) == ["0000000000000002", "0000000000000003"]


def test_one_writer_at_a_time_and_the_others_are_told(root: Path) -> None:
    with ledger_lock(root, NAME), pytest.raises(DatastoreBusy, match=r"'law' is under way: .* locked for 0\.02 s"):
        ledger_lock(root, NAME, timeout_s=0.02).__enter__()
    with ledger_lock(root, NAME, timeout_s=0):
        pass


def test_a_waiting_writer_gets_the_lock_and_the_newest_state(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        revisions: list[int] = []

        def wait() -> None:
            with ledger_lock(root, NAME) as second:
                revisions.append(second.delete(["b"]).revision)

        thread = threading.Thread(target=wait)
        thread.start()
        writer.delete(["a"])
    thread.join()
    assert revisions == [2]
    assert read_ledger(root, NAME).deleted == {"a": 1, "b": 2}


def test_an_error_in_the_block_gives_the_lock_back_and_leaves_the_writer_useless(root: Path) -> None:
    with pytest.raises(KeyError), ledger_lock(root, NAME) as writer:
        raise KeyError
    with pytest.raises(AssertionError, match="without its lock"):
        writer.delete(["a"])
    with ledger_lock(root, NAME, timeout_s=0) as writer:
        assert writer.state.revision == 0


def test_a_name_that_is_not_there_is_not_made(root: Path) -> None:
    with pytest.raises(DatastoreNotFound, match="no datastore 'medicine'"), ledger_lock(root, "medicine"):
        pytest.fail("there is nothing to lock")
    for use in (read_ledger, lambda *where: ledger_lock(*where).__enter__()):
        with pytest.raises(InvalidParameter, match="`name` of a datastore"):
            use(root, "../law")
    assert os.listdir(root) == [NAME]


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder in which not even root can write")
def test_a_folder_that_cannot_be_written_is_read_only() -> None:
    assert read_ledger(Path("/sys"), "kernel") == LedgerState()
    with pytest.raises(DatastoreReadOnly, match="/sys/kernel cannot be written"), ledger_lock(Path("/sys"), "kernel"):
        pytest.fail("nothing can be learned there")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one id, got none"),
        (["a", "b", "a"], "each id once, got 'a' 2 times"),
        ([""], "1 to 4096 characters, got one of 0"),
        (["x" * 4097], "1 to 4096 characters, got one of 4097"),
        (["a\ud800"], "ids of whole characters, got 'a"),
    ],
)
def test_ids_that_a_ledger_cannot_hold_are_refused_before_anything_is_written(
    root: Path, ids: list[str], message: str
) -> None:
    with ledger_lock(root, NAME) as writer:
        before = sorted(os.listdir(root / NAME))
        with pytest.raises(InvalidParameter, match=message):
            writer.delete(ids)
        with pytest.raises(InvalidParameter, match=message):
            teach(writer, *(new_document(id_, 1) for id_ in ids))
        assert writer.state == LedgerState()
        assert sorted(os.listdir(root / NAME)) == before


def test_revisions_never_go_back_and_are_never_skipped_by_a_segment(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        writer.delete(["a"])
        with pytest.raises(ValueError, match="must not go back from 1, got 0"):
            writer.commit(LedgerState())
        with pytest.raises(ValueError, match="must have revision 2, it has 3"):
            writer.add(SegmentRecord(3, 1, 1, SHA), ["b"])
    assert read_ledger(root, NAME) == LedgerState(1, deleted={"a": 1})


def test_a_ledger_that_nobody_could_read_is_not_written(root: Path) -> None:
    with ledger_lock(root, NAME) as writer:
        state = writer.state
        too_many = {f"{number:04096d}": 1 for number in range(4_200)}
        with pytest.raises(DatastoreConflict, match="must have at most 16777216 bytes, it would have 17"):
            writer.commit(LedgerState(1, deleted=too_many))
        assert writer.state == read_ledger(root, NAME) == state


def test_the_audit_says_who_did_what_and_survives_a_torn_line(root: Path) -> None:
    audit = root / NAME / "audit.jsonl"
    with ledger_lock(root, NAME) as writer:
        teach(writer, new_document("ü", 1), actor="admin")
        whole = audit.read_bytes()
        audit.write_bytes(whole[:-9])  # a crash in the middle of the write
        writer.delete(["ü"], actor="half\udc80")
    append_audit(root, NAME, "rollback", 2, [], None)
    torn, second, third, end = audit.read_bytes().split(b"\n")
    assert torn == whole[:-9]
    assert end == b""
    assert "ü" in second.decode()
    first, second, third = json.loads(whole), json.loads(second), json.loads(third)
    for line, revision, operation, documents, actor in (
        (first, 1, "add", ["ü"], "admin"),
        (second, 2, "delete", ["ü"], "half\udc80"),
        (third, 2, "rollback", [], None),
    ):
        assert line.pop("time").endswith("+00:00")
        assert line == {"revision": revision, "operation": operation, "documents": documents, "actor": actor}


def test_an_audit_line_before_anything_was_learned_does_not_look_like_a_lost_ledger(root: Path) -> None:
    append_audit(root, NAME, "publish", 0, [], "builder")
    assert read_ledger(root, NAME) == LedgerState()
    with ledger_lock(root, NAME) as writer:
        append_audit(root, NAME, "rollback", writer.state.revision, [], None)
    assert [line["operation"] for line in audit_lines(root)] == ["publish", "rollback"]


def test_lines_of_many_threads_stay_whole(root: Path) -> None:
    with ledger_lock(root, NAME):
        pass
    documents = ["x" * 3000] * 10  # larger than a block
    threads = [
        threading.Thread(target=lambda: [append_audit(root, NAME, "purge", 0, documents, None) for _ in range(5)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["documents"] for line in audit_lines(root)] == [documents] * 20
