"""Which model and datastores a request means, and how it retrieves: its own wishes over the stores' calibrations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from knnlm_core.datastore.entries import Entries
from knnlm_core.datastore.exclusion import merge_ranges
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DocumentNotFound, InvalidParameter, ModelNotFound, UnsupportedFeature
from knnlm_core.retrieval import MAX_SOURCES, Retrieval, Searchable, Source, with_gate, with_lambda_mode
from knnlm_core.types import EntryRange
from knnlm_server.api.schemas.common import MAX_EXCLUDED_DOCUMENTS, KnnBody, WeightedDatastore
from knnlm_server.api.state import Backend, Service
from knnlm_server.registry.generation import Lease

SEPARATOR = "@"
STORE_SEPARATOR = "+"  # no name of a datastore can hold it


@dataclass(frozen=True, slots=True)
class Selection:
    """What a request uses; whoever selects releases the leases.

    Attributes:
        model: as answers name it.
        leases: one per datastore, in the order of the retrieval's sources.
        weighs_by_prompt: the retrieval's weights are only provisional: the prompt decides.
        drafts: whether the request lets drafts be made.
    """

    model: str
    leases: tuple[Lease, ...]
    retrieval: Retrieval | None
    system_fingerprint: str
    weighs_by_prompt: bool = False
    drafts: bool = True

    @property
    def labels(self) -> str:
        """What answers name the datastores; empty without one."""
        return STORE_SEPARATOR.join(lease.label for lease in self.leases)

    @property
    def stores(self) -> tuple[Entries, ...]:
        """The datastores, in the order of the retrieval's sources."""
        return tuple(lease.datastore for lease in self.leases)

    def release(self) -> None:
        """Give the leases back, if there are any."""
        for lease in self.leases:
            lease.release()


def select(
    service: Service,
    model: str | None,
    knn: KnnBody | None,
    exclude_documents: Sequence[str] | None = None,
    *,
    has_prompt: bool = False,
) -> Selection:
    """Resolve ``model`` and ``knn`` to leased datastores and their parameters.

    Args:
        has_prompt: whether there is one, which can decide the weights of datastores, and whose contexts need not be
            searched again when they come again.
    Raises:
        ModelNotFound: the LM's name is not the one served.
        DatastoreNotFound: a datastore is not loaded.
        DocumentNotFound: no datastore holds a document of an excluded id.
        InvalidParameter: ``model`` and ``knn.datastore`` disagree, a datastore is named twice, retrieval fields without
            a datastore, or too many documents are excluded.
        InvalidKnnParams, UnsupportedFeature: a field of ``knn`` is out of bounds or not offered.
    """
    backend = service.require()
    knn = knn if knn is not None else KnnBody()
    knn.check_gate()
    knn.check_mixture()
    _check_drafts(backend, knn, has_prompt)
    if knn.weighs_by_prompt and not has_prompt:
        raise InvalidParameter("`knn.weights` must be given here, where there is no prompt", param="knn.weights")
    excluded = _distinct(exclude_documents or ())
    stores = _stores(backend, model, knn)
    fingerprint = backend.lm.identity.model_fingerprint
    if not stores:
        _refuse_retrieval_fields(knn, excluded)
        return Selection(backend.model_name, (), None, fingerprint)
    leases: list[Lease] = []
    try:
        for store in stores:
            leases.append(backend.registry.lease(store.name, param="knn.datastore"))
        names = [lease.datastore.name for lease in leases]
        _refuse_twice(names, stores)
        searchable = partial(backend.searchable, cached=has_prompt)
        retrieval = _retrieval(searchable, leases, stores, knn, excluded)
    except BaseException:
        for lease in leases:
            lease.release()
        raise
    return Selection(
        model=f"{backend.model_name}{SEPARATOR}{STORE_SEPARATOR.join(names)}",
        leases=tuple(leases),
        retrieval=retrieval,
        system_fingerprint=f"{fingerprint}-{STORE_SEPARATOR.join(lease.label for lease in leases)}",
        weighs_by_prompt=knn.weighs_by_prompt and len(leases) > 1,
        drafts=knn.speculate is not False,
    )


def _check_drafts(backend: Backend, knn: KnnBody, has_prompt: bool) -> None:
    if not knn.speculate:
        return
    if not has_prompt:
        raise UnsupportedFeature("`knn.speculate` is for completions: here nothing is generated", param="knn.speculate")
    if not backend.engine.config.draft_tokens:
        raise UnsupportedFeature(
            "`knn.speculate` needs a server that drafts, and this one was started with --draft-tokens 0",
            param="knn.speculate",
        )


def check_model(backend: Backend, model: str | None) -> None:
    """For routes that need the LM alone. Raises ModelNotFound, DatastoreNotFound: ``model`` is not served."""
    for name in _datastores_in_model(backend, model):
        backend.registry.status(name)


