"""Bodies of ``/v1/datastores/{name}/documents``: learning and forgetting while serving."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from knnlm_core.datastore.ledger_file import MAX_ID_CHARACTERS
from knnlm_core.datastore.manifest import Digest16
from knnlm_server.api.schemas.common import ClosedBody, NonEmpty, Off, Text
from knnlm_server.api.schemas.limits import shown

MAX_LEARNED_DOCUMENTS = 1024  # of one request
MAX_LEARNED_TOKENS = 131_072  # of one request; their keys are held in memory until they are written
MAX_TAGS = 64
MAX_FIELD_CHARACTERS = 1024  # of what answers repeat for every neighbour

DocumentId = Annotated[
    str, Path(description="Id of a document; may hold slashes.", json_schema_extra={"maxLength": MAX_ID_CHARACTERS})
]
_Field = Annotated[Text, shown(maxLength=MAX_FIELD_CHARACTERS)]


class DocumentBody(ClosedBody):
    """A document to learn."""

    id: Annotated[NonEmpty, shown(maxLength=MAX_ID_CHARACTERS)]
    text: NonEmpty
    uri: _Field | None = None
    title: _Field | None = None
    licence: _Field | None = None
    tags: Annotated[list[Text], Field(fail_fast=True), shown(maxItems=MAX_TAGS)] = Field(default_factory=list)


class LearnBody(ClosedBody):
    """``POST /v1/datastores/{name}/documents``."""

    documents: Annotated[list[DocumentBody], Field(fail_fast=True), shown(minItems=1, maxItems=MAX_LEARNED_DOCUMENTS)]
    update: Off = Field(default=False, description="Replace documents whose id is there already.")


class LearnedDocument(BaseModel):
    """A document that is learned now."""

    model_config = ConfigDict(extra="forbid")

    id: str
    tokens: int = Field(ge=1)
    entries: int = Field(ge=0, description="Tokens with a context, which can be retrieved.")


class RevisionCard(BaseModel):
    """What a change of documents has led to; requests that begin now see it."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["datastore.revision"]
    name: str
    version: Digest16
    generation: int = Field(ge=1)
    revision: int = Field(ge=1, description="Counter of additions and deletions of the name.")


class Learned(RevisionCard):
    """Answer of learning."""

    documents: list[LearnedDocument]


class Forgotten(RevisionCard):
    """Answer of forgetting."""

    document_id: str
