"""``/v1/datastores/{name}/compact`` and ``…/purge``: new versions are made beside what serves, then swapped in."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from knnlm_core.datastore import layout
from knnlm_core.datastore.ledger import check_document_ids
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.maintenance.purge import PurgeReport, purge
from knnlm_core.errors import DatastoreConflict, InvalidParameter
from knnlm_server.api.datastore_card import render_card
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.datastores import DatastoreCard, Name
from knnlm_server.api.schemas.documents import MAX_LEARNED_DOCUMENTS
from knnlm_server.api.schemas.maintenance import PurgeBody, Purged
from knnlm_server.api.security import AdminRequired
from knnlm_server.api.state import backend
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.table import DatastoreStatus

router = APIRouter(route_class=JsonRoute, dependencies=[AdminRequired])


@router.post(
    "/v1/datastores/{name}/compact",
    summary="Compact a datastore",
    response_model=None,
    responses={200: {"model": DatastoreCard}},
)
async def compact_datastore(name: Name, request: Request) -> dict[str, Any]:
    """Fold what was learned and deleted into a new version, and swap to it. Requests go on meanwhile."""
    state = backend(request)
    loop = asyncio.get_running_loop()
    return render_card(await loop.run_in_executor(state.threads.datastores, partial(_compact, state.registry, name)))


@router.post(
    "/v1/datastores/{name}/purge",
    summary="Purge documents",
    response_model=None,
    responses={200: {"model": Purged}},
)
async def purge_documents(name: Name, body: PurgeBody, request: Request) -> dict[str, Any]:
    """Remove documents from every version on the disk, and search every file of the name for traces of them."""
    state = backend(request)
    if len(body.documents) > MAX_LEARNED_DOCUMENTS:
        raise InvalidParameter(
            f"`documents` must name at most {MAX_LEARNED_DOCUMENTS} documents, got {len(body.documents)}",
            param="documents",
        )
    check_document_ids(body.documents)
    loop = asyncio.get_running_loop()
    report, status = await loop.run_in_executor(
        state.threads.datastores, partial(_purge, state.registry, name, body.documents)
    )
    return {
        "object": "datastore.purge",
        "documents": list(report.documents),
        "revision": report.revision,
        "replaced_versions": report.versions,
        "files_searched": len({search.path for search in report.proof.searches}),
        "datastore": render_card(status),
    }


def _compact(registry: Registry, given: str) -> DatastoreStatus:
    root, name = _serves_current(registry, given)
    compact(root, name)
    return registry.load(name).status


def _purge(registry: Registry, given: str, document_ids: list[str]) -> tuple[PurgeReport, DatastoreStatus]:
    root, name = _serves_current(registry, given)
    report = purge(root, name, document_ids)
    registry.replaced(name, report.versions)
    # Also where its version stays: what was learned is read anew, without what has gone.
    return report, registry.load(name).status


def _serves_current(registry: Registry, given: str) -> tuple[Path, str]:
    """The root and the name, of which the version is written anew that CURRENT names."""
    status = registry.status(given)
    assert registry.root is not None, "a datastore is loaded without a root. This is a bug."
    current = layout.read_current(registry.root, status.name)
    if current.version != status.datastore.version:
        raise DatastoreConflict(
            f"datastore {status.name!r} serves version {status.datastore.version}, and CURRENT names "
            f"{current.version}; load the current version first"
        )
    return registry.root, status.name
