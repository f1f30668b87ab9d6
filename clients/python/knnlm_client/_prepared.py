"""What an operation consists of: a request, and the reading of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from knnlm_client._decoders import Decoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request without its address and keys; `admin` says which key it needs, `query` what follows the path."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    admin: bool = False
    query: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One request and the reading of its complete answer."""

    request: PreparedRequest
    parse: Callable[[httpx.Response], T]


@dataclass(frozen=True, slots=True)
class StreamOperation(Generic[T]):
    """One request, and what reads the body of its answer while it arrives."""

    request: PreparedRequest
    decoder: Callable[[httpx.Response], Decoder[T]]
