"""The asynchronous client: the same operations as `client`, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import httpx

from knnlm_client import _operations as operations
from knnlm_client._answers import ModelT, check_status
from knnlm_client._connection import Connection
from knnlm_client._operations import Operation, StreamOperation
from knnlm_client._streams import AsyncStream, EventDecoder
from knnlm_client.requests import CompletionOptions, Prompt, ScoreInput, ScoreOptions, StreamCompletionOptions
from knnlm_client.responses import Completion, CompletionChunk, Datastore, ModelCard, ScoreResponse, ServerStatus

T = TypeVar("T")


class AsyncClient:
    """As `Client`, for one event loop; close it with `aclose`, or use it in an `async with` block."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | None = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = Connection(base_url, api_key=api_key, admin_key=admin_key, timeout=timeout)
        self._http = httpx.AsyncClient(**self._connection.http_options, transport=transport)
        self.datastores = AsyncDatastores(self._send)

    async def completions(self, prompt: Prompt, *, model: str, **options: Unpack[CompletionOptions]) -> Completion:
        """As `Client.completions`."""
        return await self._send(operations.completions(prompt, model, options))

    def stream_completions(
        self, prompt: Prompt, *, model: str, **options: Unpack[StreamCompletionOptions]
    ) -> AsyncStream[CompletionChunk]:
        """As `Client.stream_completions`; not awaited itself, for `async with` and `async for`."""
        return AsyncStream(self._events(operations.stream_completions(prompt, model, options)))

    async def score(self, input: ScoreInput, *, model: str, **options: Unpack[ScoreOptions]) -> ScoreResponse:
        """As `Client.score`."""
        return await self._send(operations.score(input, model, options))

    async def models(self) -> tuple[ModelCard, ...]:
        """As `Client.models`."""
        return await self._send(operations.models())

    async def health(self) -> ServerStatus:
        """As `Client.health`."""
        return await self._send(operations.health())

    async def ready(self) -> ServerStatus:
        """As `Client.ready`."""
        return await self._send(operations.ready())

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _send(self, operation: Operation[T]) -> T:
        request = operation.request
        with self._connection.mapped_errors(request):
            response = await self._http.request(**self._connection.arguments(request))
        return operation.parse(response)

    async def _events(self, operation: StreamOperation[ModelT]) -> AsyncGenerator[ModelT, None]:
        request = operation.request
        with self._connection.mapped_errors(request):
            async with self._http.stream(**self._connection.arguments(request)) as response:
                if not response.is_success:
                    await response.aread()  # the error's body
                check_status(response)
                decoder = EventDecoder(response, operation.event_type)
                async for piece in response.aiter_bytes():
                    for event in decoder.feed(piece):
                        yield event
                decoder.finish()


class _Send(Protocol):
    def __call__(self, operation: Operation[T]) -> Awaitable[T]: ...


class AsyncDatastores:
    """As `Datastores`, awaited."""

    def __init__(self, send: _Send) -> None:
        self._send = send

    async def list(self) -> tuple[Datastore, ...]:
        """As `Datastores.list`."""
        return await self._send(operations.list_datastores())

    async def get(self, name: str) -> Datastore:
        """As `Datastores.get`."""
        return await self._send(operations.get_datastore(name))

    async def load(self, name: str, version: str = "current") -> Datastore:
        """As `Datastores.load`."""
        return await self._send(operations.load_datastore(name, version))

    async def unload(self, name: str) -> None:
        """As `Datastores.unload`."""
        await self._send(operations.unload_datastore(name))
