"""The body of a request for neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from knnlm_client.requests.common import KnnOptions, RequestPart, Texts, TokenIdLists, TokenIds


class NeighborsOptions(TypedDict, total=False):
    """Keywords of `neighbors`, beside input and model; `NeighborsRequest` explains them."""

    knn: KnnOptions | None
    limit: int | None
    context_chars: int | None
    exclude_documents: Sequence[str] | None


class NeighborsRequest(RequestPart):
    """The body of `POST /v1/neighbors`.

    Attributes:
        input: a context, several, the token ids of one, or those of several.
        knn: retrieval; `k` entries are searched and weighted, however few are returned.
        limit: how many neighbours, and how many next tokens, to return per context.
        context_chars: characters of the source to return on either side of a neighbour's token.
        exclude_documents: ids of documents that must not be retrieved.
    """

    input: str | Texts | TokenIds | TokenIdLists
    model: str
    knn: KnnOptions | None = None
    limit: int | None = None
    context_chars: int | None = None
    exclude_documents: list[str] | None = None
