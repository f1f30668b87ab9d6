"""Answers of ``/v1/models``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelCard(BaseModel):
    """A name that requests may give as their ``model``."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="`<lm>`, `<lm>@<datastore>` or `<lm>@<alias>`.")
    object: Literal["model"]
    created: int = Field(ge=0, description="When the server became ready, seconds since 1970.")
    owned_by: Literal["knnlm"]
    root: str = Field(description="The LM.")
    parent: str | None = Field(description="The LM, for its combination with a datastore.")
    max_model_len: int = Field(ge=1, description="Tokens of prompt and completion together.")
    datastore: str | None = Field(description="Its name, also where the id has an alias.")


class ModelList(BaseModel):
    """``GET /v1/models``."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"]
    data: list[ModelCard]
