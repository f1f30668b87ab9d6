"""Bodies of ``/v1/datastores``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from knnlm_core.datastore.calibration import GateModeName, LambdaModeName
from knnlm_core.datastore.layout import DIGEST_PATTERN, NAME_PATTERN
from knnlm_core.datastore.manifest import Digest16
from knnlm_server.api.schemas.common import ClosedBody, NonEmpty, Off
from knnlm_server.api.schemas.events import event_stream
from knnlm_server.api.schemas.limits import shown
from knnlm_server.registry.progress import Stage
from knnlm_server.registry.serving import MAX_ALIASES

# A few names that fit the pattern are reserved; `layout.is_name` knows them.
Name = Annotated[
    str, Path(description="Name or alias of a datastore.", json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})
]
Alias = Annotated[NonEmpty, shown(pattern=f"^{NAME_PATTERN}$")]


class LoadBody(ClosedBody):
    """``PUT /v1/datastores/{name}``."""

    version: Annotated[NonEmpty, shown(pattern=f"^(current|{DIGEST_PATTERN})$")] = Field(
        default="current",
        description="A published version, or `current` for the one that is published as current, and, where the server "
        "watches, for each that will be.",
    )
    aliases: Annotated[list[Alias], Field(fail_fast=True), shown(maxItems=MAX_ALIASES)] | None = Field(
        default=None,
        description="Other words for the name, instead of those that it has; an alias of another name moves here.",
    )
    default: bool | None = Field(
        default=None, description="Whether requests that name no datastore use this one; null leaves it as it is."
    )
    stream: Off = Field(default=False, description="Report progress as server-sent events.")


class CalibrationReport(BaseModel):
    """What requests use that name the datastore and nothing else, and how good that was on held-out text."""

    model_config = ConfigDict(extra="forbid")

    id: Digest16
    k: int = Field(ge=1)
    temperature: float = Field(gt=0, description="τ, in units of squared distance.")
    lmbda: float = Field(alias="lambda", ge=0, le=1, description="The best single λ.")
    lambda_mode: LambdaModeName = Field(description="How λ is set where a request does not say.")
    lambda_modes: list[LambdaModeName] = Field(description="Those that `knn.lambda_mode` may name.")
    gate: GateModeName = Field(description="When the datastore is searched where a request does not say.")
    gate_threshold: float | None = Field(ge=0, description="Of that gate; null for gates without one.")
    learned_threshold: float | None = Field(
        ge=0, description="Of the gate `learned` where a request gives none; null where there is no such gate."
    )
    helps: bool = Field(description="Whether the mixture beat the base LM.")
    report: dict[str, JsonValue]
    held_out_documents: list[str] | None


class SelfTestReport(BaseModel):
    """What became of the queries that the version keeps from its build, when it was loaded."""

    model_config = ConfigDict(extra="forbid")

    queries: int = Field(ge=1, description="How many were asked.")
    recall_at_32: float = Field(ge=0, le=1, description="Share of their 32 exact nearest entries that were found.")
    needed: float = Field(ge=0, le=1, description="Below it, the version would have been refused.")


class DatastoreCard(BaseModel):
    """A loaded datastore."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    object: Literal["datastore"]
    name: str
    version: Digest16
    generation: int = Field(ge=1, description="Counter of loads and swaps of the name; no number is used twice.")
    revision: int = Field(ge=0, description="Counter of what the name has learned and deleted.")
    state: Literal["ready", "draining"]
    entries: int = Field(ge=1, description="Of the version and learned, those of deleted documents included.")
    bytes: int = Field(ge=1, description="Of the version's files.")
    unit: Literal["token"]
    documents: int = Field(ge=0, description="Without deleted ones.")
    learned_documents: int = Field(ge=0, description="Of those, learned since the version was built.")
    deleted_documents: int = Field(ge=0, description="Ids deleted from the name, whichever versions had them.")
    leases: int = Field(ge=0, description="Requests that use any open generation of the name.")
    aliases: list[str] = Field(description="Other words for the name, sorted.")
    follows_current: bool = Field(description="Whether it was loaded as `current`, and not as a version of its own.")
    previous: Digest16 | None = Field(description="The version that a rollback goes to.")
    self_test: SelfTestReport | None = Field(description="Null for a version without canaries.")
    key_drift: float | None = Field(
        ge=0,
        description="Mean squared distance of keys that the running LM makes to those stored, divided by the median of "
        "a canary to its nearest entry; null for a version without canaries.",
    )
    calibration: CalibrationReport | None
    model_fingerprint: str = Field(description="Of the LM that the keys were made with.")


class DatastoreList(BaseModel):
    """``GET /v1/datastores``."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"]
    data: list[DatastoreCard]
    published: list[str] = Field(description="Names that could be loaded and are not.")
    aliases: dict[str, str] = Field(description="Alias → name, loaded or not.")
    default: str | None = Field(description="The name that requests use which name none.")
    bytes_used: int = Field(ge=0, description="Of every open generation, those that drain included, and learned.")
    bytes_limit: int | None = Field(ge=1, description="How many they may be; null for no limit.")
    persistent: bool = Field(description="Whether a restarted server finds versions, aliases and default as they are.")


class DatastoreProgress(BaseModel):
    """How far a load has come."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["datastore.progress"]
    stage: Stage
    done: int = Field(ge=0, description="Bytes while verifying and warming, steps otherwise.")
    total: int = Field(ge=0)


class Unloaded(BaseModel):
    """``DELETE /v1/datastores/{name}``."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["datastore"]
    name: str
    state: Literal["unloaded"]


LOADED: dict[int | str, dict[str, Any]] = {
    200: {
        "model": DatastoreCard,
        "description": "Swapped; or the stream, whose last event is the card",
        "content": event_stream(DatastoreProgress, DatastoreCard),
    },
    201: {"model": DatastoreCard, "description": "Loaded"},
}
