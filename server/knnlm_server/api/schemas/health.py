"""Answers of the routes that probes ask."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Alive(BaseModel):
    """``GET /health``."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["ok"]


class Ready(BaseModel):
    """``GET /ready``."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["ready"]
    model: str = Field(description="Name under which the LM is served.")
    datastores: list[str] = Field(description="Loaded datastores, sorted.")
    running: int = Field(ge=0, description="Requests that generate.")
    waiting: int = Field(ge=0, description="Requests that wait for a sequence.")
    scoring: int = Field(ge=0, description="Requests that are scored.")


class Version(BaseModel):
    """``GET /version``."""

    model_config = ConfigDict(extra="forbid")

    version: str
