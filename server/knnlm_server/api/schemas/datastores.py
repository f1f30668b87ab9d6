"""Bodies of ``/v1/datastores``."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from knnlm_core.datastore.layout import DIGEST_PATTERN, NAME_PATTERN
from knnlm_core.datastore.manifest import Digest16
from knnlm_server.api.schemas.common import ClosedBody, NonEmpty
from knnlm_server.api.schemas.limits import shown

# A few names that fit the pattern are reserved; `layout.is_name` knows them.
Name = Annotated[str, Path(description="Name of a datastore.", json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]


class LoadBody(ClosedBody):
    """``PUT /v1/datastores/{name}``."""

    version: Annotated[NonEmpty, shown(pattern=f"^(current|{DIGEST_PATTERN})$")] = Field(
        default="current", description="`current` or a published version."
    )


class CalibrationReport(BaseModel):
    """What requests use that name the datastore and nothing else, and how good that was on held-out text."""

    model_config = ConfigDict(extra="forbid")

    id: Digest16
    k: int = Field(ge=1)
    temperature: float = Field(gt=0, description="τ, in units of squared distance.")
    lmbda: float = Field(alias="lambda", ge=0, le=1)
    gate: Literal["always"]
    helps: bool = Field(description="Whether the mixture beat the base LM.")
    report: dict[str, JsonValue]
    held_out_documents: list[str] | None


class DatastoreCard(BaseModel):
    """A loaded datastore."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    object: Literal["datastore"]
    name: str
    version: Digest16
    generation: int = Field(ge=1, description="Counter of loads and swaps of the name.")
    state: Literal["ready", "draining"]
    entries: int = Field(ge=1)
    bytes: int = Field(ge=1)
    unit: Literal["token"]
    documents: int = Field(ge=1)
    leases: int = Field(ge=0, description="Requests that use any open generation of the name.")
    calibration: CalibrationReport | None
    model_fingerprint: str = Field(description="Of the LM that the keys were made with.")


class DatastoreList(BaseModel):
    """``GET /v1/datastores``."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"]
    data: list[DatastoreCard]
    published: list[str] = Field(description="Names that could be loaded and are not.")


class Unloaded(BaseModel):
    """``DELETE /v1/datastores/{name}``."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["datastore"]
    name: str
    state: Literal["unloaded"]
