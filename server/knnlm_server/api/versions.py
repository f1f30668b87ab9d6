"""``/v1/datastores/{name}/versions``, ``…/verify``, ``…/diff``, ``…/export``: what a name has on the disk."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from knnlm_core.datastore import layout
from knnlm_core.datastore.maintenance.diff import diff
from knnlm_core.datastore.maintenance.export import document_line
from knnlm_core.datastore.maintenance.verify import verify
from knnlm_core.datastore.maintenance.versions import list_versions
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DocumentNotFound, KnnlmError
from knnlm_server.api.errors import error_body
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.datastores import Name
from knnlm_server.api.schemas.events import json_lines
from knnlm_server.api.schemas.versions import (
    MAX_LISTED,
    ExportedDocument,
    Verified,
    VerifyBody,
    Version,
    VersionDiff,
    VersionList,
)
from knnlm_server.api.security import AdminRequired
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.sse import stream_response
from knnlm_server.api.state import backend
from knnlm_server.registry.registry import Registry

router = APIRouter(route_class=JsonRoute, dependencies=[AdminRequired])

DOCUMENTS_AT_ONCE = 64  # read and sent together

T = TypeVar("T")


@router.get(
    "/v1/datastores/{name}/versions",
    summary="List versions",
    response_model=None,
    responses={200: {"model": VersionList}},
)
async def list_published_versions(name: Name, request: Request) -> dict[str, Any]:
    """Every published version of a loaded name."""
    return {"object": "list", "data": await _on_disk(request, partial(_versions, backend(request).registry, name))}


@router.post(
    "/v1/datastores/{name}/verify",
    summary="Verify a datastore",
    response_model=None,
    responses={200: {"model": Verified}},
)
async def verify_datastore(name: Name, request: Request, body: VerifyBody | None = None) -> dict[str, Any]:
    """Compare every file of the name with its checksum, and ask its canaries. Damage is answered 409."""
    version = body.version if body is not None else None
    return await _on_disk(request, partial(_verified, backend(request).registry, name, version))


@router.get(
    "/v1/datastores/{name}/diff",
    summary="Compare two versions",
    response_model=None,
    responses={200: {"model": VersionDiff}},
)
async def diff_versions(name: Name, a: Version, b: Version, request: Request) -> dict[str, Any]:
    """Documents and settings that differ between two published versions."""
    return await _on_disk(request, partial(_difference, backend(request).registry, name, a, b))


@router.get(
    "/v1/datastores/{name}/export",
    summary="Export documents",
    response_model=None,
    response_class=Response,
    responses={200: {"content": json_lines(ExportedDocument)}},
)
async def export_documents(name: Name, request: Request) -> Response:
    """Every document that is served, learned ones included and deleted ones not, as lines that `knnlm build` reads."""
    state = backend(request)
    lease = state.registry.lease(name)
    holder = SharedLease(lease)
    lines = _lines(lease.datastore)

    async def pieces() -> AsyncIterator[str]:
        try:
            while piece := await holder.in_thread(
                lambda: "".join(islice(lines, DOCUMENTS_AT_ONCE)), executor=state.threads.reading
            ):
                yield piece
        except KnnlmError as error:
            yield json.dumps(error_body(error)) + "\n"

    return stream_response(pieces(), "application/x-ndjson", on_close=holder.drop)


async def _on_disk(request: Request, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(backend(request).threads.maintenance, work)


def _versions(registry: Registry, given: str) -> list[dict[str, Any]]:
    root, name = registry.home(given)
    serving, current = registry.status(name).datastore.version, layout.read_current(root, name).version
    return [
        {**facts._asdict(), "current": facts.version == current, "serving": facts.version == serving}
        for facts in list_versions(root, name)
    ]


def _verified(registry: Registry, given: str, version: str | None) -> dict[str, Any]:
    root, name = registry.home(given)
    found = verify(root, name, version)
    return {
        "object": "datastore.verification",
        "name": name,
        "versions": [
            {
                "version": check.version,
                "files": check.files,
                "bytes": check.num_bytes,
                "canary_queries": check.self_test.queries,
                "recall_at_32": check.self_test.recall_at_32,
            }
            for check in found.versions
        ],
        "revision": found.revision,
        "segments": found.segments,
        "leftovers": list(found.leftovers),
    }


def _difference(registry: Registry, given: str, a: str, b: str) -> dict[str, Any]:
    root, name = registry.home(given)
    found = diff(root, name, layout.check_digest("a", a), layout.check_digest("b", b))
    documents = {"added": found.added, "removed": found.removed, "changed": found.changed}
    return {
        "object": "datastore.diff",
        "name": name,
        "a": found.a,
        "b": found.b,
        "entries": found.entries._asdict(),
        **{kind: list(ids[:MAX_LISTED]) for kind, ids in documents.items()},
        **{f"num_{kind}": len(ids) for kind, ids in documents.items()},
        "num_unchanged": found.unchanged,
        "settings": {path: change._asdict() for path, change in found.settings.items()},
    }


def _lines(datastore: Snapshot) -> Iterator[str]:
    for document_id in datastore.document_ids():
        try:
            yield document_line(datastore.document(document_id))
        except DocumentNotFound:  # deleted meanwhile
            continue
