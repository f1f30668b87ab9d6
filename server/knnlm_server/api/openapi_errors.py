"""Errors in the OpenAPI document: one response per status, from the table that the server answers by."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from knnlm_core import errors as e
from knnlm_server.api.errors import HTTP_CODES, STATUS, status_of
from knnlm_server.api.schemas.events import SCHEMAS
from knnlm_server.settings import ServerSettings

Json = dict[str, Any]

# Nothing is built here; a request that was cancelled has nobody left to read its answer.
_NEVER_SENT = (e.CorpusError, e.BuildConflict, e.DatastoreDoesNotHelp, e.RequestCancelled)


def error_responses() -> Json:
    """Components of the document: the response of each status, with the codes that it comes with."""
    return {_name(status): _response(status, codes) for status, codes in sorted(_codes().items())}


def reference(status: int) -> Json:
    """What a route says of a status."""
    return {"$ref": f"#/components/responses/{_name(status)}"}


def error_statuses(path: str, operation: Json, settings: ServerSettings, *, asks_key: bool, is_admin: bool) -> set[int]:
    """Statuses of the errors that a route can give, from what it takes and asks for."""
    takes_body, takes_name = "requestBody" in operation, bool(operation.get("parameters"))
    changes_or_retrieves = is_admin or (takes_body and path.startswith("/v1/"))
    # (whether it can happen, class of error)
    rules: list[tuple[bool, type[e.KnnlmError]]] = [
        (True, e.KnnlmError),
        (True, e.PayloadTooLarge),
        (settings.max_requests_per_key is not None and bool(settings.api_key), e.RateLimited),
        (takes_body or is_admin, e.InvalidRequest),
        # Whatever asks for a key needs the model.
        (asks_key, e.NotReady),
        (asks_key and (takes_body or takes_name), e.ModelNotFound),
        (changes_or_retrieves, e.DatastoreMismatch),
        (is_admin and (settings.admin_key is not None or not settings.is_loopback), e.Forbidden),
    ]
    return {_status(cls) for applies, cls in rules if applies}


def unauthorized() -> int:
    """The status of a request without a key that is asked for."""
    return _status(e.Unauthorized)


def required_header(description: str, schema: Json) -> Json:
    """A header that is always there."""
    return {"description": description, "required": True, "schema": schema}


def _classes(root: type[e.KnnlmError] = e.KnnlmError) -> Iterator[type[e.KnnlmError]]:
    yield root
    for cls in root.__subclasses__():
        yield from _classes(cls)


def _status(cls: type[e.KnnlmError]) -> int:
    return status_of(cls.__new__(cls))[0]


def _codes() -> dict[int, dict[str, str]]:
    """Status → code → what it means."""
    meanings: dict[int, dict[str, str]] = {}
    for cls in _classes():
        if not issubclass(cls, _NEVER_SENT):
            meanings.setdefault(_status(cls), {})[cls.code] = (cls.__doc__ or "").strip().splitlines()[0]
    _, not_found = HTTP_CODES[404]
    meanings[404][not_found] = "No such route."
    return meanings


def _name(status: int) -> str:
    return HTTPStatus(status).phrase.replace(" ", "")


def _response(status: int, codes: dict[str, str]) -> Json:
    kinds = sorted({kind for given, kind in STATUS.values() if given == status})
    narrowed = {"properties": {"type": {"enum": kinds}, "code": {"enum": sorted(codes)}}}
    schema = {"allOf": [{"$ref": f"{SCHEMAS}ErrorBody"}, {"properties": {"error": narrowed}}]}
    return {
        "description": "\n".join(f"- `{code}`: {meaning}" for code, meaning in sorted(codes.items())),
        "headers": {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}, **_headers(status)},
        "content": {"application/json": {"schema": schema}},
    }


def _headers(status: int) -> Json:
    if status in (429, 503):
        return {
            "Retry-After": required_header("Seconds to wait before trying again.", {"type": "integer", "minimum": 1})
        }
    if status == 409:
        return {"x-should-retry": required_header("Asking again changes nothing.", {"const": "false"})}
    if status == 401:
        return {"WWW-Authenticate": required_header("How a key is sent.", {"const": "Bearer"})}
    return {}