def _datastores_in_model(backend: Backend, model: str | None) -> list[str]:
    lm, separator, datastores = (model or backend.model_name).partition(SEPARATOR)
    if lm != backend.model_name:
        raise ModelNotFound(f"model {lm!r} is not served here; served: {backend.model_name!r}", param="model")
    names = datastores.split(STORE_SEPARATOR) if separator else []
    if not all(names):
        raise ModelNotFound(f"model {model!r} names no datastore after {SEPARATOR!r}", param="model")
    if len(names) > MAX_SOURCES:
        raise InvalidParameter(f"`model` must name at most {MAX_SOURCES} datastores, got {len(names)}", param="model")
    return names


def _stores(backend: Backend, model: str | None, knn: KnnBody) -> list[WeightedDatastore]:
    """What ``model`` and ``knn.datastore`` name, the server's default if neither does."""
    by_model = _datastores_in_model(backend, model)
    resolve = backend.registry.resolve
    if by_model and knn.stores and sorted(map(resolve, by_model)) != sorted(resolve(s.name) for s in knn.stores):
        raise InvalidParameter(
            f"`model` names datastore {_quoted(by_model)} but `knn.datastore` names "
            f"{_quoted(store.name for store in knn.stores)}; they must agree",
            param="knn.datastore",
        )
    default = backend.registry.serving.default
    names = by_model or ([default] if default is not None else [])
    return knn.stores or [WeightedDatastore(name=name) for name in names]


def _quoted(names: Iterable[str]) -> str:
    return repr(STORE_SEPARATOR.join(names))


def _refuse_twice(names: Sequence[str], given: Sequence[WeightedDatastore]) -> None:
    for index, name in enumerate(names):
        if (first := names.index(name)) < index:
            raise InvalidParameter(
                f"`knn.datastore` must name different datastores, got {name!r} as {given[first].name!r} "
                f"and as {given[index].name!r}",
                param="knn.datastore",
            )


def _distinct(exclude_documents: Sequence[str]) -> Sequence[str]:
    if len(exclude_documents) > MAX_EXCLUDED_DOCUMENTS:
        raise InvalidParameter(
            f"`exclude_documents` must name at most {MAX_EXCLUDED_DOCUMENTS} documents, got {len(exclude_documents)}",
            param="exclude_documents",
        )
    return list(dict.fromkeys(exclude_documents))


def _refuse_retrieval_fields(knn: KnnBody, exclude_documents: Sequence[str]) -> None:
    """Fields that could have no effect are refused, not ignored; reports make sense without a store too."""
    given = [name for name, value in knn if value is not None and name not in ("trace", "attribution", "datastore")]
    if given:
        field = f"knn.{min(given).replace('lmbda', 'lambda')}"
        raise InvalidParameter(f"`{field}` needs a datastore, and this request names none", param=field)
    if exclude_documents:
        raise InvalidParameter(
            "`exclude_documents` needs a datastore, and this request names none", param="exclude_documents"
        )


def _retrieval(
    searchable: Callable[[Snapshot], Searchable],
    leases: Sequence[Lease],
    stores: Sequence[WeightedDatastore],
    knn: KnnBody,
    exclude_documents: Sequence[str],
) -> Retrieval:
    excluded = _excluded([lease.datastore for lease in leases], exclude_documents)
    sources = [
        replace(_source(lease.datastore, knn, ranges), datastore=searchable(lease.datastore))
        for lease, ranges in zip(leases, excluded, strict=True)
    ]
    retrieval = Retrieval(tuple(sources), knn.fusion)
    retrieval.check()
    return retrieval.with_weights([1.0 if store.weight is None else store.weight for store in stores])


def _source(datastore: Entries, knn: KnnBody, exclude: tuple[EntryRange, ...]) -> Source:
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
    source = Source(
        datastore=datastore,
        k=knn.k if knn.k is not None else calibration.k,  # type: ignore[union-attr]
        knn_temperature=knn.temperature if knn.temperature is not None else calibration.knn_temperature,  # type: ignore[union-attr]
        lmbda=knn.lmbda if knn.lmbda is not None else calibration.lmbda,  # type: ignore[union-attr]
        exclude=exclude,
    )
    source = with_lambda_mode(source, calibration, knn.mode_of_lambda, datastore.name)
    gate = None if knn.gate is None else (knn.gate, knn.gate_threshold)
    return with_gate(source, calibration, datastore.gate_trees, gate, datastore.name)


def _excluded(datastores: Sequence[Entries], document_ids: Sequence[str]) -> list[tuple[EntryRange, ...]]:
    """What each datastore must not find; a document has to be in at least one of them."""
    ranges: list[list[EntryRange]] = [[] for _ in datastores]
    for document_id in document_ids:
        errors = []
        for datastore, found in zip(datastores, ranges, strict=True):
            try:
                found.append(datastore.document_entries(document_id))
            except DocumentNotFound as error:
                errors.append(error)
        if len(errors) == len(datastores):
            raise errors[0]
    return [merge_ranges(found) for found in ranges]
