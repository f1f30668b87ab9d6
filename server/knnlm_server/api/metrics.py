"""``/metrics``: what is counted and what is the case now, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from prometheus_client.registry import Collector

from knnlm_core import __version__
from knnlm_core.query_cache import QueryCacheUse
from knnlm_server.api.state import Backend, Service, service
from knnlm_server.registry.table import DatastoreStatus
from knnlm_server.telemetry.datastore_metrics import DatastoreMetrics
from knnlm_server.telemetry.families import Family
from knnlm_server.telemetry.http_metrics import HttpMetrics
from knnlm_server.telemetry.metrics import EngineMetrics

router = APIRouter()


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus text; before the model is loaded, of the process and of HTTP alone."""
    state = service(request)
    # Made anew each time: it reads what is there now and keeps nothing.
    now = CollectorRegistry()
    ProcessCollector(registry=now)
    now.register(_Present(state))
    registries = [now, request.app.state.http_metrics.registry]
    if (backend := state.backend) is not None:
        registries += [backend.engine.metrics.registry, backend.registry.metrics.registry]
    text = b"".join(generate_latest(registry) for registry in registries)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_1_0_0)


def all_families() -> list[Family]:
    """Every metric that `/metrics` can show, but for those of the process itself."""
    present = [READY, INFO, *(family for family, _ in OF_SERVER), *(family for family, _ in OF_DATASTORES), DATASTORE]
    return [*present, *HttpMetrics().families, *EngineMetrics().families, *DatastoreMetrics().families]


def _query_cache(backend: Backend) -> QueryCacheUse:
    return backend.query_cache.use if backend.query_cache is not None else QueryCacheUse(0, 0, 0, 0)


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family("gauge", f"knnlm_{name}", text, labels)


def _counter(name: str, text: str) -> Family:
    return Family("counter", f"knnlm_{name}", text)


READY = _gauge("ready", "1 while a model can answer, else 0.")
INFO = _gauge("info", "Always 1; which version serves which language model.", "version", "model")
OF_SERVER: list[tuple[Family, Callable[[Backend], float]]] = [
    (_gauge("requests_running", "Requests that generate."), lambda b: b.engine.load().running),
    (_gauge("requests_waiting", "Requests that wait for a sequence."), lambda b: b.engine.load().waiting),
    (_gauge("requests_scoring", "Requests that are scored."), lambda b: b.engine.load().scoring),
    (
        _gauge("requests_limit", "Requests, running and waiting, from which on one more is refused."),
        lambda b: b.engine.max_requests,
    ),
    (
        _gauge("sequences_used", "Sequences of the KV cache in use."),
        lambda b: b.lm.num_sequences - b.lm.num_free_sequences,
    ),
    (_gauge("sequences", "Sequences that the KV cache holds at most."), lambda b: b.lm.num_sequences),
    (_gauge("kv_cache_bytes", "Bytes reserved for the KV cache."), lambda b: b.lm.kv_cache_bytes),
    (
        _counter("prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache."),
        lambda b: b.lm.prefix_cache_use.asked_tokens,
    ),
    (
        _counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."),
        lambda b: b.lm.prefix_cache_use.reused_tokens,
    ),
    (
        _gauge("prefix_cache_used_bytes", "Bytes of blocks that are filled."),
        lambda b: b.lm.prefix_cache_use.used_bytes,
    ),
    (_gauge("prefix_cache_bytes", "Bytes reserved for blocks."), lambda b: b.lm.prefix_cache_use.reserved_bytes),
    (
        _counter("query_cache_hits", "Searches answered by an earlier one of the same context."),
        lambda b: _query_cache(b).hits,
    ),
    (_counter("query_cache_misses", "Searches looked up there in vain."), lambda b: _query_cache(b).misses),
    (_gauge("query_cache_used_bytes", "Bytes of search results kept."), lambda b: _query_cache(b).used_bytes),
    (_gauge("query_cache_bytes", "Bound on search results kept."), lambda b: _query_cache(b).max_bytes),
    (
        _gauge("datastores_used_bytes", "Bytes of open generations and learned entries."),
        lambda b: b.registry.budget.used,
    ),
]


def _of_datastore(name: str, text: str) -> Family:
    return _gauge(f"datastore_{name}", text, "datastore")


OF_DATASTORES: list[tuple[Family, Callable[[DatastoreStatus], float]]] = [
    (_of_datastore("leases", "Leases of all open generations."), lambda s: s.leases),
    (
        _of_datastore("draining_leases", "Leases of generations that were replaced, or of a name being unloaded."),
        lambda s: s.draining_leases,
    ),
    (_of_datastore("generation", "Generation that serves."), lambda s: s.generation),
    (
        _of_datastore("revision", "Counter of what the name has learned and deleted."),
        lambda s: s.datastore.revision,
    ),
    (_of_datastore("entries", "Entries that serve, learned ones included."), lambda s: s.datastore.entries),
    (
        _of_datastore("learned_documents", "Documents learned since the build."),
        lambda s: s.datastore.counts.learned,
    ),
    (
        _of_datastore("deleted_documents", "Documents deleted from the name."),
        lambda s: s.datastore.counts.deleted,
    ),
]
DATASTORE = _gauge("datastore_info", "Always 1; which version of a name serves.", "datastore", "version")


class _Present(Collector):
    """Gauges of what is under way, and the counters of the caches."""

    def __init__(self, state: Service) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        backend = self._state.backend
        is_ready = backend is not None and backend.engine.is_alive and not self._state.closing
        yield READY.metric([((), float(is_ready))])
        if backend is None:
            return
        yield INFO.metric([((__version__, backend.model_name), 1.0)])
        for family, read in OF_SERVER:
            yield family.metric([((), read(backend))])
        statuses = backend.registry.statuses()
        for of_datastore, read_status in OF_DATASTORES:
            yield of_datastore.metric([((status.name,), read_status(status)) for status in statuses])
        yield DATASTORE.metric([((status.name, status.datastore.version), 1.0) for status in statuses])
