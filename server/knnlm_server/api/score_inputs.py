"""From a score's body to tokens: texts, token ids, documents of the datastore, and what goes on from a context."""

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
from knnlm_server.api.schemas.score import (
    MAX_SCORE_TOKENS,
    MAX_TEXTS,
    AfterContext,
    DocumentInput,
    ScoreBody,
    TextAfterContext,
    TokensAfterContext,
)

if TYPE_CHECKING:  # the command line reads texts without a server
    from knnlm_server.api.state import Backend


@dataclass(frozen=True, slots=True)
class TextToScore:
    """A text as tokens.

    Attributes:
        starts: (S,) character at which each scored token begins; None where token ids were given or nobody asks.
        num_bytes: UTF-8 bytes of the scored tokens.
        first: position of the first token to score, what is before it being context; the very first token has none.
        document_id, own: of a document of the datastore, and the entries that it made itself.
    """

    token_ids: NDArray[np.int32]  # (T,)
    starts: NDArray[np.int32] | None
    num_bytes: int
    first: int = 1
    document_id: str | None = None
    own: EntryRange | None = None

    @property
    def num_scored(self) -> int:
        """S = T − first, how many tokens there are to score."""
        return max(0, len(self.token_ids) - self.first)

    @property
    def scored_ids(self) -> NDArray[np.int32]:
        """(S,) token ids."""
        return self.token_ids[self.first :]


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
    Raises:   InvalidParameter: a token id beyond the vocabulary, a context without a token, or too many tokens in all.
              DocumentNotFound: no such document.
    """
    inputs = body.inputs()
    ids = dict.fromkeys(given.document_id for given in inputs if isinstance(given, DocumentInput))
    own = {document_id: _own_entries(document_id, datastore) for document_id in ids}  # before any of the slow part
    documents: dict[str, TextToScore] = {}
    texts: list[TextToScore] = []
    tokens = 0
    for index, given in enumerate(inputs):
        checkpoint()
        if not isinstance(given, DocumentInput):
            text = _read(backend, given, f"input.{index}", with_starts=body.per_token)
        elif given.document_id in documents:
            text = documents[given.document_id]
        else:
            assert datastore is not None
            source = datastore.document(given.document_id)
            text = _read_text(backend.tokenizer, source.text, with_starts=body.per_token)
            text = replace(text, document_id=source.id, own=own[source.id])
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


def _read(backend: Backend, given: str | TokenIds | AfterContext, param: str, *, with_starts: bool) -> TextToScore:
    tokenizer, vocab_size = backend.tokenizer, backend.lm.identity.vocab_size
    match given:
        case str():
            return _read_text(tokenizer, given, with_starts=with_starts)
        case list():
            tokenizer.check_ids(given, vocab_size, param="input")
            token_ids = np.array(given, np.int32)
            return TextToScore(token_ids, None, _bytes_of_tokens(tokenizer, token_ids[1:]))
        case TextAfterContext():
            encoding, begin = tokenizer.encode_with_spans(given.text), len(tokenizer.bos_token_ids)
            # A BOS belongs before the context alone.
            context, scored = tokenizer.encode(given.context), encoding.token_ids[begin:]
            starts = encoding.char_spans[begin:, 0].copy() if with_starts else None
            num_bytes = len(given.text.encode())
        case TokensAfterContext():
            for name, ids in (("context", given.context), ("text", given.text)):
                tokenizer.check_ids(ids, vocab_size, param=f"{param}.{name}")
            context, scored, starts = given.context, np.array(given.text, np.int32), None
            num_bytes = _bytes_of_tokens(tokenizer, scored)
    if not given.context or not context:  # some texts make no token
        raise InvalidParameter(f"`{param}.context` must hold at least 1 token, got 0", param=f"{param}.context")
    return TextToScore(np.concatenate([np.array(context, np.int32), scored]), starts, num_bytes, first=len(context))


def _read_text(tokenizer: Tokenizer, text: str, *, with_starts: bool) -> TextToScore:
    encoding = tokenizer.encode_with_spans(text)
    # A copy: a view would keep the ends alive too.
    starts = encoding.char_spans[1:, 0].copy() if with_starts else None
    return TextToScore(encoding.token_ids, starts, bytes_of_text(tokenizer, text, encoding))


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
