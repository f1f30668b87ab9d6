"""Every refusal names what is at fault: file, line, field, byte."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from knnlm_builder.corpus import CorpusStats, read_documents
from knnlm_core.errors import DuplicateDocument, EmptyCorpus, InputNotFound, InvalidParameter, UnreadableInput


def refusal(error: type[Exception], *inputs: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        list(read_documents(inputs, **options))
    return str(caught.value)


def jsonl_refusal(tmp_path: Path, line: str | bytes) -> str:
    """Read three lines of which the second is given, and return the message without the part that names it."""
    data = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + data + b'\n{"text": "fine"}\n')
    message = refusal(UnreadableInput, path)
    assert message.startswith(f"{path}, line 2")
    return message.removeprefix(f"{path}, line 2")


def test_a_missing_path_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputNotFound, match=re.escape(f"{tmp_path}/nothing.txt")):
        read_documents([tmp_path, tmp_path / "nothing.txt"])  # not iterated


def test_no_inputs_are_an_empty_corpus() -> None:
    with pytest.raises(EmptyCorpus, match="no inputs"):
        read_documents([])


def test_an_empty_corpus_names_what_was_looked_at(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.pdf").write_text("text")
    (tmp_path / "b.txt").write_text(" \n\t x \u00a0\u2003\n")
    message = refusal(EmptyCorpus, tmp_path / "docs", tmp_path / "b.txt")
    assert f"{tmp_path}/docs, {tmp_path}/b.txt" in message
    assert "1 file read, 0 documents (0 characters); skipped: 1 .pdf, 1 blank document" in message


def test_an_empty_corpus_is_found_in_stats_that_were_used_before(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    stats = CorpusStats(documents=3)
    refusal(EmptyCorpus, tmp_path, stats=stats)
    assert stats.documents == 3


def test_duplicate_ids_name_both_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"id": "b.txt", "text": "two"}\n')
    (tmp_path / "b.txt").write_text("three")
    message = refusal(DuplicateDocument, tmp_path)
    assert message == (f"document id 'b.txt' is given twice: in {tmp_path}/a.jsonl, line 2 and in {tmp_path}/b.txt")


def test_the_same_file_given_twice_is_a_duplicate_even_when_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ")
    assert "'a.txt'" in refusal(DuplicateDocument, path, path)


def test_two_folders_with_the_same_file_name_are_duplicates(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "index.txt").write_text("text")
    message = refusal(DuplicateDocument, tmp_path / "one", tmp_path / "two")
    assert f"in {tmp_path}/one/index.txt and in {tmp_path}/two/index.txt" in message


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"caf\xc3\xa9 \xff\x00", "invalid UTF-8 (0xff) at byte 6"),
        (b"\xef\xbb\xbfabc\x00\xff", "a NUL byte, as binary files have, at byte 6"),
        (b"cut off \xe2\x82", "invalid UTF-8 (0xe2) at byte 8"),
        (b"a surrogate \xed\xa0\x80", "invalid UTF-8 (0xed) at byte 12"),
        ("utf-16".encode("utf-16"), "invalid UTF-8 (0xff) at byte 0"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.unknown"])
def test_a_binary_file_is_refused_with_the_byte_offset(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert refusal(UnreadableInput, path) == f"{path} is not readable as text: {problem}"


def test_invalid_utf8_in_jsonl_names_line_and_byte_of_the_file(tmp_path: Path) -> None:
    message = jsonl_refusal(tmp_path, b'{"text": "\xff"}')
    assert message == " is not readable as text: invalid UTF-8 (0xff) at byte 27"


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    assert jsonl_refusal(tmp_path, '{"text": "a" "b"}') == ", column 14: not valid JSON: Expecting ',' delimiter"
    assert jsonl_refusal(tmp_path, '{"text": "cut').startswith(", column 10: not valid JSON: Unterminated string")


def test_a_byte_order_mark_inside_a_file_is_no_json(tmp_path: Path) -> None:
    assert jsonl_refusal(tmp_path, '\ufeff{"text": "a"}').startswith(", column 1: not valid JSON: Unexpected UTF-8 BOM")


@pytest.mark.parametrize("line", ['{"n": ' + "1" * 5000 + "}", "[" * 100_000], ids=["digits", "nesting"])
def test_json_beyond_reason_is_refused(tmp_path: Path, line: str) -> None:
    assert jsonl_refusal(tmp_path, line).startswith(": JSON beyond reason: ")


@pytest.mark.parametrize(("line", "kind"), [('["text"]', "list"), ('"text"', "str"), ("null", "NoneType")])
def test_a_line_must_hold_an_object(tmp_path: Path, line: str, kind: str) -> None:
    assert jsonl_refusal(tmp_path, line) == f": a line must hold a JSON object, got {kind}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{}", "field `text` is required"),
        ('{"text": null}', "field `text`: Input should be a valid string, got NoneType 'None'"),
        ('{"text": 5}', "field `text`: Input should be a valid string, got int '5'"),
        ('{"text": "ab\\u0000"}', "field `text`: a NUL character at position 2"),
        ('{"text": "a\\ud800b"}', "field `text`: a lone surrogate (U+D800) at position 1"),
        ('{"text": "aa", "title": "\\udfff"}', "field `title`: a lone surrogate (U+DFFF) at position 0"),
        ('{"text": "aa", "uri": "\\u0000"}', "field `uri`: a NUL character at position 0"),
        ('{"text": "aa", "licence": ["MIT"]}', "field `licence`: Input should be a valid string, got list \"['MIT']\""),
        ('{"text": "aa", "tags": "one"}', "field `tags`: Input should be a valid list, got str 'one'"),
        ('{"text": "aa", "tags": ["a", 1]}', "field `tags.1`: Input should be a valid string, got int '1'"),
        ('{"text": "aa", "id": true}', "field `id`: Input should be a valid string, got bool 'True'"),
        ('{"text": "aa", "id": 1.5}', "field `id`: Input should be a valid string, got float '1.5'"),
        ('{"text": "aa", "id": " "}', "field `id`: an id must not be blank"),
        ('{"text": "aa", "id": "a\\nb"}', "field `id`: a control character (U+000A) at position 1"),
        ('{"text": "aa", "id": "\\ud800"}', "field `id`: a lone surrogate (U+D800) at position 0"),
        ('{"text": 1, "uri": 2}', "field `text`: Input should be a valid string, got int '1'; field `uri`: "
         "Input should be a valid string, got int '2'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(tmp_path: Path, line: str, problem: str) -> None:
    assert jsonl_refusal(tmp_path, line) == f": {problem}"


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00!"}')
    assert [document.text for document in read_documents([tmp_path])] == ["\U0001f600!"]


def test_an_id_over_the_limit_names_limit_and_length(tmp_path: Path) -> None:
    problem = jsonl_refusal(tmp_path, '{"text": "aa", "id": "' + "x" * 4097 + '"}')
    assert problem == ": field `id`: an id must have at most 4096 characters, got 4097"


@pytest.mark.parametrize("keep", [0, 5, 40, -9, -1])
def test_a_truncated_gzip_file_is_refused(tmp_path: Path, keep: int) -> None:
    data = gzip.compress(b"".join(b'{"text": "line %d"}\n' % number for number in range(500)))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data[:keep])
    message = refusal(UnreadableInput, path)
    assert message.startswith(str(path))
    assert "gzip" in message


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b'{"text": "not gzip"}\n')
    assert refusal(UnreadableInput, path).startswith(f"{path} is not gzip, or damaged: ")
    data = bytearray(gzip.compress(os.urandom(4000).hex().encode()))
    data[-6] ^= 0xFF  # in the checksum
    path.write_bytes(bytes(data))
    assert refusal(UnreadableInput, path).startswith(f"{path}")


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but no more")
    assert refusal(UnreadableInput, path).startswith(f"{path} is not Parquet, or damaged: ")


def test_a_damaged_parquet_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": ["some text " * 50 + str(number) for number in range(100)]})
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(bytes(data))
    assert refusal(UnreadableInput, path).startswith(f"{path} is not Parquet, or damaged: ")


def test_a_parquet_file_without_text_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    assert refusal(UnreadableInput, path) == f"{path}: column `text` is required, the file has body, n"


# Arrow does not check what it is told to be a string.
INVALID_UTF8 = pa.array([b"fine", b"a\xff"]).view(pa.string())


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        (pa.array(["fine", None]), ": field `text`: Input should be a valid string, got NoneType 'None'"),
        (pa.array(["fine", "a\0"]), ": field `text`: a NUL character at position 1"),
        (
            INVALID_UTF8,
            " is not readable as text: invalid UTF-8 (0xff) at byte 1 of a field",
        ),
    ],
    ids=["null", "nul", "utf8"],
)  # fmt: skip
def test_a_wrong_parquet_row_is_named(tmp_path: Path, column: pa.Array, problem: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert refusal(UnreadableInput, path) == f"{path}, row 2{problem}"


def test_a_parquet_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert refusal(UnreadableInput, path).startswith(f"{path}, row 1: field `text`: Input should be a valid string")


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_document_over_the_limit_is_refused_naming_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    line = b'{"text": "' + b"x" * 100 + b'"}\n'
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": ["xx", "é" * 50]}), path)
    else:
        path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    message = refusal(UnreadableInput, path, max_document_bytes=99)
    assert message.startswith(str(path))
    assert "at most `max_document_bytes` = 99 bytes" in message
    assert len(list(read_documents([path], max_document_bytes=len(line)))) >= 1


def test_a_limit_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="`max_document_bytes` must be at least 1, got 0"):
        read_documents([tmp_path], max_document_bytes=0)


def test_a_pipe_given_by_name_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(UnreadableInput, tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "problem"),
    [(b"line\nbreak.txt", "a control character (U+000A) at position 4"), (b"latin-\xe9.txt", "a lone surrogate")],
)
def test_a_file_name_that_cannot_be_an_id_is_refused(tmp_path: Path, name: bytes, problem: str) -> None:
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text("text")
    message = refusal(UnreadableInput, tmp_path)
    assert problem in message
    message.encode()  # can be printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "a.parquet"):
        path = tmp_path / name
        path.write_text("text")
        path.chmod(0)
        assert refusal(UnreadableInput, path) == f"{path} cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.jsonl.gz", "b.parquet"])
def test_a_file_that_vanishes_while_the_corpus_is_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_text("text")
    documents = read_documents([tmp_path])
    next(documents)
    (tmp_path / name).unlink()
    with pytest.raises(UnreadableInput, match=re.escape(f"{tmp_path}/{name} cannot be read: No such file")):
        next(documents)
