"""Liveness, readiness and version; never behind a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from knnlm_core import __version__
from knnlm_core.errors import NotReady, ServiceError
from knnlm_server.api.errors import error_response
from knnlm_server.api.schemas.errors import ErrorBody
from knnlm_server.api.schemas.health import Alive, Ready, Version
from knnlm_server.api.state import service

router = APIRouter()

_DEAD = "the engine's thread has died"


@router.get(
    "/health",
    summary="Liveness",
    response_model=None,
    responses={200: {"model": Alive}, 503: {"model": ErrorBody}},
)
async def health(request: Request) -> Response:
    """200 while the process can work at all; 503 once the engine's thread has died or the start has failed."""
    state = service(request)
    is_dead = state.backend is not None and not state.backend.engine.is_alive
    if is_dead or state.failure is not None:
        return error_response(NotReady(state.failure or _DEAD))
    return JSONResponse({"status": "ok"})


@router.get(
    "/ready",
    summary="Readiness",
    response_model=None,
    responses={200: {"model": Ready}, 503: {"model": ErrorBody}},
)
async def ready(request: Request) -> Response:
    """200 once a model can answer; until then 503 with the reason, and again once none can."""
    try:
        backend = service(request).require()
    except ServiceError as error:
        return error_response(error)
    if not backend.engine.is_alive:
        return error_response(NotReady(_DEAD))
    load = backend.engine.load()
    return JSONResponse(
        {"status": "ready", "model": backend.model_name, "datastores": backend.registry.names(), **load._asdict()}
    )


@router.get("/version", summary="Version", response_model=None, responses={200: {"model": Version}})
async def version() -> dict[str, Any]:
    """The server's version."""
    return {"version": __version__}
