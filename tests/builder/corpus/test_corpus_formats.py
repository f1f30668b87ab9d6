"""What each format gives as documents."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm_builder.corpus import CorpusStats, SourceDocument, read_documents
from knnlm_builder.corpus import parquet as parquet_module
from knnlm_core.errors import EmptyCorpus

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"id": IDS, "text": TEXT},
        optional={
            "uri": st.none() | TEXT,
            "title": st.none() | TEXT,
            "licence": st.none() | TEXT,
            "tags": st.none() | st.lists(TEXT, max_size=3),
        },
    ),
    max_size=6,
    unique_by=lambda row: row["id"],
)


def newlines(text: str) -> str:
    return re.sub("\r\n?", "\n", text)


def expected_documents(rows: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (r["id"], newlines(r["text"]), r.get("uri"), r.get("title"), r.get("licence"), tuple(r.get("tags") or ()))
        for r in rows
        if sum(not character.isspace() for character in r["text"]) >= 2
    ]


def fields(document: SourceDocument) -> tuple[Any, ...]:
    return (document.id, document.text, document.uri, document.title, document.licence, document.tags)


def read(*inputs: Path, **options: Any) -> list[SourceDocument]:
    try:
        return list(read_documents(inputs, **options))
    except EmptyCorpus:
        return []


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.parquet"]))
def test_rows_come_back_as_they_were_written(rows: list[dict[str, Any]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if name.endswith(".parquet"):
            types = {name: pa.string() for name in ("id", "text", "uri", "title", "licence")}
            schema = pa.schema({**types, "tags": pa.list_(pa.string())})
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
        else:
            write_jsonl(path, rows)
        stats = CorpusStats()
        documents = read(path, stats=stats)
    expected = expected_documents(rows)
    assert [fields(document) for document in documents] == expected
    assert (stats.documents, stats.blank_documents) == (len(expected), len(rows) - len(expected))
    assert stats.characters == sum(len(document.text) for document in documents)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.booleans(), st.sampled_from(["a.txt", "a.md", "a.markdown", "a.rst", "a.TXT"]))
def test_text_files_come_back_without_byte_order_mark_and_with_plain_newlines(
    text: str, with_mark: bool, name: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(codecs.BOM_UTF8 * with_mark + ("ab" + text).encode())
        (document,) = read(path)
    assert fields(document) == (name, "ab" + newlines(text), None, None, None, ())


def test_only_the_first_byte_order_mark_of_a_file_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 * 2 + b"text")
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + '{"text": "\ufeffone"}\n'.encode())
    assert [document.text for document in read(tmp_path)] == ["\ufefftext", "\ufeffone"]


def test_jsonl_line_numbers_count_blank_lines_and_make_default_ids(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").write_bytes(b'{"text": "first"}\r\n\r\n  \n{"id": null, "text": "fourth"}')
    documents = read(tmp_path)
    assert [document.id for document in documents] == ["sub/rows.jsonl#1", "sub/rows.jsonl#4"]
    assert str(documents[1].source) == f"{tmp_path}/sub/rows.jsonl, line 4"


def test_parquet_rows_without_id_are_numbered_through_all_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["aa", "bb", "cc"]}), path, row_group_size=2)
    documents = read(path)
    assert [document.id for document in documents] == ["rows.parquet#1", "rows.parquet#2", "rows.parquet#3"]
    assert str(documents[2].source) == f"{path}, row 3"


def test_numbers_serve_as_ids(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"id": 7, "text": "seven"}])
    pq.write_table(pa.table({"id": [8], "text": ["eight"]}), tmp_path / "b.parquet")
    assert [document.id for document in read(tmp_path)] == ["7", "8"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_arrow_string_type_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["one", "two"]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [document.text for document in read(tmp_path)] == ["one", "two"]


def test_unknown_fields_are_ignored_and_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one", "license": "MIT"}, {"text": "two", "license": "MIT", "n": 1}])
    pq.write_table(pa.table({"text": ["three", "four"], "n": [1, 2]}), tmp_path / "b.parquet")
    stats = CorpusStats()
    assert len(read(tmp_path, stats=stats)) == 4
    assert stats.fields_ignored == {"license": 2, "n": 2}  # per row of jsonl, per column of Parquet
    assert "fields ignored: license (2), n (2)" in stats.summary()


def test_ignored_field_names_do_not_grow_without_bound(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one", f"field{i}": i} for i in range(200)])
    stats = CorpusStats()
    read(tmp_path, stats=stats)
    assert len(stats.fields_ignored) == 65
    assert stats.fields_ignored["(other)"] == 200 - 64


def test_an_explicit_file_of_unknown_suffix_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("terms")
    (tmp_path / "main.py").write_text("print()")
    documents = read(tmp_path / "main.py", tmp_path / "LICENSE")
    assert [(document.id, document.text) for document in documents] == [("main.py", "print()"), ("LICENSE", "terms")]


def test_html_files_give_visible_text_and_title(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<title>T &amp; U</title>\r\n<p>one\r\ntwo<script>var x;</script><p>three")
    (document,) = read(tmp_path)
    assert (document.id, document.text, document.title) == ("a.html", "one two\n\nthree", "T & U")


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for number in range(1000):
            stream.write(json.dumps({"id": number, "text": f"{number} " * 4000}).encode() + b"\n")
    tracemalloc.start()
    try:
        characters = sum(len(document.text) for document in read_documents([path]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert characters > 15_000_000
    assert peak < 1_500_000


def test_parquet_is_streamed_within_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "_BATCH_BYTES", 1 << 20)
    letters = np.random.default_rng(0).integers(97, 123, size=(2000, 10_000), dtype=np.uint8)
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [row.tobytes().decode() for row in letters]})
    pq.write_table(table, path, row_group_size=2000, use_dictionary=False, write_batch_size=50)
    del table, letters
    before = pa.total_allocated_bytes()
    peak = count = 0
    for _ in read_documents([path]):
        count += 1
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == 2000
    assert peak < 8 << 20  # of 20 MB


def test_a_document_equals_itself_read_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_jsonl(tmp_path / "b.jsonl", [{"id": "a.txt", "text": "text"}])
    (first,), (second,) = read(tmp_path / "a.txt"), read(tmp_path / "b.jsonl")
    assert first == second
    assert first.source != second.source
