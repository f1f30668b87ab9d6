"""What answers of several routes consist of, for the OpenAPI document: routes render plain dicts of these shapes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema


class Answer(BaseModel):
    """Something that the server says; it says no more than this."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), populate_by_name=True)


class PromptTokensDetails(Answer):
    """What became of the prompt."""

    cached_tokens: int = Field(ge=0, description="Prompt tokens whose KV cache was reused.")


class RetrievalUsage(Answer):
    """What happened at the request's tokens."""

    searched: int = Field(ge=0, description="Tokens before which the datastore was searched.")
    followed: int = Field(ge=0, description="Tokens for which entries next to those found before were used instead.")
    skipped: int = Field(ge=0)
    drafted: int = Field(ge=0)
    accepted: int = Field(ge=0)


class Usage(Answer):
    """Tokens read and generated."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0, description="Of all choices that were generated.")
    total_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails
    knn: RetrievalUsage | None = Field(default=None, description="Only with a datastore.")


Share = Annotated[float, Field(ge=0, le=1 + 1e-6)]  # rounding can put a sum a little above 1


class SharedDocument(Answer):
    """A document, and its part of an answer's probability."""

    datastore: str
    document_id: str
    title: str | None
    licence: str | None
    share: Share


class TokenSource(SharedDocument):
    """A document that stands behind a token."""

    uri: str | None
    spans: list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]] = Field(
        description="Where it has the token: characters of its text, from and to, in order."
    )


class DeletedDocuments(Answer):
    """What came from documents of a datastore that have been deleted since they were found."""

    datastore: str
    document_id: None
    deleted: Literal[True]
    share: Share


class TokenAttribution(Answer):
    """Where the probability of a token came from: the shares sum to 1."""

    model: Share = Field(description="Of the LM: (1 − λ) p_lm / p.")
    sources: list[TokenSource | DeletedDocuments] = Field(description="The largest share first.")


class AnswerAttribution(Answer):
    """Where the probabilities of an answer's tokens came from, on average: the shares sum to 1."""

    model: Share
    documents: list[SharedDocument | DeletedDocuments] = Field(description="The largest share first.")
    licences: dict[str, Share] = Field(
        description="Shares of the documents by licence; `unknown` where there is none, or a document was deleted."
    )


class TraceNeighbor(Answer):
    """One neighbour behind a token, and where it stands."""

    datastore: str
    entry_id: int = Field(ge=0, description="Of the datastore.")
    distance: float = Field(description="Squared L2.")
    weight: float = Field(ge=0, description="Share of p_knn.")
    token: str
    document_id: str
    uri: str | None
    title: str | None
    licence: str | None
    char_start: int = Field(ge=0)
    char_end: int = Field(ge=0)


class TracedDatastore(Answer):
    """What one of several datastores had to do with a token: p = (1 − Σ weight λ) p_lm + Σ weight λ p_knn."""

    name: str
    weight: float = Field(
        ge=0, le=1, description="Of the request; with `knn.mixture` neighbors the datastore's share of p_knn."
    )
    lmbda: float = Field(alias="lambda", ge=0, le=1, description="0 where the datastore found nothing.")
    p_knn: float = Field(ge=0)


class TokenTraceEntry(Answer):
    """How one token's probability came about."""

    token_id: int = Field(ge=0)
    token: str
    searched: bool
    followed: bool = Field(
        description="Whether entries next to those found before were used instead of a search; `neighbors` are these."
    )
    decision: str = Field(description="Which gate decided whether to search; `base` without a datastore.")
    gate_score: float | None = Field(
        description="What the gate held against its threshold: of every_n how many tokens ago its multiple was, of "
        "confidence a probability, of automaton the number of pointers, of learned the nats that a search is expected "
        "to gain. Null for gates without one, and of several datastores."
    )
    gate_threshold: float | None = Field(description="The threshold; null like `gate_score`.")
    pointers: int = Field(ge=0, description="Entries that could have been followed.")
    lmbda: float = Field(alias="lambda", ge=0, le=1, description="λ: weight of p_knn.")
    p_lm: float = Field(ge=0)
    p_knn: float = Field(ge=0)
    p: float = Field(ge=0)
    neighbors: list[TraceNeighbor] = Field(
        description="Nearest first; of several datastores with a λ each, by weight; without those of documents "
        "deleted since."
    )
    datastores: list[TracedDatastore] | SkipJsonSchema[None] = Field(
        default=None, description="Only with several datastores."
    )
    attribution: TokenAttribution | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.attribution`."
    )
