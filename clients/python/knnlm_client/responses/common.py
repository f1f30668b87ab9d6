"""What the answers of several routes have in common."""

from __future__ import annotations

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class ResponsePart(BaseModel):
    """An answer, or an object inside one; fields that a newer server adds are kept as attributes."""

    model_config = ConfigDict(frozen=True, extra="allow")


class TraceNeighbor(ResponsePart):
    """One retrieved entry and where its text stands."""

    entry_id: int
    distance: float  # squared L2
    weight: float  # share of p_knn
    token: str
    document_id: str | None = None
    uri: str | None = None
    title: str | None = None
    licence: str | None = None
    char_start: int | None = None
    char_end: int | None = None


class TraceEntry(ResponsePart):
    """How one token came about: p = λ p_knn + (1 − λ) p_lm."""

    token_id: int
    token: str
    searched: bool
    decision: str
    lmbda: float = Field(validation_alias=AliasChoices("lambda", "lmbda"), serialization_alias="lambda")
    p_lm: float
    p_knn: float | None = None  # None: there was nothing to mix in
    p: float
    neighbors: list[TraceNeighbor] = []


class KnnUsage(ResponsePart):
    """How the tokens of a request used the datastore."""

    searched: int
    followed: int
    skipped: int
    drafted: int
    accepted: int


class PromptTokensDetails(ResponsePart):
    """What the prompt's tokens cost."""

    cached_tokens: int  # their KV cache was there already


class Usage(ResponsePart):
    """Tokens of a request; those of completions that `best_of` discards are counted too."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    knn: KnnUsage | None = None


class GenerationAnswer(ResponsePart):
    """What stands at the head of every answer with generated text, and of every chunk of one."""

    id: str
    created: int  # Unix seconds
    model: str
    system_fingerprint: str | None = None  # LM fingerprint + datastore name:version:generation.revision
