"""``/v1/datastores``: what is loaded, and swapping it while requests run."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from knnlm_core.datastore.layout import check_name
from knnlm_server.api.datastore_card import render_card
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.load_stream import stream_load
from knnlm_server.api.schemas.datastores import LOADED, DatastoreCard, DatastoreList, LoadBody, Name, Unloaded
from knnlm_server.api.schemas.errors import ErrorBody
from knnlm_server.api.security import AdminRequired, KeyRequired
from knnlm_server.api.state import backend, service
from knnlm_server.registry.serving import Labels

router = APIRouter(route_class=JsonRoute)


@router.get(
    "/v1/datastores",
    dependencies=[KeyRequired],
    summary="List loaded datastores",
    response_model=None,
    # The folder of all datastores may have gone.
    responses={200: {"model": DatastoreList}, 404: {"model": ErrorBody}},
)
async def list_datastores(request: Request) -> dict[str, Any]:
    """Loaded datastores, the names that are published but not loaded, and what else names mean."""
    registry = backend(request).registry
    loaded, serving = registry.statuses(), registry.serving
    names = {status.name for status in loaded}
    return {
        "object": "list",
        "data": [render_card(status) for status in loaded],
        "published": [name for name in registry.published() if name not in names],
        "aliases": serving.aliases,
        "default": None if serving.default is None else serving.resolve(serving.default),
        "bytes_used": registry.budget.used,
        "bytes_limit": registry.budget.limit,
        "persistent": registry.is_persistent,
    }


@router.get(
    "/v1/datastores/{name}",
    dependencies=[KeyRequired],
    summary="Describe a datastore",
    response_model=None,
    responses={200: {"model": DatastoreCard}},
)
async def get_datastore(name: Name, request: Request) -> dict[str, Any]:
    """One loaded datastore."""
    return render_card(backend(request).registry.status(name))


@router.put(
    "/v1/datastores/{name}",
    dependencies=[AdminRequired],
    summary="Load or swap",
    response_model=None,
    responses=LOADED,
)
async def load_datastore(name: Name, request: Request, body: LoadBody | None = None) -> Response:
    """Load a published version, or swap the name to it; requests under way keep the version that they began with.

    Answers 201 when the name was not loaded before, else 200. A load that fails leaves the old version serving.
    """
    body = body if body is not None else LoadBody()
    state = backend(request)
    load = partial(
        state.registry.load,
        check_name(name),
        None if body.version == "current" else body.version,
        labels=Labels(body.aliases, body.default),
    )
    if body.stream:
        return stream_load(load, state.threads.loading)
    # Once begun it goes on, whether or not anybody waits for the answer.
    loaded = await asyncio.get_running_loop().run_in_executor(state.threads.loading, load)
    return JSONResponse(render_card(loaded.status), status_code=201 if loaded.created else 200)


@router.post(
    "/v1/datastores/{name}/rollback",
    dependencies=[AdminRequired],
    summary="Roll back",
    response_model=None,
    responses={200: {"model": DatastoreCard}},
)
async def roll_back_datastore(name: Name, request: Request) -> dict[str, Any]:
    """Swap back to the version that served before; the name stays there until it is loaded anew."""
    state = backend(request)
    rolling = asyncio.get_running_loop().run_in_executor(
        state.threads.loading, state.registry.roll_back, check_name(name)
    )
    return render_card((await rolling).status)


@router.delete(
    "/v1/datastores/{name}",
    dependencies=[AdminRequired],
    summary="Drain and unload",
    response_model=None,
    responses={200: {"model": Unloaded}},
)
async def unload_datastore(name: Name, request: Request) -> dict[str, Any]:
    """Take no new request for the name, wait for those under way, unload."""
    state, timeout_s = backend(request), service(request).settings.drain_timeout_s
    meant = state.registry.resolve(name)
    await asyncio.get_running_loop().run_in_executor(state.threads.loading, state.registry.unload, meant, timeout_s)
    return {"object": "datastore", "name": meant, "state": "unloaded"}
