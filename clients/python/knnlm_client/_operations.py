"""Every operation as a value: what to send and how to read the answer. The two clients differ only in the sending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from knnlm_client._answers import ModelT, parse_body, parse_health, parse_nothing, parse_readiness
from knnlm_client._decoders import DocumentDecoder, EventDecoder, LoadDecoder, ScoreDecoder
from knnlm_client._prepared import Operation, PreparedRequest, StreamOperation
from knnlm_client.requests import (
    ChatOptions,
    ChatRequest,
    CompletionOptions,
    CompletionRequest,
    DetokenizeRequest,
    DiffQuery,
    Documents,
    LearnRequest,
    LoadRequest,
    Messages,
    NeighborsOptions,
    NeighborsRequest,
    Prompt,
    PurgeRequest,
    RequestPart,
    ScoreInput,
    ScoreOptions,
    ScoreRequest,
    StreamChatOptions,
    StreamCompletionOptions,
    TokenizeChatRequest,
    TokenizeOptions,
    TokenizeRequest,
    VerifyRequest,
)
from knnlm_client.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Datastore,
    DatastoreList,
    DatastoreListBody,
    Detokenization,
    ExportedDocument,
    Forgotten,
    Learned,
    LoadEvent,
    ModelCard,
    ModelListBody,
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
    VersionListBody,
)


def completions(prompt: Prompt, model: str, options: CompletionOptions) -> Operation[Completion]:
    """Complete prompts."""
    request = CompletionRequest.model_validate({"prompt": prompt, "model": model, **options})
    return _post("/v1/completions", request, Completion)


def stream_completions(
    prompt: Prompt, model: str, options: StreamCompletionOptions
) -> StreamOperation[CompletionChunk]:
    """Complete prompts, piece by piece."""
    request = CompletionRequest.model_validate({"prompt": prompt, "model": model, **options})
    return _post_for_events("/v1/completions", request, CompletionChunk)


def chat(messages: Messages, model: str, options: ChatOptions) -> Operation[ChatCompletion]:
    """Continue a conversation."""
    request = ChatRequest.model_validate({"messages": messages, "model": model, **options})
    return _post("/v1/chat/completions", request, ChatCompletion)


def stream_chat(messages: Messages, model: str, options: StreamChatOptions) -> StreamOperation[ChatCompletionChunk]:
    """Continue a conversation, piece by piece."""
    request = ChatRequest.model_validate({"messages": messages, "model": model, **options})
    return _post_for_events("/v1/chat/completions", request, ChatCompletionChunk)


def score(input: ScoreInput, model: str, options: ScoreOptions) -> Operation[ScoreResponse]:
    """Score texts."""
    request = ScoreRequest.model_validate({"input": input, "model": model, **options})
    return _post("/v1/score", request, ScoreResponse)


def stream_score(input: ScoreInput, model: str, options: ScoreOptions) -> StreamOperation[ScoreEvent]:
    """Score texts, with progress, each result as soon as it is known."""
    request = ScoreRequest.model_validate({"input": input, "model": model, **options})
    return StreamOperation(_prepare_stream("/v1/score", request), ScoreDecoder)


def neighbors(input: Prompt, model: str, options: NeighborsOptions) -> Operation[NeighborsResponse]:
    """Retrieve what followed contexts like these."""
    request = NeighborsRequest.model_validate({"input": input, "model": model, **options})
    return _post("/v1/neighbors", request, NeighborsResponse)


def tokenize(input: str | Messages, options: TokenizeOptions) -> Operation[Tokenization]:
    """Turn a text or a conversation into token ids."""
    request: RequestPart
    if isinstance(input, str):
        request = TokenizeRequest.model_validate({"prompt": input, **options})
    else:
        request = TokenizeChatRequest.model_validate({"messages": input, **options})
    return _post("/tokenize", request, Tokenization)


def detokenize(tokens: Sequence[int], model: str | None) -> Operation[str]:
    """Turn token ids into text."""
    request = DetokenizeRequest.model_validate({"tokens": tokens, "model": model})
    prepared = PreparedRequest("POST", "/detokenize", request.body())
    return Operation(prepared, lambda response: parse_body(response, Detokenization).prompt)


def tokenizer_info() -> Operation[TokenizerInfo]:
    """Describe the tokenizer."""
    return _get("/tokenizer_info", TokenizerInfo)


def models() -> Operation[tuple[ModelCard, ...]]:
    """List models."""
    prepared = PreparedRequest("GET", "/v1/models")
    return Operation(prepared, lambda response: tuple(parse_body(response, ModelListBody).data))


def health() -> Operation[ServerStatus]:
    """Ask whether the server is up."""
    return Operation(PreparedRequest("GET", "/health"), parse_health)


def ready() -> Operation[Readiness]:
    """Ask whether the server can answer."""
    return Operation(PreparedRequest("GET", "/ready"), parse_readiness)


def list_datastores() -> Operation[DatastoreList]:
    """List loaded datastores, and what else is published."""
    prepared = PreparedRequest("GET", "/v1/datastores")

    def listed(body: DatastoreListBody) -> DatastoreList:
        return DatastoreList(
            loaded=tuple(body.data),
            published=tuple(body.published),
            aliases=body.aliases,
            default=body.default,
            bytes_used=body.bytes_used,
            bytes_limit=body.bytes_limit,
            persistent=body.persistent,
        )

    return Operation(prepared, lambda response: listed(parse_body(response, DatastoreListBody)))


def get_datastore(name: str) -> Operation[Datastore]:
    """Describe one datastore."""
    return _get(_datastore_path(name), Datastore)


def load_datastore(
    name: str, version: str, aliases: Sequence[str] | None, default: bool | None
) -> Operation[Datastore]:
    """Load a datastore, or swap it to another version."""
    return _administer("PUT", _datastore_path(name), Datastore, _load_body(version, aliases, default))


def stream_load_datastore(
    name: str, version: str, aliases: Sequence[str] | None, default: bool | None
) -> StreamOperation[LoadEvent]:
    """Load a datastore, or swap it to another version, with progress."""
    body = _load_body(version, aliases, default) | {"stream": True}
    return StreamOperation(PreparedRequest("PUT", _datastore_path(name), body, admin=True), LoadDecoder)


def roll_back_datastore(name: str) -> Operation[Datastore]:
    """Swap a datastore back to the version that served before."""
    return _administer("POST", f"{_datastore_path(name)}/rollback", Datastore)


def unload_datastore(name: str) -> Operation[None]:
    """Drain a datastore, then unload it."""
    return Operation(PreparedRequest("DELETE", _datastore_path(name), admin=True), parse_nothing)


def learn_documents(name: str, documents: Documents, update: bool) -> Operation[Learned]:
    """Add documents to a datastore."""
    request = LearnRequest.model_validate({"documents": documents, "update": update})
    return _administer("POST", f"{_datastore_path(name)}/documents", Learned, request.body())


def forget_document(name: str, document_id: str) -> Operation[Forgotten]:
    """Delete a document from a datastore."""
    return _administer("DELETE", _document_path(name, document_id), Forgotten)


def compact_datastore(name: str) -> Operation[Datastore]:
    """Fold what was learned and deleted into a new version."""
    return _administer("POST", f"{_datastore_path(name)}/compact", Datastore)


def purge_documents(name: str, document_ids: Sequence[str]) -> Operation[Purged]:
    """Remove documents from every version on the disk."""
    request = PurgeRequest.model_validate({"documents": document_ids})
    return _administer("POST", f"{_datastore_path(name)}/purge", Purged, request.body())


def list_versions(name: str) -> Operation[tuple[PublishedVersion, ...]]:
    """List a datastore's published versions."""
    prepared = PreparedRequest("GET", f"{_datastore_path(name)}/versions", admin=True)
    return Operation(prepared, lambda response: tuple(parse_body(response, VersionListBody).data))


