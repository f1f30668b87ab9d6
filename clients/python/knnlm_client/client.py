"""The synchronous client."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import httpx

from knnlm_client import _operations as operations
from knnlm_client._answers import check_status
from knnlm_client._connection import Connection
from knnlm_client._prepared import Operation, StreamOperation
from knnlm_client._streams import Stream
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


class Client:
    """Talks to a knnlm server; may be shared by threads. Close it, or use it in a `with` block.

    Nothing is retried: `APIError.retry_after_s` says how long the server wants to be left alone, and only the caller
    knows whether asking again is worth it.

    Args:     base_url: the server's address; a `/v1` at its end is ignored.
              api_key: sent with every request, except where the admin key is.
              admin_key: sent instead when a datastore is to be changed.
              timeout: seconds of silence after which a request fails; None waits for ever.
              transport: another way to reach the server, such as a Unix socket.
    Raises:   ValueError: one of these cannot be used. From every method: APIError, ConnectionFailed or TimedOut, and
              ValueError, before anything is sent, for a keyword that is unknown or of the wrong type.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | None = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(base_url, api_key=api_key, admin_key=admin_key, timeout=timeout)
        self._http = httpx.Client(**self._connection.http_options, transport=transport)
        self.datastores = Datastores(self._send, self._events)

    def completions(self, prompt: Prompt, *, model: str, **options: Unpack[CompletionOptions]) -> Completion:
        """Complete one prompt or several; the keywords are the fields of `CompletionRequest`."""
        return self._send(operations.completions(prompt, model, options))

    def stream_completions(
        self, prompt: Prompt, *, model: str, **options: Unpack[StreamCompletionOptions]
    ) -> Stream[CompletionChunk]:
        """As `completions`, one chunk at a time; use the result in a `with` block."""
        return Stream(self._events(operations.stream_completions(prompt, model, options)))

    def chat(self, messages: Messages, *, model: str, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Let the model speak next in a conversation; the keywords are the fields of `ChatRequest`."""
        return self._send(operations.chat(messages, model, options))

    def stream_chat(
        self, messages: Messages, *, model: str, **options: Unpack[StreamChatOptions]
    ) -> Stream[ChatCompletionChunk]:
        """As `chat`, one chunk at a time; use the result in a `with` block."""
        return Stream(self._events(operations.stream_chat(messages, model, options)))

    def score(self, input: ScoreInput, *, model: str, **options: Unpack[ScoreOptions]) -> ScoreResponse:
        """Measure how well base LM and mixture predict texts; the keywords are the fields of `ScoreRequest`."""
        return self._send(operations.score(input, model, options))

    def stream_score(self, input: ScoreInput, *, model: str, **options: Unpack[ScoreOptions]) -> Stream[ScoreEvent]:
        """As `score`, with progress, and each text's result as soon as it is known; use it in a `with` block."""
        return Stream(self._events(operations.stream_score(input, model, options)))

    def neighbors(self, input: Prompt, *, model: str, **options: Unpack[NeighborsOptions]) -> NeighborsResponse:
        """Show what the datastore retrieves after a context; the keywords are the fields of `NeighborsRequest`."""
        return self._send(operations.neighbors(input, model, options))

    def tokenize(self, input: str | Messages, **options: Unpack[TokenizeOptions]) -> Tokenization:
        """Turn a text, or a conversation under the chat template, into token ids.

        The keywords are the fields of `TokenizeRequest` for a text and of `TokenizeChatRequest` for a conversation.
        """
        return self._send(operations.tokenize(input, options))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """Turn token ids into text."""
        return self._send(operations.detokenize(tokens, model))

    def tokenizer_info(self) -> TokenizerInfo:
        """Describe the tokenizer: its special tokens, its size, its chat template."""
        return self._send(operations.tokenizer_info())

    def models(self) -> tuple[ModelCard, ...]:
        """List the names that `model` may have: the base LM, and one for each loaded datastore."""
        return self._send(operations.models())

    def health(self) -> ServerStatus:
        """Ask whether the server is up; false, with a reason, when its engine is not."""
        return self._send(operations.health())

    def ready(self) -> Readiness:
        """Ask whether the server can answer, and how busy it is; false, with a reason, while it starts or drains."""
        return self._send(operations.ready())

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, operation: Operation[T]) -> T:
        request = operation.request
        with self._connection.mapped_errors(request):
            response = self._http.request(**self._connection.arguments(request))
        return operation.parse(response)

    def _events(self, operation: StreamOperation[T]) -> Generator[T, None, None]:
        request = operation.request
        with (
            self._connection.mapped_errors(request),
            self._http.stream(**self._connection.arguments(request)) as response,
        ):
            if not response.is_success:
                response.read()  # the error's body
            check_status(response)
            decoder = operation.decoder(response)
            for piece in response.iter_bytes():
                yield from decoder.feed(piece)
            decoder.finish()


