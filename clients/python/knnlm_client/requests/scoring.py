"""The body of a request to score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self, TypeAlias, TypedDict

from pydantic import Field, model_validator

from knnlm_client.requests.common import KnnOptions, RequestPart, Texts, TokenIdLists, TokenIds


class DocumentInput(RequestPart):
    """A document of the datastore, to be scored as if the datastore did not hold it."""

    document_id: str


class AfterContext(RequestPart):
    """A text that goes on from a context, which is conditioned on and not scored, as a prompt is.

    Both are texts, each tokenised by itself, or both token ids, which score what a completion generated exactly as it
    did.
    """

    context: str | TokenIds
    text: str | TokenIds

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if isinstance(self.context, str) != isinstance(self.text, str):
            raise ValueError("`context` and `text` must both be texts or both be token ids")
        return self


ScoreInput: TypeAlias = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[DocumentInput] | Sequence[AfterContext]

_Documents: TypeAlias = Annotated[list[DocumentInput], Field(fail_fast=True)]
_Pairs: TypeAlias = Annotated[list[AfterContext], Field(fail_fast=True)]


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
        input: a text, several texts, several lists of token ids, documents of the datastore, or texts that go on from
            a context.
        per_token: also return one `ScoredToken` per scored token.
        overlap: also break the tokens down by how much of the text before them stands in the datastore.
        exclude_documents: ids of documents that must not be retrieved, such as the text itself.
        window: tokens that the LM sees at once.
        stride: newly scored tokens per window.
    """

    input: str | Texts | TokenIdLists | _Documents | _Pairs
    model: str
    knn: KnnOptions | None = None
    per_token: bool | None = None
    overlap: bool | None = None
    exclude_documents: list[str] | None = None
    window: int | None = None
    stride: int | None = None
