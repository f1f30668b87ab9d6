"""What the bodies of several routes have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypedDict

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

Prompt: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]

# Without `fail_fast` a long list of token ids collects one error per id before the next member of a union is tried.
Texts: TypeAlias = Annotated[list[str], Field(fail_fast=True)]
TokenIds: TypeAlias = Annotated[list[int], Field(fail_fast=True)]
TokenIdLists: TypeAlias = Annotated[list[TokenIds], Field(fail_fast=True)]


class RequestPart(BaseModel):
    """A body, or an object inside one, that knows what may be sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def body(self) -> dict[str, Any]:
        """Return the JSON object to send: what the caller set, under its wire names."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


class WeightedDatastore(RequestPart):
    """One datastore of several that a request mixes.

    Attributes:
        name: a name or an alias.
        weight: its share, in any unit; of all datastores or of none, which then count alike.
    """

    name: str
    weight: float | None = None


class KnnOptions(RequestPart):
    """Retrieval for one request; every field left out takes the datastore's calibrated value.

    Attributes:
        datastore: a name or an alias, or several.
        mixture: how several are mixed: `"distributions"`, each with its own τ and λ, or `"neighbors"`, those of all in
            one softmax, which needs `temperature` and `lmbda`.
        weights: of several: `"given"`, or `"prompt"`: by how well each one predicts the end of the prompt.
        k: neighbours per query and datastore.
        temperature: τ > 0, divides squared distances; it is not the sampling temperature.
        lmbda: λ in [0, 1], the weight of p_knn, the same for every token; `"lambda"` on the wire.
        lambda_mode: `"fixed"`, or a rule of the calibration that sets λ per token: `"bucketed"`, `"rrc"`, `"learned"`.
        gate: when to search: `"always"`, `"never"`, `"every_n"`, `"confidence"`, or `"automaton"` or `"learned"`, which
            follow what was found before where they do not search.
        gate_threshold: the gate's threshold, in the gate's own units: n, a probability, entries to follow, nats.
        speculate: draft tokens from a neighbour's continuation.
        trace: ask for one `TraceEntry` per generated token.
        attribution: ask which documents the probabilities came from; generated tokens get their trace too.
    """

    datastore: str | list[WeightedDatastore] | None = None
    mixture: str | None = None
    weights: str | None = None
    k: int | None = None
    temperature: float | None = None
    lmbda: float | None = Field(
        default=None, validation_alias=AliasChoices("lmbda", "lambda"), serialization_alias="lambda"
    )
    lambda_mode: str | None = None
    gate: str | None = None
    gate_threshold: float | None = None
    speculate: bool | None = None
    trace: bool | None = None
    attribution: bool | None = None


class StreamOptions(RequestPart):
    """What a stream carries beside text.

    Attributes:
        include_usage: end with a chunk that has the usage and no choices.
        continuous_usage_stats: give the usage so far in every chunk.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationOptions(TypedDict, total=False):
    """Keywords that `completions` and `chat` share; `GenerationRequest` explains them."""

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
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    user: str | None
    knn: KnnOptions | None


class GenerationRequest(RequestPart):
    """What every request for generated text may say.

    Attributes:
        model: `<lm>` or `<lm>@<datastore>`.
        n: completions per prompt; choice `i * n + j` is the j-th of prompt i.
        logit_bias: token id → addend to its logit.
        knn: retrieval; must agree with the datastore that `model` names, if it names one.
        stream_options: for streams only.
    """

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
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    knn: KnnOptions | None = None
    stream_options: StreamOptions | None = None