class _Send(Protocol):
    def __call__(self, operation: Operation[T]) -> T: ...


class _Events(Protocol):
    def __call__(self, operation: StreamOperation[T]) -> Generator[T, None, None]: ...


class Datastores:
    """The server's datastores, as `client.datastores`.

    Everything but `list` and `get` needs the admin key, unless the server is local.
    """

    def __init__(self, send: _Send, events: _Events) -> None:
        self._send = send
        self._events = events

    def list(self) -> DatastoreList:
        """List the loaded datastores; the result also says what could be loaded, and what aliases mean."""
        return self._send(operations.list_datastores())

    def get(self, name: str) -> Datastore:
        """Describe a loaded datastore."""
        return self._send(operations.get_datastore(name))

    def load(
        self,
        name: str,
        version: str = "current",
        *,
        aliases: Sequence[str] | None = None,
        default: bool | None = None,
    ) -> Datastore:
        """Load a published version, or swap to it; requests under way keep the version they began with.

        Args:     aliases: other words for the name, instead of those that it has; None leaves them as they are.
                  default: whether requests that name no datastore use this one; None leaves it as it is.
        """
        return self._send(operations.load_datastore(name, version, aliases, default))

    def stream_load(
        self,
        name: str,
        version: str = "current",
        *,
        aliases: Sequence[str] | None = None,
        default: bool | None = None,
    ) -> Stream[LoadEvent]:
        """As `load`, with progress; the last event is the datastore. Leaving early does not stop the load."""
        return Stream(self._events(operations.stream_load_datastore(name, version, aliases, default)))

    def rollback(self, name: str) -> Datastore:
        """Swap back to the version that served before; the name stays there until it is loaded anew."""
        return self._send(operations.roll_back_datastore(name))

    def unload(self, name: str) -> None:
        """Wait until no request uses the datastore any more, then unload it."""
        self._send(operations.unload_datastore(name))

    def learn(self, name: str, documents: Documents, *, update: bool = False) -> Learned:
        """Add documents; they are on the disk before the answer, and retrieved by every request that begins after it.

        Args:     documents: each a `NewDocument`, a mapping with its fields, or a document of an export.
                  update: replace documents whose id is there already, instead of refusing all with `DocumentExists`.
        """
        return self._send(operations.learn_documents(name, documents, update))

    def forget(self, name: str, document_id: str) -> Forgotten:
        """Delete a document, in every version; its text stays on the disk until `purge`."""
        return self._send(operations.forget_document(name, document_id))

    def compact(self, name: str) -> Datastore:
        """Fold what was learned and deleted into a new version, and swap to it; requests go on meanwhile."""
        return self._send(operations.compact_datastore(name))

    def purge(self, name: str, document_ids: Sequence[str]) -> Purged:
        """Remove documents from every version on the disk, deleted already or not, and search its files for traces."""
        return self._send(operations.purge_documents(name, document_ids))

    def versions(self, name: str) -> tuple[PublishedVersion, ...]:
        """List the published versions of a loaded datastore."""
        return self._send(operations.list_versions(name))

    def verify(self, name: str, version: str | None = None) -> Verified:
        """Compare the files of one version, or of all, with their checksums; damage raises `DatastoreCorrupt`."""
        return self._send(operations.verify_datastore(name, version))

    def diff(self, name: str, a: str, b: str) -> VersionDiff:
        """Compare the documents and settings of two published versions."""
        return self._send(operations.diff_versions(name, a, b))

    def export(self, name: str) -> Stream[ExportedDocument]:
        """Read every document that is served, learned ones included and deleted ones not; use it in a `with` block."""
        return Stream(self._events(operations.export_documents(name)))
