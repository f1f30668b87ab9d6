"""What a caller may ask for: the bodies of requests, checked for names and types before they are sent.

Limits are the server's business, since they depend on its settings; here a field only has to be known and of the
right type. `None` everywhere means: leave it to the server. Such a field is not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypedDict

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
ScoreInput: TypeAlias = Sequence[str] | Sequence[Sequence[int]]

# Without `fail_fast` a long list of token ids collects one error per id before the next member of a union is tried.
_Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
_TokenIds: TypeAlias = Annotated[list[int], Field(fail_fast=True)]
_TokenIdLists: TypeAlias = Annotated[list[_TokenIds], Field(fail_fast=True)]


class _RequestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def body(self) -> dict[str, Any]:
        """Return the JSON object to send: what the caller set, under its wire names."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


class WeightedDatastore(_RequestPart):
    """One datastore of several that a request mixes, with its share."""

    name: str
    weight: float


class KnnOptions(_RequestPart):
    """Retrieval for one request; every field left out takes the datastore's calibrated value.

    Attributes:
        datastore: a name, or several with weights.
        k: neighbours per query.
        temperature: τ > 0, divides squared distances; it is not the sampling temperature.
        lmbda: λ in [0, 1], the weight of p_knn; `"lambda"` on the wire.
        gate: which gate decides when to search.
        gate_threshold: the gate's threshold, in the gate's own units.
        speculate: draft tokens from a neighbour's continuation.
        trace: ask for one `TraceEntry` per token.
    """

    datastore: str | list[WeightedDatastore] | None = None
    k: int | None = None
    temperature: float | None = None
    lmbda: float | None = Field(
        default=None, validation_alias=AliasChoices("lmbda", "lambda"), serialization_alias="lambda"
    )
    gate: str | None = None
    gate_threshold: float | None = None
    speculate: bool | None = None
    trace: bool | None = None


class StreamOptions(_RequestPart):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionOptions(TypedDict, total=False):
    """Keywords of `completions`, beside prompt and model; `CompletionRequest` explains them."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    seed: int | None
    logprobs: int | None
    echo: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    user: str | None
    knn: KnnOptions | None


class StreamCompletionOptions(CompletionOptions, total=False):
    """Keywords of `stream_completions`."""

    stream_options: StreamOptions | None


class CompletionRequest(_RequestPart):
    """The body of `POST /v1/completions`.

    Attributes:
        prompt: a text, several texts, the token ids of one prompt, or those of several.
        model: `<lm>` or `<lm>@<datastore>`.
        n: completions per prompt; choice `i * n + j` is the j-th of prompt i.
        logprobs: how many alternatives to report per token, of the mixed distribution.
        echo: put the prompt before the completion; with `max_tokens=0` the prompt alone is scored.
        logit_bias: token id → addend to its logit.
        knn: retrieval; must agree with the datastore that `model` names, if it names one.
    """

    prompt: str | _Texts | _TokenIds | _TokenIdLists
    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    knn: KnnOptions | None = None
    stream_options: StreamOptions | None = None


class ScoreOptions(TypedDict, total=False):
    """Keywords of `score`, beside input and model; `ScoreRequest` explains them."""

    knn: KnnOptions | None
    per_token: bool | None
    exclude_documents: Sequence[str] | None
    window: int | None
    stride: int | None


class ScoreRequest(_RequestPart):
    """The body of `POST /v1/score`.

    Attributes:
        input: texts, or lists of token ids.
        per_token: also return one `ScoredToken` per scored token.
        exclude_documents: ids of documents that must not be retrieved, such as the text itself.
        window: tokens that the LM sees at once.
        stride: newly scored tokens per window.
    """

    input: _Texts | _TokenIdLists
    model: str
    knn: KnnOptions | None = None
    per_token: bool | None = None
    exclude_documents: list[str] | None = None
    window: int | None = None
    stride: int | None = None


class LoadRequest(_RequestPart):
    """The body of `PUT /v1/datastores/{name}`: a published version, or `current` for the one that the store names."""

    version: str
