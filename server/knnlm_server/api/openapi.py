"""What ``/openapi.json`` says beyond the routes' own words: the errors that each can give, and which keys it asks for.

FastAPI documents a 422 that this server never sends, and no other error. Here the document gets them from where the
server gets them: the table from error class to status, and the settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from knnlm_server.api.errors import METHODS
from knnlm_server.api.middleware import REQUEST_ID
from knnlm_server.api.openapi_errors import (
    error_responses,
    error_statuses,
    reference,
    required_header,
    unauthorized,
)
from knnlm_server.api.schemas.chat_answers import ChatChunk
from knnlm_server.api.schemas.completions import CompletionChunk
from knnlm_server.api.schemas.datastores import DatastoreProgress
from knnlm_server.api.schemas.errors import ErrorBody
from knnlm_server.api.schemas.events import SCHEMAS
from knnlm_server.api.schemas.score import ScoreProgressLine, ScoreResultLine, ScoreTotalLine
from knnlm_server.api.schemas.versions import ExportedDocument
from knnlm_server.api.security import ADMIN_KEY, API_KEY
from knnlm_server.settings import ServerSettings

Json = dict[str, Any]

# FastAPI collects the models of whole answers alone.
_NOT_BY_ROUTES = (
    ErrorBody,
    CompletionChunk,
    ChatChunk,
    ScoreProgressLine,
    ScoreResultLine,
    ScoreTotalLine,
    DatastoreProgress,
    ExportedDocument,
)
_NEVER_SENT = ("HTTPValidationError", "ValidationError")
_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class DocumentedApp(FastAPI):
    """A FastAPI app whose document is true of the server that serves it.

    Args:
        settings: which keys there are.
        given: as FastAPI takes it.
    """

    def __init__(self, settings: ServerSettings, **given: Any) -> None:
        super().__init__(**given)
        self._settings = settings

    def openapi(self) -> Json:
        """The document; made once."""
        if self.openapi_schema is None:
            self.openapi_schema = _completed(super().openapi(), self._settings)
        return self.openapi_schema


def _completed(document: Json, settings: ServerSettings) -> Json:
    components = document.setdefault("components", {})
    by_routes = components.get("schemas", {})
    components["schemas"] = _more_schemas() | {n: schema for n, schema in by_routes.items() if n not in _NEVER_SENT}
    components["headers"] = {"RequestId": _request_id()}
    components["responses"] = error_responses()
    for path, operation in _operations(document):
        _complete(path, operation, settings)
    schemes = components.pop("securitySchemes", {})
    asked = {name for _, operation in _operations(document) for name in _schemes_of(operation)}
    if asked:
        components["securitySchemes"] = {name: scheme for name, scheme in schemes.items() if name in asked}
    _write_integers(document)
    return document


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in document["paths"].items():
        yield from ((path, item[method.lower()]) for method in METHODS if method.lower() in item)


def _complete(path: str, operation: Json, settings: ServerSettings) -> None:
    schemes = _schemes_of(operation)
    is_admin = ADMIN_KEY.scheme_name in schemes
    responses = operation["responses"]
    responses.pop("422", None)
    declared = {int(status) for status in responses if int(status) >= 400}
    statuses = declared | error_statuses(path, operation, settings, asks_key=bool(schemes), is_admin=is_admin)
    if schemes:
        operation["security"] = _requirements(is_admin, settings)
    if operation.get("security"):
        statuses.add(unauthorized())
    else:
        operation.pop("security", None)
    for response in responses.values():
        response.setdefault("headers", {})["X-Request-Id"] = {"$ref": "#/components/headers/RequestId"}
    responses.update({str(status): reference(status) for status in sorted(statuses)})


def _schemes_of(operation: Json) -> set[str]:
    return {name for requirement in operation.get("security", ()) for name in requirement}


def _requirements(is_admin: bool, settings: ServerSettings) -> list[Json]:
    """What this server asks for: one of the alternatives, nothing if there is none."""
    if is_admin and settings.admin_key is not None:
        return [{ADMIN_KEY.scheme_name: []}]
    if not settings.api_key:
        return []
    schemes = [API_KEY, ADMIN_KEY] if settings.admin_key is not None else [API_KEY]
    return [{scheme.scheme_name: []} for scheme in schemes]


def _request_id() -> Json:
    return required_header(
        "The request's own, if it sent one that fits; else made up.", {"type": "string", "pattern": REQUEST_ID}
    )


def _more_schemas() -> Json:
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in _NOT_BY_ROUTES]
    _, schemas = models_json_schema(models, ref_template=SCHEMAS + "{model}")
    return dict(schemas["$defs"])


def _write_integers(node: Any) -> None:
    """Limits of integers as integers: FastAPI's own model of a schema makes every limit a float."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _write_integers(child)
    if isinstance(node, dict) and node.get("type") == "integer":
        node.update({name: int(node[name]) for name in _LIMITS if name in node})
