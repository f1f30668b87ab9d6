"""The asynchronous client: the same operations as `client`, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import httpx

from knnlm_client import _operations as operations
from knnlm_client._answers import check_status
from knnlm_client._connection import Connection
from knnlm_client._prepared import Operation, StreamOperation
from knnlm_client._streams import AsyncStream
from knnlm_client.requests import (
    ChatOptions,
    CompletionOptions,
    Documents,
    Messages,
    NeighborsOptions,
    Prompt,
    ScoreInput,
    ScoreOptions,
    StreamChatOptions,
    StreamCompletionOptions,
    TokenizeOptions,
)
from knnlm_client.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Datastore,
    DatastoreList,
    ExportedDocument,
    Forgotten,
    Learned,
    LoadEvent,
    ModelCard,
    NeighborsResponse,
    PublishedVersion,
    Purged,
    Readiness,
    ScoreEvent,
    ScoreResponse,
    ServerStatus,
    Tokenization,
    TokenizerInfo,
    Verified,
    VersionDiff,
)

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
        self.datastores = AsyncDatastores(self._send, self._events)

    async def completions(self, prompt: Prompt, *, model: str, **options: Unpack[CompletionOptions]) -> Completion:
        """As `Client.completions`."""
        return await self._send(operations.completions(prompt, model, options))

    def stream_completions(
        self, prompt: Prompt, *, model: str, **options: Unpack[StreamCompletionOptions]
    ) -> AsyncStream[CompletionChunk]:
        """As `Client.stream_completions`; not awaited itself, for `async with` and `async for`."""
        return AsyncStream(self._events(operations.stream_completions(prompt, model, options)))

    async def chat(self, messages: Messages, *, model: str, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """As `Client.chat`."""
        return await self._send(operations.chat(messages, model, options))

    def stream_chat(
        self, messages: Messages, *, model: str, **options: Unpack[StreamChatOptions]
    ) -> AsyncStream[ChatCompletionChunk]:
        """As `Client.stream_chat`; not awaited itself, for `async with` and `async for`."""
        return AsyncStream(self._events(operations.stream_chat(messages, model, options)))

    async def score(self, input: ScoreInput, *, model: str, **options: Unpack[ScoreOptions]) -> ScoreResponse:
        """As `Client.score`."""
        return await self._send(operations.score(input, model, options))

    def stream_score(
        self, input: ScoreInput, *, model: str, **options: Unpack[ScoreOptions]
    ) -> AsyncStream[ScoreEvent]:
        """As `Client.stream_score`; not awaited itself, for `async with` and `async for`."""
        return AsyncStream(self._events(operations.stream_score(input, model, options)))

    async def neighbors(self, input: Prompt, *, model: str, **options: Unpack[NeighborsOptions]) -> NeighborsResponse:
        """As `Client.neighbors`."""
        return await self._send(operations.neighbors(input, model, options))

    async def tokenize(self, input: str | Messages, **options: Unpack[TokenizeOptions]) -> Tokenization:
        """As `Client.tokenize`."""
        return await self._send(operations.tokenize(input, options))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """As `Client.detokenize`."""
        return await self._send(operations.detokenize(tokens, model))

    async def tokenizer_info(self) -> TokenizerInfo:
        """As `Client.tokenizer_info`."""
        return await self._send(operations.tokenizer_info())

    async def models(self) -> tuple[ModelCard, ...]:
        """As `Client.models`."""
        return await self._send(operations.models())

    async def health(self) -> ServerStatus:
        """As `Client.health`."""
        return await self._send(operations.health())

    async def ready(self) -> Readiness:
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

    async def _events(self, operation: StreamOperation[T]) -> AsyncGenerator[T, None]:
        request = operation.request
        with self._connection.mapped_errors(request):
            async with self._http.stream(**self._connection.arguments(request)) as response:
                if not response.is_success:
                    await response.aread()  # the error's body
                check_status(response)
                decoder = operation.decoder(response)
                async for piece in response.aiter_bytes():
                    for event in decoder.feed(piece):
                        yield event
                decoder.finish()


class _Send(Protocol):
    def __call__(self, operation: Operation[T]) -> Awaitable[T]: ...


class _Events(Protocol):
    def __call__(self, operation: StreamOperation[T]) -> AsyncGenerator[T, None]: ...


class AsyncDatastores:
    """As `Datastores`, awaited."""

    def __init__(self, send: _Send, events: _Events) -> None:
        self._send = send
        self._events = events

    async def list(self) -> DatastoreList:
        """As `Datastores.list`."""
        return await self._send(operations.list_datastores())

    async def get(self, name: str) -> Datastore:
        """As `Datastores.get`."""
        return await self._send(operations.get_datastore(name))

    async def load(
        self,
        name: str,
        version: str = "current",
        *,
        aliases: Sequence[str] | None = None,
        default: bool | None = None,
    ) -> Datastore:
        """As `Datastores.load`."""
        return await self._send(operations.load_datastore(name, version, aliases, default))

    def stream_load(
        self,
        name: str,
        version: str = "current",
        *,
        aliases: Sequence[str] | None = None,
        default: bool | None = None,
    ) -> AsyncStream[LoadEvent]:
        """As `Datastores.stream_load`; not awaited itself, for `async with` and `async for`."""
        return AsyncStream(self._events(operations.stream_load_datastore(name, version, aliases, default)))

    async def rollback(self, name: str) -> Datastore:
        """As `Datastores.rollback`."""
        return await self._send(operations.roll_back_datastore(name))

    async def unload(self, name: str) -> None:
        """As `Datastores.unload`."""
        await self._send(operations.unload_datastore(name))

    async def learn(self, name: str, documents: Documents, *, update: bool = False) -> Learned:
        """As `Datastores.learn`."""
        return await self._send(operations.learn_documents(name, documents, update))

    async def forget(self, name: str, document_id: str) -> Forgotten:
        """As `Datastores.forget`."""
        return await self._send(operations.forget_document(name, document_id))

    async def compact(self, name: str) -> Datastore:
        """As `Datastores.compact`."""
        return await self._send(operations.compact_datastore(name))

    async def purge(self, name: str, document_ids: Sequence[str]) -> Purged:
        """As `Datastores.purge`."""
        return await self._send(operations.purge_documents(name, document_ids))

    async def versions(self, name: str) -> tuple[PublishedVersion, ...]:
        """As `Datastores.versions`."""
        return await self._send(operations.list_versions(name))

    async def verify(self, name: str, version: str | None = None) -> Verified:
        """As `Datastores.verify`."""
        return await self._send(operations.verify_datastore(name, version))

    async def diff(self, name: str, a: str, b: str) -> VersionDiff:
        """As `Datastores.diff`."""
        return await self._send(operations.diff_versions(name, a, b))

    def export(self, name: str) -> AsyncStream[ExportedDocument]:
        """As `Datastores.export`; not awaited itself, for `async with` and `async for`."""
        return AsyncStream(self._events(operations.export_documents(name)))
