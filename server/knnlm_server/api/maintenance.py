"""``/v1/datastores/{name}/compact`` and ``…/purge``: new versions are made beside what serves, then swapped in."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, NamedTuple, Self

from fastapi import APIRouter, Request

from knnlm_core.datastore import layout
from knnlm_core.datastore.ledger import check_document_ids
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.maintenance.purge import PurgeReport, purge
from knnlm_core.datastore.maintenance.stages import StageProgress
from knnlm_core.errors import DatastoreConflict, InvalidParameter, KnnlmError
from knnlm_server.api.datastore_card import render_card
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.datastores import DatastoreCard, Name
from knnlm_server.api.schemas.documents import MAX_LEARNED_DOCUMENTS
from knnlm_server.api.schemas.maintenance import PurgeBody, Purged
from knnlm_server.api.security import AdminRequired, actor_of
from knnlm_server.api.state import Backend, backend, service
from knnlm_server.registry.table import DatastoreStatus


class _Work(NamedTuple):
    """How work on the disk shows who began it, and ends when the server does."""

    progress: StageProgress
    actor: str

    @classmethod
    def of(cls, request: Request) -> Self:
        require_open = service(request).require_open
        return cls(lambda stage, done, total: require_open(), actor_of(request))


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
    compacting = partial(_compact, state, name, _Work.of(request))
    return render_card(await loop.run_in_executor(state.threads.maintenance, compacting))


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
    purging = partial(_purge, state, name, body.documents, _Work.of(request))
    report, status = await loop.run_in_executor(state.threads.maintenance, purging)
    return {
        "object": "datastore.purge",
        "documents": list(report.documents),
        "revision": report.revision,
        "replaced_versions": report.versions,
        "files_searched": len({search.path for search in report.proof.searches}),
        "datastore": render_card(status),
    }


def _compact(state: Backend, given: str, work: _Work) -> DatastoreStatus:
    registry = state.registry
    root, name = registry.home(given)
    with registry.rewriting(name) as reload:
        status = registry.status(name)
        serving, current = status.datastore.version, layout.read_current(root, name).version
        if serving != current:
            raise DatastoreConflict(
                f"datastore {name!r} serves version {serving}, and CURRENT names {current}; load the current version "
                "first"
            )
        new = compact(root, name, progress=work.progress, actor=work.actor)
        if new == serving:
            return registry.status(name)
        return reload(None if status.served.follows_current else new).status


def _purge(state: Backend, given: str, document_ids: list[str], work: _Work) -> tuple[PurgeReport, DatastoreStatus]:
    registry = state.registry
    root, name = registry.home(given)

    def refresh() -> None:
        with registry.change(name) as change:
            change.living.refresh()

    with registry.rewriting(name) as reload:
        with registry.change(name) as change:  # no search finds them from here on, however long the rest takes
            if alive := change.living.alive_among(document_ids):
                change.living.delete(alive, actor=work.actor)
        try:
            report = purge(root, name, document_ids, progress=work.progress, actor=work.actor, before_removal=refresh)
        finally:
            refresh()
        registry.replaced(name, report.versions)
        status = registry.status(name)
        new = report.versions.get(status.datastore.version, status.datastore.version)
        if new == status.datastore.version and not report.segments:
            return report, status
        try:
            version = None if status.served.follows_current else new
            return report, reload(version).status
        except KnnlmError as error:
            raise DatastoreConflict(
                f"the documents are purged from the disk and no search finds them, but what replaces version "
                f"{status.datastore.version} could not be loaded: {error.message}"
            ) from error
