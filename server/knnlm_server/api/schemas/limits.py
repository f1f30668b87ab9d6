"""Limits for the JSON schema alone; checks elsewhere enforce them, with messages that name field, limit and value."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic.config import JsonDict


def shown(**keywords: Any) -> Any:
    """Keywords for the JSON schema alone, such as ``shown(minimum=0)``; nothing is validated by them."""
    extra: JsonDict = keywords
    return Field(json_schema_extra=extra)
