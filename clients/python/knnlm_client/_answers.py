"""From an answer to a model or an error: the one place where bodies are judged."""

from __future__ import annotations

import json
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from knnlm_client.errors import APIError, ErrorInfo, UnexpectedResponse, error_class
from knnlm_client.responses import Readiness, ReadyBody, ServerStatus

ModelT = TypeVar("ModelT", bound=BaseModel)

_EXCERPT_CHARS = 200


def parse_body(response: httpx.Response, model: type[ModelT]) -> ModelT:
    """Read a complete answer.

    Raises:   APIError: the status is not a success.
              UnexpectedResponse: it is, but the body is not what this route gives.
    """
    check_status(response)
    return validate(response.content, model, response)


def parse_nothing(response: httpx.Response) -> None:
    """Read an answer of which only the status counts.

    Raises:   APIError: the status is not a success.
    """
    check_status(response)


def parse_health(response: httpx.Response) -> ServerStatus:
    """Read the answer of `/health`, where 503 is an answer and not an error."""
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return ServerStatus(ok=False, reason=error_from_response(response).message)
    check_status(response)
    return ServerStatus(ok=True)


def parse_readiness(response: httpx.Response) -> Readiness:
    """Read the answer of `/ready`, where 503 is an answer and not an error."""
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return Readiness(ok=False, reason=error_from_response(response).message)
    body = parse_body(response, ReadyBody)
    return Readiness.model_validate({**body.model_dump(exclude={"status"}), "ok": True})


def check_status(response: httpx.Response) -> None:
    """Raise the error that an answer carries; its body must have been read."""
    if not response.is_success:
        raise error_from_response(response)


def validate(text: str | bytes, model: type[ModelT], response: httpx.Response) -> ModelT:
    """Read one JSON text of an answer.

    Raises:   UnexpectedResponse: it is not JSON, or lacks what the model needs.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise unexpected(response, f"this is no {model.__name__} ({reason}): {_excerpt(text)}") from error


def unexpected(response: httpx.Response, problem: str) -> UnexpectedResponse:
    """Return the error for an answer of success that makes no sense on its route."""
    message = f"{response.request.method} {response.request.url.path}: {problem}"
    return UnexpectedResponse(
        ErrorInfo(message=message, status=response.status_code, request_id=response.headers.get("x-request-id"))
    )


def error_from_response(response: httpx.Response) -> APIError:
    """Return the error that a complete answer carries, whoever wrote its body."""
    try:
        body = json.loads(response.content)
    except ValueError:  # not JSON, or not even text
        body = None
    return error_from_body(body, response, excerpt=_excerpt(response.content))


def error_from_body(body: object, response: httpx.Response, *, excerpt: str) -> APIError:
    """Return the error for a decoded body, or for an event inside a running stream.

    Args:     body: `{"error": {"message", "type", "param", "code"}}`; anything else gives an error that quotes it.
              excerpt: the start of the body, for that case.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):  # how some proxies and servers refuse a key
        error = {"message": error}
    if not isinstance(error, dict):
        error = {}
    code = _text(error, "code")
    request = response.request
    fallback = f"{request.method} {request.url.path}: HTTP {response.status_code} {response.reason_phrase}: {excerpt}"
    info = ErrorInfo(
        message=_text(error, "message") or fallback,
        status=response.status_code,
        code=code,
        type=_text(error, "type"),
        param=_text(error, "param"),
        request_id=response.headers.get("x-request-id"),
        retry_after_s=_retry_after_s(response.headers),
    )
    return error_class(code, response.status_code)(info)


def _text(error: dict[str, Any], field: str) -> str | None:
    value = error.get(field)
    return None if value is None else str(value)


def _excerpt(body: str | bytes) -> str:
    text = body if isinstance(body, str) else body.decode("utf-8", errors="replace")
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "…"


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """Read `Retry-After`: seconds, or a date, which counts from the answer's own `Date`."""
    value = headers.get("retry-after")
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])
    except (KeyError, TypeError, ValueError):  # no date, or none that can be compared
        return None
    return max(0.0, wait.total_seconds())
