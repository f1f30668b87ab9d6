"""Documents from JSON lines, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from knnlm_builder.corpus.document import SourceDocument, SourceLocation
from knnlm_builder.corpus.rows import parse_row
from knnlm_builder.corpus.source_file import SourceFile
from knnlm_builder.corpus.stats import CorpusStats
from knnlm_builder.corpus.text import decode_text
from knnlm_core.errors import UnreadableInput


class _LineStream(Protocol):
    def readline(self, size: int, /) -> bytes: ...


class _Line(NamedTuple):
    number: int  # 1-based
    offset: int  # of its first byte in the (decompressed) file
    data: bytes


def read_jsonl(file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    """Read one document per line; lines of white space alone are skipped.

    A row without id gets ``<file name>#<line>``.

    Raises: UnreadableInput: naming file, line and, where there is one, the field at fault.
    """
    with file.path.open("rb") as stream:
        yield from _documents(stream, file, stats)


def read_gzipped_jsonl(file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    """Read gzipped JSON lines as `read_jsonl` reads plain ones.

    Raises: UnreadableInput: also for a file that is not gzip, is damaged, or ends early.
    """
    if file.path.stat().st_size == 0:  # which the gzip module takes for a complete file
        raise UnreadableInput(f"{file.path} is not gzip: the file has 0 bytes")
    try:
        with gzip.open(file.path, "rb") as stream:
            yield from _documents(stream, file, stats)
    except EOFError:
        raise UnreadableInput(f"{file.path}: the gzip stream is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableInput(f"{file.path} is not gzip, or damaged: {error}") from None


def _documents(stream: _LineStream, file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    for line in _lines(stream, file):
        source = SourceLocation(file.path, line=line.number)
        values = _parse_line(line, source, file)
        if values is not None:
            yield parse_row(values, default_id=f"{file.name}#{line.number}", source=source, stats=stats)


def _lines(stream: _LineStream, file: SourceFile) -> Iterator[_Line]:
    number = offset = 0
    while data := stream.readline(file.max_document_bytes + 1):
        number += 1
        if len(data) > file.max_document_bytes:
            raise file.too_large(SourceLocation(file.path, line=number))
        yield _Line(number, offset, data)
        offset += len(data)


def _parse_line(line: _Line, source: SourceLocation, file: SourceFile) -> dict[str, Any] | None:
    with file.naming(source):
        text = decode_text(line.data, offset=line.offset).rstrip("\r\n")
    if not text.strip():
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableInput(f"{source}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise UnreadableInput(f"{source}: JSON beyond reason: {error}") from None
    if not isinstance(values, dict):
        raise UnreadableInput(f"{source}: a line must hold a JSON object, got {type(values).__name__}")
    return values
