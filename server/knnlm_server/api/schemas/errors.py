"""The one body of every error, as JSON or as an event of a stream that has begun."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Error(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field(description="Names the field, its limit and the value given.")
    type: str = Field(description="OpenAI's word for the kind of error.")
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str = Field(description="A stable slug: what to tell errors apart by.")


class ErrorBody(BaseModel):
    """An answer that is an error."""

    model_config = ConfigDict(extra="forbid")

    error: Error
