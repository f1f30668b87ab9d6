"""From a score's body to tokens: texts, token ids, and documents of the datastore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from knnlm_core.datastore.entries import Entries
from knnlm_core.errors import DocumentNotFound, InvalidParameter
from knnlm_core.lm.tokenizer import Encoding, Tokenizer
from knnlm_core.types import EntryRange
from knnlm_server.api.schemas.common import TokenIds
from knnlm_server.api.schemas.score import MAX_SCORE_TOKENS, MAX_TEXTS, DocumentInput, ScoreBody

if TYPE_CHECKING:  # the command line reads texts without a server
    from knnlm_server.api.state import Backend


@dataclass(frozen=True, slots=True)
class TextToScore:
    """A text as tokens.

    Attributes:
        starts: (T,) character at which each token begins; None where token ids were given or nobody asks.
        num_bytes: UTF-8 bytes of the scored tokens.
        own: entries that the text made itself.
    """

    token_ids: NDArray[np.int32]  # (T,)
    starts: NDArray[np.int32] | None
    num_bytes: int
    document_id: str | None = None
    own: EntryRange | None = None

    @property
    def num_scored(self) -> int:
        """Tokens to score: the first one has no context."""
        return max(0, len(self.token_ids) - 1)


def check_inputs(body: ScoreBody, datastores: Sequence[Entries]) -> None:
    """Raises InvalidParameter: too few or too many texts, or something that needs one datastore has none or several."""
    inputs = body.inputs()
    if not 1 <= len(inputs) <= MAX_TEXTS:
        raise InvalidParameter(f"`input` must hold 1 … {MAX_TEXTS} texts, got {len(inputs)}", param="input")
    if len(datastores) == 1:
        return
    needed = "exactly one datastore" if datastores else "a datastore"
    given = len(datastores) or "none"
    for needs_one, param, name in (
        (isinstance(inputs[0], DocumentInput), "input", "a document in `input`"),
        (body.overlap, "overlap", "`overlap`"),
    ):
        if needs_one:
            raise InvalidParameter(f"{name} needs {needed}, and this request names {given}", param=param)


def read_texts(
    backend: Backend, body: ScoreBody, datastore: Entries | None, checkpoint: Callable[[], None]
) -> list[TextToScore]:
    """Tokenise what the body holds; takes seconds for many long texts. A document given twice is read once.

    Args:     checkpoint: called before each text; what it raises ends the reading.
    Raises:   InvalidParameter: a token id beyond the vocabulary, or too many tokens in all.
              DocumentNotFound: no such document.
    """
    inputs = body.inputs()
    ids = dict.fromkeys(given.document_id for given in inputs if isinstance(given, DocumentInput))
    own = {document_id: _own_entries(document_id, datastore) for document_id in ids}  # before any of the slow part
    documents: dict[str, TextToScore] = {}
    texts: list[TextToScore] = []
    tokens = 0
    for given in inputs:
        checkpoint()
        if not isinstance(given, DocumentInput):
            text = _read(backend, given, with_starts=body.per_token)
        elif given.document_id in documents:
            text = documents[given.document_id]
        else:
            assert datastore is not None
            source = datastore.document(given.document_id)
            text = replace(
                _read(backend, source.text, with_starts=body.per_token), document_id=source.id, own=own[source.id]
            )
            documents[source.id] = text
        texts.append(text)
        tokens += len(text.token_ids)
        if tokens > MAX_SCORE_TOKENS:
            raise InvalidParameter(
                f"`input` must hold at most {MAX_SCORE_TOKENS} tokens in all, got {tokens} in the first {len(texts)} "
                f"of {len(inputs)} texts",
                param="input",
            )
    return texts


def _own_entries(document_id: str, datastore: Entries | None) -> EntryRange:
    assert datastore is not None
    try:
        return datastore.document_entries(document_id)
    except DocumentNotFound as error:
        raise DocumentNotFound(f"`input`: {error.message}", param="input") from None


def _read(backend: Backend, given: str | TokenIds, *, with_starts: bool) -> TextToScore:
    tokenizer = backend.tokenizer
    if isinstance(given, list):
        tokenizer.check_ids(given, backend.lm.identity.vocab_size, param="input")
        token_ids = np.array(given, np.int32)
        return TextToScore(token_ids, None, _bytes_of_tokens(tokenizer, token_ids[1:]))
    encoding = tokenizer.encode_with_spans(given)
    # A copy: a view would keep the ends alive too.
    starts = encoding.char_spans[:, 0].copy() if with_starts else None
    return TextToScore(encoding.token_ids, starts, bytes_of_text(tokenizer, given, encoding))


def bytes_of_text(tokenizer: Tokenizer, text: str, encoding: Encoding) -> int:
    """Bytes of a text behind its first token; a character that the two share counts as far as it is behind."""
    if len(encoding.token_ids) < 2:
        return 0
    (begin, end), (second, _) = encoding.char_spans[:2].tolist()
    if end <= second:
        return len(text[second:].encode())
    return len(text[begin:].encode()) - len(tokenizer.token_bytes(int(encoding.token_ids[0])))


def _bytes_of_tokens(tokenizer: Tokenizer, token_ids: NDArray[np.int32]) -> int:
    distinct, counts = np.unique(token_ids, return_counts=True)
    sizes = (len(tokenizer.token_bytes(token_id)) for token_id in distinct.tolist())
    return sum(size * count for size, count in zip(sizes, counts.tolist(), strict=True))
