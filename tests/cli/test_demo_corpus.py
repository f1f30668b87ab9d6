"""The demo's corpus: real text that every machine has, with nothing told twice."""

from __future__ import annotations

import json
from pathlib import Path

from knnlm_cli.demo_corpus import LICENCE, MIN_REPEAT, distinct_documents, write_python_reference


def test_every_line_has_the_fields_that_the_builder_reads(tmp_path: Path) -> None:
    path = write_python_reference(tmp_path / "corpus" / "reference.jsonl")
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(document.keys() == {"id", "text", "title", "licence", "uri"} for document in documents)
    assert all(all(document.values()) for document in documents)
    assert {document["licence"] for document in documents} == {LICENCE}
    assert len({document["id"] for document in documents}) == len(documents)
    assert len(documents) > 50
    assert sum(len(document["text"]) for document in documents) > 200_000


def test_writing_twice_gives_the_same_bytes_and_no_other_file(tmp_path: Path) -> None:
    path = write_python_reference(tmp_path / "reference.jsonl")
    first = path.read_bytes()
    write_python_reference(path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_no_paragraph_of_length_stands_in_two_documents(tmp_path: Path) -> None:
    path = write_python_reference(tmp_path / "reference.jsonl")
    seen: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        for paragraph in document["text"].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= MIN_REPEAT:
                assert seen.setdefault(words, document["id"]) == document["id"], words
    assert seen


def test_a_topic_told_by_a_shorter_one_is_left_out_and_only_that() -> None:
    told = "The with statement wraps a block in a context manager. " * 5
    own = "A compound statement holds other statements in its suites. " * 5
    topics = {
        "compound": f"Compound statements\n\n{own}\n\n{told}\n\n{own} More of it.",
        "with": f'The "with" statement\n\n{told}',
        "with-again": f"The same, longer\n\n{told}\n\nFor example:",
    }
    documents = {document["uri"]: document for document in distinct_documents(topics)}
    assert documents.keys() == {"pydoc:compound", "pydoc:with"}
    assert documents["pydoc:with"]["title"] == "The with statement"
    assert documents["pydoc:with"]["text"] == f'The "with" statement\n\n{told}\n'
    assert documents["pydoc:compound"]["text"] == f"Compound statements\n\n{own}\n\n{own} More of it.\n"
