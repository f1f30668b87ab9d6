"""Files and folders in, documents out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from knnlm_builder.corpus.document import SourceDocument, SourceLocation
from knnlm_builder.corpus.folder import walk_folder
from knnlm_builder.corpus.html_text import read_page
from knnlm_builder.corpus.jsonl import read_gzipped_jsonl, read_jsonl
from knnlm_builder.corpus.parquet import read_parquet
from knnlm_builder.corpus.rows import check_document_id
from knnlm_builder.corpus.source_file import SourceFile
from knnlm_builder.corpus.stats import CorpusStats
from knnlm_core.errors import (
    DuplicateDocument,
    EmptyCorpus,
    InputNotFound,
    InvalidParameter,
    UnreadableInput,
)

DEFAULT_MAX_DOCUMENT_BYTES = 1 << 30
_TWO_VISIBLE = re.compile(r"\S\s*\S")

Reader = Callable[[SourceFile, CorpusStats], Iterator[SourceDocument]]


def read_documents(
    inputs: Sequence[Path],
    *,
    stats: CorpusStats | None = None,
    root_labels: Sequence[str] | None = None,
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
) -> Iterator[SourceDocument]:
    """Stream the documents of files and folders, always in the same order.

    Inputs come in the order given, files of a folder sorted by relative path, rows in file order. Memory holds one
    document (for Parquet one batch) at a time and about 100 bytes per document to find duplicate ids.

    Args:
        inputs: files of any known suffix, other files that are UTF-8 text, and folders, of which all files with a
            known suffix are read.
        stats: filled while the documents are iterated; the caller's, to print.
        root_labels: one per input, put before the ids taken from file names (``v17/index.html``), for folders that
            hold files of the same name.
        max_document_bytes: what a document may take in its file at most; a line, for jsonl.

    Raises at once: InputNotFound; EmptyCorpus for no inputs; InvalidParameter for labels or a limit that cannot be.
    Raises while iterated: UnreadableInput; DuplicateDocument; EmptyCorpus, at the end, when no document had at least
        two characters other than white space (documents without are counted as blank and not passed on).
    """
    roots = _check_roots(inputs, root_labels)
    if max_document_bytes < 1:
        raise InvalidParameter(
            f"`max_document_bytes` must be at least 1, got {max_document_bytes}", param="max_document_bytes"
        )
    return _distinct_documents(roots, CorpusStats() if stats is None else stats, max_document_bytes)


class _Root(NamedTuple):
    path: Path
    label: str  # empty, or ending in a slash


def _check_roots(inputs: Sequence[Path], labels: Sequence[str] | None) -> list[_Root]:
    if not inputs:
        raise EmptyCorpus("nothing to build from: no inputs were given")
    if labels is not None and len(labels) != len(inputs):
        raise InvalidParameter(
            f"`root_labels` must be as many as the inputs, {len(inputs)}, got {len(labels)}", param="root_labels"
        )
    for path in inputs:
        try:
            found = path.exists()
        except OSError as error:
            raise UnreadableInput(f"input {str(path)!r} cannot be read: {error.strerror}") from None
        if not found:
            raise InputNotFound(f"input {str(path)!r} does not exist")
    return [
        _Root(path, f"{label}/" if label else "")
        for path, label in zip(inputs, labels or [""] * len(inputs), strict=True)
    ]


def _distinct_documents(
    roots: Sequence[_Root], stats: CorpusStats, max_document_bytes: int
) -> Iterator[SourceDocument]:
    seen: set[bytes] = set()
    empty = True
    for document in _all_documents(roots, stats, max_document_bytes):
        digest = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
        if digest in seen:
            raise _duplicate(document, _all_documents(roots, CorpusStats(), max_document_bytes))
        seen.add(digest)
        if not _TWO_VISIBLE.search(document.text):
            stats.blank_documents += 1
            continue
        empty = False
        stats.documents += 1
        stats.characters += len(document.text)
        yield document
    if empty:
        looked_at = ", ".join(str(root.path) for root in roots)
        raise EmptyCorpus(f"nothing to build from in {looked_at}: {stats.summary()}")


def _duplicate(second: SourceDocument, again: Iterator[SourceDocument]) -> DuplicateDocument:
    # Only digests were kept, so the first of the two is looked for by reading once more.
    first = next((document.source for document in again if document.id == second.id), None)
    return DuplicateDocument(f"document id {second.id!r} is given twice: in {first} and in {second.source}")


def _all_documents(roots: Sequence[_Root], stats: CorpusStats, max_document_bytes: int) -> Iterator[SourceDocument]:
    for path, label in roots:
        if path.is_dir():
            yield from _read_folder(path, label, stats, max_document_bytes)
        elif path.is_file():
            file = SourceFile(path, label + path.name, max_document_bytes)
            yield from _read_file(_reader_of(path.name) or read_text, file, stats)
        else:
            raise UnreadableInput(f"input {str(path)!r} is neither a file nor a folder")


def _read_folder(folder: Path, label: str, stats: CorpusStats, max_document_bytes: int) -> Iterator[SourceDocument]:
    try:
        for found in walk_folder(folder, stats):
            if reader := _reader_of(found.path.name):
                file = SourceFile(found.path, label + found.relative, max_document_bytes)
                yield from _read_file(reader, file, stats)
            else:
                stats.files_skipped[found.path.suffix.lower() or "(no suffix)"] += 1
    except OSError as error:
        raise UnreadableInput(f"{error.filename or folder} cannot be listed: {error.strerror}") from None


def _read_file(reader: Reader, file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    try:
        check_document_id(file.name)
    except ValueError as error:
        raise UnreadableInput(f"file name {file.name!r} cannot be a document id: {error}") from None
    stats.files_read += 1
    try:
        yield from reader(file, stats)
    except OSError as error:
        problem = os.strerror(error.errno) if error.errno else error  # Arrow's own wording repeats the path
        raise UnreadableInput(f"{file.path} cannot be read: {problem}") from None


def read_text(file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    """Read a file as one document, its text as it stands."""
    yield SourceDocument(file.name, file.read_text(), SourceLocation(file.path))


def read_html(file: SourceFile, stats: CorpusStats) -> Iterator[SourceDocument]:
    """Read a page as one document: its visible text and its title."""
    source = SourceLocation(file.path)
    html = file.read_text()
    with file.naming(source):
        page = read_page(html)
    yield SourceDocument(file.name, page.text, source, title=page.title)


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        ".txt": read_text,
        ".md": read_text,
        ".markdown": read_text,
        ".rst": read_text,
        ".html": read_html,
        ".htm": read_html,
        ".jsonl": read_jsonl,
        ".jsonl.gz": read_gzipped_jsonl,
        ".parquet": read_parquet,
    }
)


def _reader_of(file_name: str) -> Reader | None:
    name = file_name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
