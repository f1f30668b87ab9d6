"""``/v1/datastores``: what is loaded, and swapping it while requests run."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from knnlm_core.datastore.calibration import Calibration
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.datastores import DatastoreCard, DatastoreList, LoadBody, Name, Unloaded
from knnlm_server.api.schemas.errors import ErrorBody
from knnlm_server.api.security import AdminRequired, KeyRequired
from knnlm_server.api.state import backend, service
from knnlm_server.registry.registry import DatastoreStatus

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
    """Loaded datastores, and the names that are published but not loaded."""
    registry = backend(request).registry
    loaded = registry.statuses()
    names = {status.datastore.name for status in loaded}
    return {
        "object": "list",
        "data": [_render(status) for status in loaded],
        "published": [name for name in registry.published() if name not in names],
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
    return _render(backend(request).registry.status(name))


@router.put(
    "/v1/datastores/{name}",
    dependencies=[AdminRequired],
    summary="Load or swap",
    response_model=None,
    responses={
        200: {"model": DatastoreCard, "description": "Swapped"},
        201: {"model": DatastoreCard, "description": "Loaded"},
    },
)
async def load_datastore(name: Name, request: Request, body: LoadBody | None = None) -> Response:
    """Load a published version, or swap the name to it; requests under way keep the version that they began with.

    Answers 201 when the name was not loaded before, else 200. A load that fails leaves the old version serving.
    """
    version = body.version if body is not None else "current"
    registry = backend(request).registry
    # On a thread of its own: checking and touching files must not stall the streams.
    loaded = await asyncio.to_thread(registry.load, name, None if version == "current" else version)
    return JSONResponse(_render(loaded.status), status_code=201 if loaded.created else 200)


@router.delete(
    "/v1/datastores/{name}",
    dependencies=[AdminRequired],
    summary="Drain and unload",
    response_model=None,
    responses={200: {"model": Unloaded}},
)
async def unload_datastore(name: Name, request: Request) -> dict[str, Any]:
    """Take no new request for the name, wait for those under way, unload."""
    timeout_s = service(request).settings.drain_timeout_s
    await asyncio.to_thread(backend(request).registry.unload, name, timeout_s)
    return {"object": "datastore", "name": name, "state": "unloaded"}


def _render(status: DatastoreStatus) -> dict[str, Any]:
    datastore = status.datastore
    return {
        "object": "datastore",
        "name": datastore.name,
        "version": datastore.version,
        "generation": status.generation,
        "state": status.state,
        "entries": datastore.entries,
        "bytes": datastore.num_bytes,
        "unit": datastore.manifest.unit,
        "documents": datastore.manifest.documents.count,
        "leases": status.leases,
        "calibration": _render_calibration(datastore.calibration) if datastore.calibration is not None else None,
        "model_fingerprint": datastore.manifest.lm.model_fingerprint,
    }


def _render_calibration(calibration: Calibration) -> dict[str, Any]:
    """What requests use and how good it was; the protocol's long lists of digests stay in the file."""
    return {
        "id": calibration.id,
        "k": calibration.k,
        "temperature": calibration.knn_temperature,
        "lambda": calibration.lmbda,
        "gate": calibration.gate,
        "helps": calibration.helps,
        "report": calibration.report,
        "held_out_documents": calibration.protocol.get("held_out_documents"),
    }
