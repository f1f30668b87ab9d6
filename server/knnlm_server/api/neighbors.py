"""``POST /v1/neighbors``: what datastores would retrieve after a context, in the text that it comes from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from knnlm_core.datastore.documents import Document, EntryLocation
from knnlm_core.datastore.entries import Entries
from knnlm_core.errors import DatastoreNotFound, InvalidParameter, PromptTooLong
from knnlm_core.knn.gates import ALWAYS
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.retrieval import Retrieval
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.engine_work import run_to_end
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.common import TokenIds
from knnlm_server.api.schemas.neighbors import RESPONSES, NeighborsBody
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import Selection, select
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.state import Backend, service
from knnlm_server.engine.neighbors import ContextNeighbors, NeighborsRequest, NextTokens

router = APIRouter(route_class=JsonRoute, dependencies=[KeyRequired])


@router.post("/v1/neighbors", summary="Look up neighbours", response_model=None, responses=RESPONSES)
async def neighbors(body: NeighborsBody, request: Request) -> Response:
    """Search after each context: the entries found with their source, and what they say comes next.

    Several datastores are searched each; their entries come in one list, ordered by distance where `knn.mixture` is
    neighbors and by weight where each datastore has a λ of its own.
    """
    state = service(request)
    body.log_unknown()
    body.check()
    backend = state.require()
    selection = select(state, body.model, body.knn, body.exclude_documents)
    lease = SharedLease(selection)
    try:
        return JSONResponse(await until_disconnect(request, _answer(body, request, backend, selection, lease)))
    finally:
        lease.drop()


async def _answer(
    body: NeighborsBody, request: Request, backend: Backend, selection: Selection, lease: SharedLease
) -> dict[str, Any]:
    if selection.retrieval is None:
        raise InvalidParameter("neighbours need a datastore, and this request names none", param="model")
    contexts = await asyncio.get_running_loop().run_in_executor(backend.threads.reading, _read_contexts, backend, body)
    retrieval = selection.retrieval.gated(ALWAYS)
    found = await _find(backend, lease, _Plan(request.state.request_id, contexts, retrieval, body.limit))
    results = await lease.in_thread(_render, backend.tokenizer, selection.stores, found, body.context_chars)
    return {
        "object": "neighbors",
        "model": selection.model,
        "system_fingerprint": selection.system_fingerprint,
        "results": [
            {"index": index, "tokens": len(context), **result}
            for index, (context, result) in enumerate(zip(contexts, results, strict=True))
        ],
    }


def _read_contexts(backend: Backend, body: NeighborsBody) -> list[list[int]]:
    return [_read(backend, given, index) for index, given in enumerate(body.contexts())]


def _read(backend: Backend, given: str | TokenIds, index: int) -> list[int]:
    if isinstance(given, str):
        token_ids = backend.tokenizer.encode(given)
    else:
        token_ids = given
        backend.tokenizer.check_ids(given, backend.lm.identity.vocab_size, param="input")
    limit = backend.lm.max_length
    if not token_ids:
        raise InvalidParameter(f"`input` must hold at least 1 token per context, context {index} has 0", param="input")
    if len(token_ids) > limit:
        raise PromptTooLong(
            f"`input` must hold at most {limit} tokens per context, the model's context, "
            f"context {index} has {len(token_ids)}",
            param="input",
        )
    return token_ids


class _Plan(NamedTuple):
    request_id: str
    contexts: list[list[int]]
    retrieval: Retrieval
    limit: int


async def _find(backend: Backend, lease: SharedLease, plan: _Plan) -> list[ContextNeighbors]:
    found: list[ContextNeighbors] = []
    await run_to_end(
        backend.engine,
        lease,
        lambda call: NeighborsRequest(
            *plan,
            on_context=lambda _, neighbors: call.report(found.append, neighbors),
            on_end=call.end,
        ),
    )
    return found


# -- rendering ---------------------------------------------------------------------------------------------------------


def _render(
    tokenizer: Tokenizer, stores: Sequence[Entries], found: Sequence[ContextNeighbors], context_chars: int
) -> list[dict[str, Any]]:
    sources: dict[tuple[int, int], dict[str, Any]] = {}
    for number, store in enumerate(stores):
        ids = {i for context in found for i in context.nearest.entry_ids[context.nearest.sources == number].tolist()}
        for entry_id, source in _sources(store, sorted(ids), context_chars).items():
            sources[number, entry_id] = {"datastore": store.name, **source}
    return [
        {
            "neighbors": [
                {
                    "entry_id": entry_id,
                    "distance": distance,
                    "weight": weight,
                    "token_id": value,
                    "token": tokenizer.token_text(value),
                    **sources[number, entry_id],
                }
                for number, entry_id, distance, value, weight in zip(
                    *(column.tolist() for column in context.nearest), strict=True
                )
                if (number, entry_id) in sources  # its document may have been deleted meanwhile
            ],
            "next_tokens": _next_tokens(tokenizer, context.next_tokens),
        }
        for context in found
    ]


def _sources(datastore: Entries, entry_ids: Sequence[int], context_chars: int) -> dict[int, dict[str, Any]]:
    """Where entries, in order, stand, and the text around them; each document is read once."""
    sources: dict[int, dict[str, Any]] = {}
    document: Document | None = None
    for place in datastore.locate(entry_ids):
        if place is None:
            continue
        if document is None or document.id != place.document_id:
            try:
                document = datastore.document(place.document_id)
            except DatastoreNotFound:  # deleted since the line above
                continue
        sources[place.entry_id] = _source(place, document.text, context_chars)
    return sources


def _source(place: EntryLocation, text: str, context_chars: int) -> dict[str, Any]:
    start, end = place.char_start, place.char_end
    return {
        "document_id": place.document_id,
        "uri": place.uri,
        "title": place.title,
        "licence": place.licence,
        "char_start": start,
        "char_end": end,
        "before": text[max(0, start - context_chars) : start],
        "text": text[start:end],
        "after": text[end : end + context_chars],
    }


def _next_tokens(tokenizer: Tokenizer, tokens: NextTokens) -> list[dict[str, Any]]:
    return [
        {"token_id": token_id, "token": tokenizer.token_text(token_id), "p_knn": p_knn, "p_lm": p_lm, "p": p}
        for token_id, p_knn, p_lm, p in zip(*(column.tolist() for column in tokens), strict=True)
    ]
