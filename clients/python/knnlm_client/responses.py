"""What the server answers; fields that a newer server adds are kept as attributes."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class _ResponsePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class TraceNeighbor(_ResponsePart):
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


class TraceEntry(_ResponsePart):
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


class Logprobs(_ResponsePart):
    """Log-probabilities (natural) of the mixed distribution; None for an echoed first token, which has no context."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class CompletionChoice(_ResponsePart):
    """One completion, or a piece of one; `finish_reason` is None until it ends."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    knn: list[TraceEntry] | None = None


class KnnUsage(_ResponsePart):
    """How the tokens of a request used the datastore."""

    searched: int
    followed: int
    skipped: int
    drafted: int
    accepted: int


class Usage(_ResponsePart):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    knn: KnnUsage | None = None


class _CompletionAnswer(_ResponsePart):
    id: str
    object: str = "text_completion"
    created: int  # Unix seconds
    model: str
    system_fingerprint: str | None = None  # LM fingerprint + datastore name:version:generation.revision
    choices: list[CompletionChoice]


class Completion(_CompletionAnswer):
    """The answer of `POST /v1/completions`."""

    usage: Usage


class CompletionChunk(_CompletionAnswer):
    """One event of a stream; the one that carries the usage has no choices."""

    usage: Usage | None = None


class Loss(_ResponsePart):
    """How well a distribution predicts the scored tokens; None where that is infinite or there are none."""

    nll: float | None  # nats, summed
    perplexity: float | None
    bits_per_byte: float | None


class ScoredToken(_ResponsePart):
    """One scored token: what the base LM and the mixture gave it."""

    id: int
    token: str
    offset: int | None  # characters before it; None where token ids were given
    base: float  # log-probability, natural
    mixed: float
    lmbda: float = Field(validation_alias=AliasChoices("lambda", "lmbda"), serialization_alias="lambda")
    decision: str


class ScoreTotal(_ResponsePart):
    """Sums over texts; tokens and bytes count scored tokens only."""

    tokens: int
    bytes: int
    searched: int
    base: Loss
    mixed: Loss


class ScoreResult(ScoreTotal):
    """The score of one text, in the order given."""

    index: int
    per_token: list[ScoredToken] | None = None


class ScoreResponse(_ResponsePart):
    """The answer of `POST /v1/score`."""

    object: str
    model: str
    system_fingerprint: str | None
    results: list[ScoreResult]
    total: ScoreTotal


class Datastore(_ResponsePart):
    """A datastore as the server holds it."""

    object: str
    name: str
    version: str
    generation: int
    state: str
    entries: int
    bytes: int
    unit: str
    documents: int
    leases: int
    calibration: dict[str, Any] | None
    model_fingerprint: str


class ModelCard(_ResponsePart):
    """A name that requests may give as `model`; `parent` is the base LM of `<lm>@<datastore>`."""

    id: str
    object: str = "model"
    created: int | None = None  # Unix seconds
    owned_by: str | None = None
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    datastore: str | None = None


class DatastoreList(_ResponsePart):
    """The answer of `GET /v1/datastores`."""

    data: list[Datastore]


class ModelList(_ResponsePart):
    """The answer of `GET /v1/models`."""

    data: list[ModelCard]


class ServerStatus(_ResponsePart):
    """Whether the server is up (`health`) or can answer (`ready`); true or false by itself."""

    ok: bool
    reason: str | None = None  # why not

    def __bool__(self) -> bool:
        return self.ok
