"""From a score's body to tokens: texts, token ids, and documents of the datastore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreNotFound, InvalidParameter
from knnlm_core.lm.tokenizer import Encoding, Tokenizer
from knnlm_core.types import EntryRange
from knnlm_server.api.schemas.score import MAX_TEXTS, DocumentInput, ScoreBody, ScoreInput
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


def check_inputs(body: ScoreBody, datastore: Datastore | None) -> None:
    """Raises InvalidParameter: too few or too many texts, or something that needs a datastore has none."""
    inputs = body.inputs()
    if not 1 <= len(inputs) <= MAX_TEXTS:
        raise InvalidParameter(f"`input` must hold 1 … {MAX_TEXTS} texts, got {len(inputs)}", param="input")
    if datastore is not None:
        return
    for needs_one, param, name in (
        (isinstance(inputs[0], DocumentInput), "input", "a document in `input`"),
        (body.overlap, "overlap", "`overlap`"),
    ):
        if needs_one:
            raise InvalidParameter(f"{name} needs a datastore, and this request names none", param=param)


def read_texts(
    backend: Backend, body: ScoreBody, datastore: Datastore | None, checkpoint: Callable[[], None]
) -> list[TextToScore]:
    """Tokenise what the body holds; takes seconds for many long texts.

    Args:     checkpoint: called before each text; what it raises ends the reading.
    Raises:   InvalidParameter: a token id beyond the vocabulary. DatastoreNotFound: no such document.
    """
    inputs = body.inputs()
    own = [_own_entries(given, datastore) for given in inputs]  # before any of the slow part
    texts = []
    for given, entries in zip(inputs, own, strict=True):
        checkpoint()
        texts.append(_read(backend, given, entries, datastore, body))
    return texts


def _own_entries(given: ScoreInput, datastore: Datastore | None) -> EntryRange | None:
    if not isinstance(given, DocumentInput):
        return None
    assert datastore is not None
    try:
        return datastore.document_entries(given.document_id)
    except DatastoreNotFound as error:
        raise DatastoreNotFound(f"`input`: {error.message}", param="input") from None


def _read(
    backend: Backend, given: ScoreInput, own: EntryRange | None, datastore: Datastore | None, body: ScoreBody
) -> TextToScore:
    tokenizer = backend.tokenizer
    if isinstance(given, list):
        tokenizer.check_ids(given, backend.lm.identity.vocab_size, param="input")
        token_ids = np.array(given, np.int32)
        return TextToScore(token_ids, None, _bytes_of_tokens(tokenizer, token_ids[1:]))
    document_id, text = None, given
    if isinstance(given, DocumentInput):
        assert datastore is not None
        document_id, text = given.document_id, datastore.document(given.document_id).text
    assert isinstance(text, str)
    encoding = tokenizer.encode_with_spans(text)
    # A copy: a view would keep the ends alive too.
    starts = encoding.char_spans[:, 0].copy() if body.per_token else None
    return TextToScore(encoding.token_ids, starts, bytes_of_text(tokenizer, text, encoding), document_id, own)


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
