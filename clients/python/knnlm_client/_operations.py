"""Every operation as a value: what to send and how to read the answer. The two clients differ only in the sending."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from knnlm_client._answers import ModelT, parse_body, parse_nothing, parse_server_status
from knnlm_client.requests import (
    CompletionOptions,
    CompletionRequest,
    LoadRequest,
    Prompt,
    ScoreInput,
    ScoreOptions,
    ScoreRequest,
    StreamCompletionOptions,
)
from knnlm_client.responses import (
    Completion,
    CompletionChunk,
    Datastore,
    DatastoreList,
    ModelCard,
    ModelList,
    ScoreResponse,
    ServerStatus,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request without its address and keys; `admin` says which key it needs."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One request and the reading of its complete answer."""

    request: PreparedRequest
    parse: Callable[[httpx.Response], T]


@dataclass(frozen=True, slots=True)
class StreamOperation(Generic[ModelT]):
    """One request and the type of the events of its answer."""

    request: PreparedRequest
    event_type: type[ModelT]


def completions(prompt: Prompt, model: str, options: CompletionOptions) -> Operation[Completion]:
    """Complete prompts."""
    request = CompletionRequest.model_validate({"prompt": prompt, "model": model, **options})
    prepared = PreparedRequest("POST", "/v1/completions", request.body())
    return Operation(prepared, lambda response: parse_body(response, Completion))


def stream_completions(
    prompt: Prompt, model: str, options: StreamCompletionOptions
) -> StreamOperation[CompletionChunk]:
    """Complete prompts, piece by piece."""
    request = CompletionRequest.model_validate({"prompt": prompt, "model": model, **options})
    prepared = PreparedRequest("POST", "/v1/completions", request.body() | {"stream": True})
    return StreamOperation(prepared, CompletionChunk)


def score(input: ScoreInput, model: str, options: ScoreOptions) -> Operation[ScoreResponse]:
    """Score texts."""
    request = ScoreRequest.model_validate({"input": input, "model": model, **options})
    prepared = PreparedRequest("POST", "/v1/score", request.body())
    return Operation(prepared, lambda response: parse_body(response, ScoreResponse))


def models() -> Operation[tuple[ModelCard, ...]]:
    """List models."""
    prepared = PreparedRequest("GET", "/v1/models")
    return Operation(prepared, lambda response: tuple(parse_body(response, ModelList).data))


def health() -> Operation[ServerStatus]:
    """Ask whether the server is up."""
    return Operation(PreparedRequest("GET", "/health"), parse_server_status)


def ready() -> Operation[ServerStatus]:
    """Ask whether the server can answer."""
    return Operation(PreparedRequest("GET", "/ready"), parse_server_status)


def list_datastores() -> Operation[tuple[Datastore, ...]]:
    """List loaded datastores."""
    prepared = PreparedRequest("GET", "/v1/datastores")
    return Operation(prepared, lambda response: tuple(parse_body(response, DatastoreList).data))


def get_datastore(name: str) -> Operation[Datastore]:
    """Describe one datastore."""
    prepared = PreparedRequest("GET", _datastore_path(name))
    return Operation(prepared, lambda response: parse_body(response, Datastore))


def load_datastore(name: str, version: str) -> Operation[Datastore]:
    """Load a datastore, or swap it to another version."""
    request = LoadRequest(version=version)
    prepared = PreparedRequest("PUT", _datastore_path(name), request.body(), admin=True)
    return Operation(prepared, lambda response: parse_body(response, Datastore))


def unload_datastore(name: str) -> Operation[None]:
    """Drain a datastore, then unload it."""
    return Operation(PreparedRequest("DELETE", _datastore_path(name), admin=True), parse_nothing)


def _datastore_path(name: str) -> str:
    # An empty name or one of dots would address another route; everything else is quoted into one segment.
    if name in {"", ".", ".."}:
        raise ValueError(f"`name` must name a datastore, got {name!r}")
    return f"/v1/datastores/{quote(name, safe='')}"
