"""Which model and datastore a request means, and how it retrieves: its own wishes over the store's calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knnlm_core.datastore.exclusion import merge_ranges
from knnlm_core.errors import InvalidParameter, ModelNotFound
from knnlm_core.knn.gates import parse_gate
from knnlm_core.mixture import Retrieval
from knnlm_server.api.schemas.common import MAX_EXCLUDED_DOCUMENTS, KnnBody
from knnlm_server.api.state import Backend, Service
from knnlm_server.registry.registry import Lease

SEPARATOR = "@"


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request uses; whoever selects releases the lease."""

    model: str  # as answers name it
    lease: Lease | None
    retrieval: Retrieval | None
    system_fingerprint: str

    def release(self) -> None:
        """Give the lease back, if there is one."""
        if self.lease is not None:
            self.lease.release()


def select(
    service: Service, model: str | None, knn: KnnBody | None, exclude_documents: Sequence[str] | None = None
) -> Selection:
    """Resolve ``model`` and ``knn`` to a leased datastore and its parameters.

    Raises:
        ModelNotFound: the LM's name is not the one served.
        DatastoreNotFound: the datastore is not loaded, or holds no document of an excluded id.
        InvalidParameter: ``model`` and ``knn.datastore`` disagree, retrieval fields without a datastore, or too many
            documents are excluded.
        InvalidKnnParams, UnsupportedFeature: a field of ``knn`` is out of bounds or not offered.
    """
    backend = service.require()
    if knn is not None:
        knn.refuse_unsupported()
    excluded = _distinct(exclude_documents or ())
    name = _datastore_name(backend, model, knn, service.settings.default_datastore)
    fingerprint = backend.lm.identity.model_fingerprint
    if name is None:
        _refuse_retrieval_fields(knn, excluded)
        return Selection(backend.model_name, None, None, fingerprint)
    lease = backend.registry.lease(name)
    try:
        retrieval = _retrieval(lease, knn or KnnBody(), excluded)
    except BaseException:
        lease.release()
        raise
    full_name = f"{backend.model_name}{SEPARATOR}{name}"
    return Selection(full_name, lease, retrieval, f"{fingerprint}-{lease.label}")


def check_model(backend: Backend, model: str | None) -> None:
    """For routes that need the LM alone. Raises ModelNotFound, DatastoreNotFound: ``model`` is not served."""
    if name := _datastore_in_model(backend, model):
        backend.registry.status(name)


def _datastore_in_model(backend: Backend, model: str | None) -> str:
    lm, separator, datastore = (model or backend.model_name).partition(SEPARATOR)
    if lm != backend.model_name:
        raise ModelNotFound(f"model {lm!r} is not served here; served: {backend.model_name!r}", param="model")
    if separator and not datastore:
        raise ModelNotFound(f"model {model!r} names no datastore after {SEPARATOR!r}", param="model")
    return datastore


def _datastore_name(backend: Backend, model: str | None, knn: KnnBody | None, default: str | None) -> str | None:
    by_model = _datastore_in_model(backend, model)
    by_knn = knn.datastore if knn is not None else None
    assert by_knn is None or isinstance(by_knn, str)
    if by_knn == "":
        raise InvalidParameter("`knn.datastore` must be the name of a loaded datastore, got ''", param="knn.datastore")
    if by_model and by_knn and by_model != by_knn:
        raise InvalidParameter(
            f"`model` names datastore {by_model!r} but `knn.datastore` names {by_knn!r}; they must agree",
            param="knn.datastore",
        )
    return by_model or by_knn or default


def _distinct(exclude_documents: Sequence[str]) -> Sequence[str]:
    if len(exclude_documents) > MAX_EXCLUDED_DOCUMENTS:
        raise InvalidParameter(
            f"`exclude_documents` must name at most {MAX_EXCLUDED_DOCUMENTS} documents, got {len(exclude_documents)}",
            param="exclude_documents",
        )
    return list(dict.fromkeys(exclude_documents))


def _refuse_retrieval_fields(knn: KnnBody | None, exclude_documents: Sequence[str]) -> None:
    """Fields that could have no effect are refused, not ignored; a trace makes sense without a store too."""
    given = [name for name, value in knn or () if value is not None and name not in ("trace", "datastore")]
    if given:
        field = f"knn.{min(given).replace('lmbda', 'lambda')}"
        raise InvalidParameter(f"`{field}` needs a datastore, and this request names none", param=field)
    if exclude_documents:
        raise InvalidParameter(
            "`exclude_documents` needs a datastore, and this request names none", param="exclude_documents"
        )


def _retrieval(lease: Lease, knn: KnnBody, exclude_documents: Sequence[str]) -> Retrieval:
    datastore = lease.datastore
    calibration = datastore.calibration
    missing = [
        field
        for field, value in (("k", knn.k), ("temperature", knn.temperature), ("lambda", knn.lmbda))
        if value is None
    ]
    if calibration is None and missing:
        raise InvalidParameter(
            f"datastore {datastore.name!r} has no calibration, so `knn.{missing[0]}` must be given",
            param=f"knn.{missing[0]}",
        )
    exclude = merge_ranges(datastore.document_entries(document_id) for document_id in exclude_documents)
    retrieval = Retrieval(
        datastore=datastore,
        k=knn.k if knn.k is not None else calibration.k,  # type: ignore[union-attr]
        knn_temperature=knn.temperature if knn.temperature is not None else calibration.knn_temperature,  # type: ignore[union-attr]
        lmbda=knn.lmbda if knn.lmbda is not None else calibration.lmbda,  # type: ignore[union-attr]
        gate=parse_gate(knn.gate if knn.gate is not None else calibration.gate if calibration else "always"),
        exclude=exclude,
    )
    retrieval.check()
    return retrieval
