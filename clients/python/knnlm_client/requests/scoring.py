"""The body of a request to score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias, TypedDict

from pydantic import Field

from knnlm_client.requests.common import KnnOptions, RequestPart, Texts, TokenIdLists


class DocumentInput(RequestPart):
    """A document of the datastore, to be scored as if the datastore did not hold it."""

    document_id: str


ScoreInput: TypeAlias = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[DocumentInput]

_Documents: TypeAlias = Annotated[list[DocumentInput], Field(fail_fast=True)]


class ScoreOptions(TypedDict, total=False):
    """Keywords of `score` and `stream_score`, beside input and model; `ScoreRequest` explains them."""

    knn: KnnOptions | None
    per_token: bool | None
    overlap: bool | None
    exclude_documents: Sequence[str] | None
    window: int | None
    stride: int | None


class ScoreRequest(RequestPart):
    """The body of `POST /v1/score`.

    Attributes:
        input: a text, several texts, several lists of token ids, or documents of the datastore.
        per_token: also return one `ScoredToken` per scored token.
        overlap: also break the tokens down by how much of the text before them stands in the datastore.
        exclude_documents: ids of documents that must not be retrieved, such as the text itself.
        window: tokens that the LM sees at once.
        stride: newly scored tokens per window.
    """

    input: str | Texts | TokenIdLists | _Documents
    model: str
    knn: KnnOptions | None = None
    per_token: bool | None = None
    overlap: bool | None = None
    exclude_documents: list[str] | None = None
    window: int | None = None
    stride: int | None = None
