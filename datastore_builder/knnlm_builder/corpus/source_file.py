"""One file of a corpus, about to be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from knnlm_builder.corpus.document import SourceLocation
from knnlm_builder.corpus.text import NotText, decode_text
from knnlm_core.datastore.documents import normalise_newlines
from knnlm_core.errors import UnreadableInput


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: what to open.
        name: the id of its document, or what the default ids of its rows begin with.
        max_document_bytes: no document of it may take more bytes in the file.
    """

    path: Path
    name: str
    max_document_bytes: int

    def read_text(self) -> str:
        """Read the whole file as UTF-8 text, without byte order mark and with ``\\n`` as newline.

        Raises: UnreadableInput: not text, or larger than `max_document_bytes`.
        """
        with self.path.open("rb") as stream:
            data = stream.read(self.max_document_bytes + 1)
        if len(data) > self.max_document_bytes:
            raise self.too_large(SourceLocation(self.path))
        with self.naming(SourceLocation(self.path)):
            return normalise_newlines(decode_text(data))

    def too_large(self, source: SourceLocation) -> UnreadableInput:
        """The error for a document over the limit."""
        return UnreadableInput(
            f"{source}: a document may take at most `max_document_bytes` = {self.max_document_bytes} bytes, "
            "this one is larger; split it",
            param="max_document_bytes",
        )

    @contextmanager
    def naming(self, source: SourceLocation) -> Iterator[None]:
        """Turn `NotText` into `UnreadableInput` that names ``source``."""
        try:
            yield
        except NotText as error:
            raise UnreadableInput(f"{source} is not readable as text: {error}") from None