def verify_datastore(name: str, version: str | None) -> Operation[Verified]:
    """Check a datastore's files."""
    return _administer("POST", f"{_datastore_path(name)}/verify", Verified, VerifyRequest(version=version).body())


def diff_versions(name: str, a: str, b: str) -> Operation[VersionDiff]:
    """Compare two versions of a datastore."""
    query = DiffQuery(a=a, b=b).body()
    prepared = PreparedRequest("GET", f"{_datastore_path(name)}/diff", admin=True, query=query)
    return Operation(prepared, lambda response: parse_body(response, VersionDiff))


def export_documents(name: str) -> StreamOperation[ExportedDocument]:
    """Read every document that a datastore serves."""
    return StreamOperation(PreparedRequest("GET", f"{_datastore_path(name)}/export", admin=True), DocumentDecoder)


def _get(path: str, answer: type[ModelT]) -> Operation[ModelT]:
    return Operation(PreparedRequest("GET", path), lambda response: parse_body(response, answer))


def _post(path: str, request: RequestPart, answer: type[ModelT]) -> Operation[ModelT]:
    return Operation(PreparedRequest("POST", path, request.body()), lambda response: parse_body(response, answer))


def _administer(method: str, path: str, answer: type[ModelT], body: dict[str, Any] | None = None) -> Operation[ModelT]:
    return Operation(PreparedRequest(method, path, body, admin=True), lambda response: parse_body(response, answer))


def _post_for_events(path: str, request: RequestPart, event: type[ModelT]) -> StreamOperation[ModelT]:
    return StreamOperation(_prepare_stream(path, request), lambda response: EventDecoder(response, event))


def _prepare_stream(path: str, request: RequestPart) -> PreparedRequest:
    return PreparedRequest("POST", path, request.body() | {"stream": True})


def _load_body(version: str, aliases: Sequence[str] | None, default: bool | None) -> dict[str, Any]:
    if isinstance(aliases, str):
        raise ValueError(f"`aliases` must be a list of words, got {aliases!r}")
    given = None if aliases is None else list(aliases)
    return LoadRequest(version=version, aliases=given, default=default).body()


def _datastore_path(name: str) -> str:
    # These would address another route: servers read a quoted slash as a slash. All else is quoted into one segment.
    if name in {"", ".", ".."} or "/" in name:
        raise ValueError(f"`name` must name a datastore, got {name!r}")
    return f"/v1/datastores/{quote(name, safe='')}"


def _document_path(name: str, document_id: str) -> str:
    if not document_id:
        raise ValueError("`document_id` must name a document, got ''")
    quoted = quote(document_id, safe="")
    # Dots are never quoted by `quote`, but alone they would be taken out of the path.
    segment = quoted.replace(".", "%2E") if document_id in {".", ".."} else quoted
    return f"{_datastore_path(name)}/documents/{segment}"
