"""Bodies of the routes that look at a name's versions and at what it holds."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from knnlm_core.datastore.layout import DIGEST_PATTERN
from knnlm_core.datastore.manifest import Digest16
from knnlm_server.api.schemas.common import ClosedBody, NonEmpty
from knnlm_server.api.schemas.limits import shown

MAX_LISTED = 1000  # document ids in each list of a comparison

Version = Annotated[
    str, Query(description="A published version.", json_schema_extra={"pattern": f"^{DIGEST_PATTERN}$"})
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PublishedVersion(_Answer):
    """A version on the disk."""

    version: Digest16
    parent_version: Digest16 | None
    revision: int = Field(ge=0, description="What was learned and deleted up to it is part of the version.")
    entries: int = Field(ge=1)
    documents: int = Field(ge=1)
    bytes: int = Field(ge=1)
    current: bool = Field(description="Whether CURRENT names it.")
    serving: bool = Field(description="Whether this server serves it.")


class VersionList(_Answer):
    """``GET /v1/datastores/{name}/versions``."""

    object: Literal["list"]
    data: list[PublishedVersion]


class VerifyBody(ClosedBody):
    """``POST /v1/datastores/{name}/verify``."""

    version: Annotated[NonEmpty, shown(pattern=f"^{DIGEST_PATTERN}$")] | None = Field(
        default=None, description="One published version; null for all."
    )


class VerifiedVersion(_Answer):
    """A version whose every file is what its manifest says, and whose index finds what it found when it was built."""

    version: Digest16
    files: int = Field(ge=1)
    bytes: int = Field(ge=1)
    canary_queries: int = Field(ge=0)
    recall_at_32: float | None = Field(ge=0, le=1)


class Verified(_Answer):
    """Answer of a verification that found nothing wrong; damage is an error instead."""

    object: Literal["datastore.verification"]
    name: str
    versions: list[VerifiedVersion]
    revision: int = Field(ge=0)
    segments: int = Field(ge=0, description="Folders of learned documents.")
    leftovers: list[str] = Field(description="Of interrupted work; nobody reads them.")


class SettingChange(_Answer):
    """A setting that differs."""

    a: JsonValue
    b: JsonValue


class VersionDiff(_Answer):
    """Two versions as they were published, compared; lists of documents end after a thousand, the counts do not."""

    object: Literal["datastore.diff"]
    name: str
    a: Digest16
    b: Digest16
    entries: SettingChange
    added: list[str] = Field(description="Documents that only `b` has.")
    removed: list[str] = Field(description="Documents that only `a` has.")
    changed: list[str] = Field(description="Documents whose text differs.")
    num_added: int = Field(ge=0)
    num_removed: int = Field(ge=0)
    num_changed: int = Field(ge=0)
    num_unchanged: int = Field(ge=0)
    settings: dict[str, SettingChange]


class ExportedDocument(_Answer):
    """A document as `knnlm build` reads it; what a document does not have is left out."""

    id: str
    text: str
    uri: str | None = None
    title: str | None = None
    licence: str | None = None
    tags: list[str] | None = None
