"""Bodies of compacting and purging a datastore while it serves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from knnlm_server.api.schemas.common import ClosedBody, NonEmpty
from knnlm_server.api.schemas.datastores import DatastoreCard
from knnlm_server.api.schemas.documents import MAX_LEARNED_DOCUMENTS
from knnlm_server.api.schemas.limits import shown

_DOCUMENTS = shown(minItems=1, maxItems=MAX_LEARNED_DOCUMENTS, uniqueItems=True)


class PurgeBody(ClosedBody):
    """``POST /v1/datastores/{name}/purge``."""

    documents: Annotated[list[NonEmpty], Field(fail_fast=True), _DOCUMENTS] = Field(
        description="Ids of the documents to forget for good, deleted already or not."
    )


class Purged(BaseModel):
    """Answer of a purge: nothing of the documents is left in any file of the name but their ids in ledger and log."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["datastore.purge"]
    documents: list[str]
    revision: int = Field(ge=1)
    replaced_versions: dict[str, str | None] = Field(
        description="Versions that held copies, by what replaces them; null where nothing else was left in one."
    )
    files_searched: int = Field(ge=1, description="Files that were searched for traces, and held none.")
    datastore: DatastoreCard
