"""``PUT /v1/datastores/{name}``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from knnlm_server.api.schemas.common import NonEmpty


class LoadBody(BaseModel):
    """``PUT /v1/datastores/{name}``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    version: NonEmpty = Field(default="current", description="`current` or a published version.")
