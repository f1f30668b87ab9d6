"""Streams in the OpenAPI document: what their events hold."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from knnlm_server.api.schemas.errors import ErrorBody

Json = dict[str, Any]
SCHEMAS = "#/components/schemas/"


def event_stream(model: type[BaseModel], *others: type[BaseModel]) -> Json:
    """Content of a response: server-sent events, each with one of the models, then ``[DONE]``.

    OpenAPI 3.1 has no word for a stream's items; as is common, the schema is that of one event.
    """
    chunk = {"contentMediaType": "application/json", "contentSchema": _one_of(model, *others)}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, chunk]}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {"text/event-stream": {"schema": event}}


def json_lines(model: type[BaseModel], *others: type[BaseModel]) -> Json:
    """Content of a response: newline-delimited JSON, as the array of its lines."""
    return {"application/x-ndjson": {"schema": {"type": "array", "items": _one_of(model, *others)}}}


def _one_of(*models: type[BaseModel]) -> Json:
    """What a stream says, or the error that ends it."""
    names = [model.__name__ for model in models]
    return {"anyOf": [{"$ref": f"{SCHEMAS}{name}"} for name in (*names, ErrorBody.__name__)]}
