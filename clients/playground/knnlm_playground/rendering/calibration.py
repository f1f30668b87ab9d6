"""What a calibration says, read from the API's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class GatePoint(_Part):
    """A gate as it did on held-out text.

    Attributes:
        searched: share of the tokens.
    """

    gate: str
    threshold: float | None = None
    perplexity: float = Field(gt=0)
    searched: float
    followed: float = 0.0


class Perplexity(_Part):
    """How well held-out text was predicted."""

    perplexity: float = Field(gt=0)


class Report(_Part):
    """How good the settings were on text that they were not fitted on."""

    tokens: int
    base: Perplexity
    mixed: Perplexity
    nprobe: int | None = None
    gates: list[GatePoint] = []


class Calibration(_Part):
    """What requests use that leave it open."""

    id: str
    k: int
    temperature: float
    lmbda: float = Field(alias="lambda")
    lambda_mode: str
    gate: str
    gate_threshold: float | None = None
    helps: bool
    report: Report


def read_calibration(given: Mapping[str, Any] | None) -> Calibration | None:
    """The calibration of a datastore; None where it has none, or one of a kind that this page does not know."""
    try:
        return Calibration.model_validate(given) if given is not None else None
    except ValidationError:
        return None
