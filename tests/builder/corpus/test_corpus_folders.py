"""Which files of folders are read, in which order, and what becomes of the others."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm_builder.corpus import CorpusStats, read_documents
from knnlm_core.errors import InvalidParameter

NAME = st.text("aAbé-.0_ ~", min_size=1, max_size=4).filter(lambda name: not name.startswith("."))


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def ids(*inputs: Path, stats: CorpusStats | None = None, root_labels: list[str] | None = None) -> list[str]:
    return [document.id for document in read_documents(inputs, stats=stats, root_labels=root_labels)]


@settings(max_examples=40, deadline=None)
@given(st.sets(st.lists(NAME, min_size=1, max_size=3).map("/".join), min_size=1, max_size=12))
def test_files_come_in_the_order_of_their_whole_relative_paths(stems: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for stem in stems:
            write(root / f"{stem}.txt")
        every_file = [path.relative_to(root).as_posix() for path in root.rglob("*.txt")]
        assert len(every_file) == len(stems)
        assert ids(root) == sorted(every_file)


def test_inputs_come_in_the_order_given(tmp_path: Path) -> None:
    one, two = write(tmp_path / "z" / "one.txt"), write(tmp_path / "a" / "two.txt")
    assert ids(one, two.parent) == ["one.txt", "two.txt"]
    assert ids(two.parent, one) == ["two.txt", "one.txt"]


def test_a_later_file_is_not_opened_before_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    documents = read_documents([tmp_path])
    assert next(documents).id == "a.txt"
    write(tmp_path / "a.txt", "changed")  # no longer looked at
    with pytest.raises(StopIteration):
        next(documents)


def test_files_of_unknown_suffix_are_skipped_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.pdf", "sub/c.PDF", "sub/d.md", "Makefile", "e.txt.gz"):
        write(tmp_path / name)
    stats = CorpusStats()
    assert ids(tmp_path, stats=stats) == ["a.txt", "sub/d.md"]
    assert stats.files_skipped == {".pdf": 2, "(no suffix)": 1, ".gz": 1}
    assert (stats.files_read, stats.documents, stats.characters) == (2, 2, 8)
    assert stats.summary() == ("2 files read, 2 documents (8 characters); skipped: 1 (no suffix), 1 .gz, 2 .pdf")


def test_the_summary_lists_the_ten_commonest_suffixes_and_counts_the_rest(tmp_path: Path) -> None:
    for name in ["a.txt", *(f"b.{number:02}" for number in range(14)), "c.13", ".hidden"]:
        write(tmp_path / name)
    (tmp_path / "link").symlink_to("nowhere")
    stats = CorpusStats()
    ids(tmp_path, stats=stats)
    assert len(stats.files_skipped) == 14
    assert stats.summary() == (
        "1 file read, 1 document (4 characters); skipped: "
        + "".join(f"1 .{number:02}, " for number in range(9))
        + "2 .13, 4 of other kinds, 1 link, 1 hidden"
    )


def test_hidden_files_and_folders_are_skipped_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", ".b.txt", ".git/c.txt", "sub/.d.txt"):
        write(tmp_path / name)
    stats = CorpusStats()
    assert ids(tmp_path, stats=stats) == ["a.txt"]
    assert stats.hidden_skipped == 3


def test_a_hidden_folder_given_by_name_is_read(tmp_path: Path) -> None:
    write(tmp_path / ".notes" / "a.txt")
    assert ids(tmp_path / ".notes") == ["a.txt"]


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    secret = write(tmp_path / "outside" / "secret.txt")
    root = tmp_path / "docs"
    write(root / "a.txt")
    (root / "file.txt").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    (root / "dangling.txt").symlink_to(tmp_path / "nothing")
    # A sibling whose name begins with the root's name is outside, too.
    (root / "sibling.txt").symlink_to(write(tmp_path / "docs2" / "x.txt"))
    stats = CorpusStats()
    assert ids(root, stats=stats) == ["a.txt"]
    assert stats.links_skipped == 4


def test_links_inside_the_folder_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / ".data" / "a.txt")
    (tmp_path / "a.txt").symlink_to(".data/a.txt")  # how mounted config maps and model caches lay out files
    (tmp_path / "copy").symlink_to(".data")
    (tmp_path / ".data" / "up").symlink_to(tmp_path)
    (tmp_path / ".data" / "here").symlink_to(".")
    (tmp_path / "self.txt").symlink_to("self.txt")
    stats = CorpusStats()
    assert ids(tmp_path, stats=stats) == ["a.txt", "copy/a.txt"]
    assert stats.links_skipped == 3


def test_a_folder_that_is_itself_a_link_is_read(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.txt")
    (tmp_path / "link").symlink_to("real")
    assert ids(tmp_path / "link") == ["a.txt"]


def test_pipes_in_a_folder_are_skipped_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    stats = CorpusStats()
    assert ids(tmp_path, stats=stats) == ["a.txt"]
    assert stats.files_skipped == {"(not a regular file)": 1}


def test_root_labels_keep_folders_with_the_same_names_apart(tmp_path: Path) -> None:
    for version in ("16", "17"):
        write(tmp_path / version / "index.txt")
        write(tmp_path / version / "rows.jsonl", f'{{"text": "one"}}\n{{"id": "{version}", "text": "two"}}')
    assert ids(tmp_path / "16", tmp_path / "17" / "index.txt", root_labels=["v16", "v17"]) == [
        *("v16/index.txt", "v16/rows.jsonl#1", "16"),
        "v17/index.txt",
    ]


def test_root_labels_must_match_the_inputs(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"`root_labels` must be as many as the inputs, 1, got 2"):
        read_documents([tmp_path], root_labels=["a", "b"])


def test_folders_may_be_deeper_than_pythons_stack(tmp_path: Path) -> None:
    depth = 300
    write(tmp_path / Path(*["d"] * depth) / "z.txt")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(context=0)) + depth // 2)
    try:
        found = ids(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert found == ["d/" * depth + "z.txt"]
