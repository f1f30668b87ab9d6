"""One document of a corpus, and where it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class SourceLocation(NamedTuple):
    """Where a document was read from; for messages, never stored."""

    path: Path
    line: int | None = None  # 1-based, of a jsonl file
    row: int | None = None  # 1-based, of a parquet file

    def __str__(self) -> str:
        if self.line is not None:
            return f"{self.path}, line {self.line}"
        if self.row is not None:
            return f"{self.path}, row {self.row}"
        return str(self.path)


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """A document as the datastore will know it; spans of entries refer to exactly this ``text``.

    Attributes:
        id: unique in the corpus.
        text: newlines are ``\\n``; no NUL, no lone surrogate.
        source: where it was read; two documents that differ only here are equal.
    """

    id: str
    text: str
    source: SourceLocation = field(compare=False)
    uri: str | None = None
    title: str | None = None
    licence: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        """sha256 of id and text, 32 bytes; see `document_digest`."""
        return document_digest(self.id, self.text)


def document_digest(document_id: str, text: str) -> bytes:
    """Identify a document by its content.

    sha256(len(id) ‖ id ‖ len(text) ‖ text), UTF-8, lengths in bytes as 8-byte little-endian integers: without them
    ("ab", "c") and ("a", "bc") would be the same document.
    """
    digest = hashlib.sha256()
    for part in (document_id.encode(), text.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
