"""What the answers of several routes have in common."""

from __future__ import annotations

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class ResponsePart(BaseModel):
    """An answer, or an object inside one; fields that a newer server adds are kept as attributes."""

    model_config = ConfigDict(frozen=True, extra="allow")


class DocumentShare(ResponsePart):
    """The part of a probability that came from one document.

    Attributes:
        document_id: None for documents that have been deleted since; then nothing else is told of them.
    """

    datastore: str
    share: float
    document_id: str | None
    title: str | None = None
    licence: str | None = None
    deleted: bool = False


class TokenSource(DocumentShare):
    """A document that stands behind a token.

    Attributes:
        spans: where it has the token: characters of its text, from and to.
    """

    uri: str | None = None
    spans: list[tuple[int, int]] = []


class TokenAttribution(ResponsePart):
    """Where the probability of a token came from; the shares sum to 1.

    Attributes:
        model: the share of the language model.
        sources: the largest share first.
    """

    model: float
    sources: list[TokenSource]


class AnswerAttribution(ResponsePart):
    """Where the probabilities of an answer's tokens came from, on average; the shares sum to 1.

    Attributes:
        model: the share of the language model.
        documents: the largest share first.
        licences: the documents' shares by licence; `"unknown"` where there is none, or a document was deleted.
    """

    model: float
    documents: list[DocumentShare]
    licences: dict[str, float]


class TracedDatastore(ResponsePart):
    """What one of several datastores had to do with a token: p = (1 − Σ weight λ) p_lm + Σ weight λ p_knn."""

    name: str
    weight: float
    lmbda: float = Field(validation_alias=AliasChoices("lambda", "lmbda"), serialization_alias="lambda")
    p_knn: float


class TraceNeighbor(ResponsePart):
    """One retrieved entry and where its text stands."""

    datastore: str | None = None
    entry_id: int  # of the datastore
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
    """How one token came about: p = λ p_knn + (1 − λ) p_lm.

    Attributes:
        followed: whether entries next to those found before were used instead of a search; `neighbors` are these.
        decision: the gate that decided.
        gate_score: what it held against its threshold, in the threshold's units; None for gates without one.
        pointers: how many entries could have been followed.
        neighbors: nearest first; of several datastores with a λ each, by weight.
        datastores: with several datastores, what each one had to do with it.
        attribution: which documents it came from, where that was asked for.
    """

    token_id: int
    token: str
    searched: bool
    followed: bool = False
    decision: str
    gate_score: float | None = None
    gate_threshold: float | None = None
    pointers: int = 0
    lmbda: float = Field(validation_alias=AliasChoices("lambda", "lmbda"), serialization_alias="lambda")
    p_lm: float
    p_knn: float | None = None  # None: there was nothing to mix in
    p: float
    neighbors: list[TraceNeighbor] = []
    datastores: list[TracedDatastore] | None = None
    attribution: TokenAttribution | None = None


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
    system_fingerprint: str | None = None  # LM fingerprint + name:version:generation.revision of each datastore
