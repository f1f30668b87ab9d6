"""One table from error class to HTTP status, and one body shape for every error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from knnlm_core import errors as e

# The narrowest class listed wins. Type is OpenAI's word for the kind of error.
STATUS: dict[type[e.KnnlmError], tuple[int, str]] = {
    e.KnnlmError: (500, "internal_server_error"),
    e.InvalidRequest: (400, "invalid_request_error"),
    e.PayloadTooLarge: (413, "invalid_request_error"),
    e.Unauthorized: (401, "authentication_error"),
    e.Forbidden: (403, "permission_error"),
    e.ModelNotFound: (404, "not_found_error"),
    e.DatastoreNotFound: (404, "not_found_error"),
    e.DatastoreMismatch: (409, "conflict_error"),
    e.DatastoreCorrupt: (409, "conflict_error"),
    e.DatastoreBusy: (409, "conflict_error"),
    e.DatastoreConflict: (409, "conflict_error"),
    e.DatastoreBudget: (409, "conflict_error"),
    e.DatastoreReadOnly: (409, "conflict_error"),
    e.DocumentExists: (409, "conflict_error"),
    e.VerifyFailed: (409, "conflict_error"),
    e.NotReady: (503, "service_unavailable_error"),
    e.Overloaded: (503, "service_unavailable_error"),
    e.RateLimited: (429, "rate_limit_error"),
    e.ShuttingDown: (503, "service_unavailable_error"),
    e.RequestCancelled: (499, "request_cancelled"),
    e.EngineFailure: (500, "internal_server_error"),
}

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
_RETRY_AFTER_S = 1
_UNION_MEMBER = re.compile(r"\[|^(constrained-)?(str|int)$")


def status_of(error: e.KnnlmError) -> tuple[int, str]:
    """HTTP status and type of an error."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def error_body(error: e.KnnlmError) -> dict[str, Any]:
    """``{"error": {message, type, param, code}}``; an internal error says nothing about the inside."""
    status, kind = status_of(error)
    message = "internal error" if status == 500 and not isinstance(error, e.EngineFailure) else error.message
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: e.KnnlmError) -> Response:
    """The answer for an error raised before any byte was sent."""
    status, _ = status_of(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(_RETRY_AFTER_S)
    if status == 409:
        # Clients retry 409 by themselves; a conflict about a datastore does not go away by asking again.
        headers["x-should-retry"] = "false"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(error_body(error), status, headers)


def _answer(body: dict[str, Any], status: int, headers: Mapping[str, str] | None) -> Response:
    # In ASCII: a message may quote a name that is no valid text.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def error_event(error: e.KnnlmError) -> str:
    """The same body as a server-sent event, for a stream that has begun."""
    return f"data: {json.dumps(error_body(error))}\n\n"


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the app the one body shape; `RequestLog` does so for what nobody foresaw."""
    app.add_exception_handler(e.KnnlmError, _known)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _invalid_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http)  # type: ignore[arg-type]


async def _known(request: Request, error: e.KnnlmError) -> Response:
    return error_response(error)


async def _invalid_body(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    # Besides names and positions, a location tells which member of a union was tried, and where JSON breaks off.
    location = [str(part) for part in first["loc"][1:] if not _UNION_MEMBER.search(str(part))]
    field = ".".join(location) or None if first["type"] != "json_invalid" else None
    given = (
        ""
        if field is None or isinstance(first.get("input"), (dict, list))
        else f", got {str(first.get('input'))[:80]!r}"
    )
    message = f"`{field}`: {first['msg']}{given}" if field else str(first["msg"])
    return error_response(e.InvalidParameter(message, param=field))


# What the router says by itself: status → type, code.
HTTP_CODES = {
    404: ("not_found_error", "route_not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    415: ("invalid_request_error", "unsupported_media_type"),
}


async def _http(request: Request, error: HTTPException) -> Response:
    if isinstance(error.__cause__, e.KnnlmError):
        # FastAPI turns whatever reading the body raises into a 400 of its own.
        return error_response(error.__cause__)
    kind, code = HTTP_CODES.get(error.status_code, ("invalid_request_error", "invalid_request"))
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    headers = error.headers if error.status_code != 405 else {"Allow": ", ".join(_methods_of(request))}
    return _answer(body, error.status_code, headers)


def _methods_of(request: Request) -> list[str]:
    """Methods that the path knows; the router itself names those of one route alone."""
    scopes = [{**request.scope, "method": method} for method in METHODS]
    return [
        scope["method"]
        for scope in scopes
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
    ]
