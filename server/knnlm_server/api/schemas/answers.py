"""What answers of several routes consist of, for the OpenAPI document: routes render plain dicts of these shapes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Something that the server says; it says no more than this."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), populate_by_name=True)


class PromptTokensDetails(Answer):
    """What became of the prompt."""

    cached_tokens: int = Field(ge=0, description="Prompt tokens whose KV cache was reused.")


class RetrievalUsage(Answer):
    """What happened at the request's tokens."""

    searched: int = Field(ge=0, description="Tokens before which the datastore was searched.")
    followed: int = Field(ge=0)
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


class TraceNeighbor(Answer):
    """One neighbour behind a token, and where it stands."""

    entry_id: int = Field(ge=0)
    distance: float = Field(description="Squared L2.")
    weight: float = Field(ge=0, description="Share of p_knn.")
    token: str
    document_id: str
    uri: str | None
    title: str | None
    licence: str | None
    char_start: int = Field(ge=0)
    char_end: int = Field(ge=0)


class TokenTraceEntry(Answer):
    """How one token's probability came about."""

    token_id: int = Field(ge=0)
    token: str
    searched: bool
    decision: str = Field(description="The gate's; `base` without a datastore.")
    lmbda: float = Field(alias="lambda", ge=0, le=1, description="λ: weight of p_knn.")
    p_lm: float = Field(ge=0)
    p_knn: float = Field(ge=0)
    p: float = Field(ge=0)
    neighbors: list[TraceNeighbor] = Field(description="Nearest first.")
