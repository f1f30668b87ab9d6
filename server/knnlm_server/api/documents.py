"""``/v1/datastores/{name}/documents``: learn and forget while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.convertors import PathConvertor, register_url_convertor

from knnlm_core.datastore.documents import Document, normalise_newlines
from knnlm_core.datastore.ledger import check_document_ids
from knnlm_core.datastore.living import document_exists
from knnlm_core.datastore.manifest import ContextSection
from knnlm_core.datastore.segments import NewDocument
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreConflict, InvalidParameter
from knnlm_core.lm.tokenizer import Encoding
from knnlm_core.windows import WindowSizes
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.engine_call import EngineCall
from knnlm_server.api.engine_work import run_to_end
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.datastores import Name
from knnlm_server.api.schemas.documents import (
    MAX_FIELD_CHARACTERS,
    MAX_LEARNED_DOCUMENTS,
    MAX_LEARNED_TOKENS,
    MAX_TAGS,
    DocumentBody,
    DocumentId,
    Forgotten,
    LearnBody,
    Learned,
)
from knnlm_server.api.security import AdminRequired, actor_of
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.state import Backend, backend
from knnlm_server.engine.learning import LearnRequest
from knnlm_server.registry.generation import Lease
from knnlm_server.registry.registry import Registry

router = APIRouter(route_class=JsonRoute, dependencies=[AdminRequired])

_KEY_BYTES = 2  # of each number of a key, as it is kept


class _AnyText(PathConvertor):
    # Starlette's own `path` ends before a line's end: an id's first line would name another document.
    regex = r"(?s:.*)"


register_url_convertor("text", _AnyText())


@router.post(
    "/v1/datastores/{name}/documents",
    status_code=201,
    summary="Learn documents",
    response_model=None,
    responses={201: {"model": Learned}},
)
async def learn_documents(name: Name, body: LearnBody, request: Request) -> Response:
    """Add documents now: on the disk before the answer is sent, retrieved by every request that begins after it."""
    state = backend(request)
    _check(body)
    lease = state.registry.lease(name)
    holder = SharedLease(lease)
    try:
        _refuse_known(body, lease.datastore)
        encoded = await until_disconnect(request, _encode(state, body, request, lease, holder))
        # From here on it happens, whether or not anybody waits for the answer.
        card = await holder.in_thread(
            _learn, state.registry, name, encoded, body.update, actor_of(request), executor=state.threads.changing
        )
    finally:
        holder.drop()
    documents = [
        {"id": document.id, "tokens": len(encoding.token_ids), "entries": max(0, len(encoding.token_ids) - 1)}
        for document, encoding in zip(encoded.documents, encoded.encodings, strict=True)
    ]
    return JSONResponse({**card, "documents": documents}, status_code=201)


@router.delete(
    "/v1/datastores/{name}/documents/{document_id:text}",
    summary="Forget a document",
    response_model=None,
    responses={200: {"model": Forgotten}},
)
async def forget_document(name: Name, document_id: DocumentId, request: Request) -> dict[str, Any]:
    """Delete a document now: no search that begins after the answer finds it, in whichever version or request."""
    state = backend(request)
    check_document_ids([document_id])
    forgetting = asyncio.get_running_loop().run_in_executor(
        state.threads.changing, _forget, state.registry, name, document_id, actor_of(request)
    )
    return {**await asyncio.shield(forgetting), "document_id": document_id}


def _learn(registry: Registry, name: str, encoded: _Encoded, update: bool, actor: str) -> dict[str, Any]:
    with registry.change(name) as change:
        into = change.lease.datastore
        if into.manifest.context != encoded.context:
            raise DatastoreConflict(
                f"datastore {name!r} was swapped to a version with other windows while the documents were read; "
                "send them again"
            )
        new = encoded.new(into.dim)
        change.require_room(_KEY_BYTES * into.dim * sum(len(one.values) for one in new))
        ledger = change.living.add(new, into, replace=update, actor=actor)
        return _revision(change.lease, ledger.revision)


def _forget(registry: Registry, name: str, document_id: str, actor: str) -> dict[str, Any]:
    with registry.change(name) as change:
        ledger = change.living.delete([document_id], actor=actor)
        return _revision(change.lease, ledger.revision)


def _revision(lease: Lease, revision: int) -> dict[str, Any]:
    return {
        "object": "datastore.revision",
        "name": lease.datastore.name,
        "version": lease.datastore.version,
        "generation": lease.generation,
        "revision": revision,
    }


def _refuse_known(body: LearnBody, datastore: Snapshot) -> None:
    """Before any work; what is learned meanwhile is refused at the end."""
    for document in body.documents if not body.update else ():
        if datastore.has_document(document.id):
            raise document_exists(document.id, datastore.name)


def _check(body: LearnBody) -> None:
    if not 1 <= len(body.documents) <= MAX_LEARNED_DOCUMENTS:
        raise InvalidParameter(
            f"`documents` must hold 1 … {MAX_LEARNED_DOCUMENTS} documents, got {len(body.documents)}", param="documents"
        )
    check_document_ids([document.id for document in body.documents])
    for document in body.documents:
        if len(document.tags) > MAX_TAGS:
            raise InvalidParameter(
                f"`documents` must have at most {MAX_TAGS} tags each, {document.id[:200]!r} has {len(document.tags)}",
                param="documents",
            )
        for field in ("uri", "title", "licence"):
            if len(getattr(document, field) or "") > MAX_FIELD_CHARACTERS:
                raise InvalidParameter(
                    f"`documents` must have a `{field}` of at most {MAX_FIELD_CHARACTERS} characters, that of "
                    f"{document.id[:200]!r} has {len(getattr(document, field))}",
                    param="documents",
                )
        if (nul := document.text.find("\0")) >= 0:
            raise InvalidParameter(
                f"`documents` must hold text, {document.id[:200]!r} has a NUL at character {nul}", param="documents"
            )


class _Encoded(NamedTuple):
    """Documents whose keys the engine has made."""

    documents: list[Document]
    encodings: list[Encoding]
    work: LearnRequest
    context: ContextSection  # how they were cut

    def new(self, dim: int) -> list[NewDocument]:
        """Keys and values put together; not for the event loop, since these may be hundreds of megabytes."""
        return [
            NewDocument(document, self.work.keys(i, dim), encoding.token_ids[1:], encoding.char_spans[1:])
            for i, (document, encoding) in enumerate(zip(self.documents, self.encodings, strict=True))
        ]


async def _encode(state: Backend, body: LearnBody, request: Request, lease: Lease, holder: SharedLease) -> _Encoded:
    """Tokens on a thread, keys on the engine's."""
    documents = [_document(given) for given in body.documents]
    encodings = await holder.in_thread(_tokenise, state, documents, executor=state.threads.reading)
    context = lease.datastore.manifest.context
    entries = sum(max(0, len(encoding.token_ids) - 1) for encoding in encodings)
    # Before the work; what others learn meanwhile is counted once more at the end.
    state.registry.budget.require(
        f"learning in datastore {lease.datastore.name!r}", _KEY_BYTES * lease.datastore.dim * entries
    )
    windows = WindowSizes(context.window, context.stride)
    texts = [encoding.token_ids for encoding in encodings]
    work: LearnRequest | None = None

    def make(call: EngineCall) -> LearnRequest:
        nonlocal work
        work = LearnRequest(request.state.request_id, texts, windows, on_end=call.end)
        return work

    await run_to_end(state.engine, holder, make)
    assert work is not None
    return _Encoded(documents, encodings, work, context)


def _document(given: DocumentBody) -> Document:
    text = normalise_newlines(given.text)
    return Document(given.id, text, given.uri, given.title, given.licence, tuple(given.tags))


def _tokenise(state: Backend, documents: Sequence[Document]) -> list[Encoding]:
    encodings: list[Encoding] = []
    tokens = 0
    for document in documents:
        encodings.append(state.tokenizer.encode_with_spans(document.text))
        tokens += len(encodings[-1].token_ids)
        if tokens > MAX_LEARNED_TOKENS:
            raise InvalidParameter(
                f"`documents` must hold at most {MAX_LEARNED_TOKENS} tokens in all, got {tokens} in the first "
                f"{len(encodings)} documents",
                param="documents",
            )
    return encodings
