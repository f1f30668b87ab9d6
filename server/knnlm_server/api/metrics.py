"""``/metrics``: the engine's counters and the server's present state, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0
from prometheus_client.registry import Collector

from knnlm_core.query_cache import QueryCacheUse
from knnlm_server.api.state import Backend, service
from knnlm_server.registry.table import DatastoreStatus

router = APIRouter()


@router.get(
    "/metrics",
    summary="Metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus text; before the model is loaded, of the process alone."""
    backend = service(request).backend
    # Made anew each time: it reads what is there now and keeps nothing.
    now = CollectorRegistry()
    ProcessCollector(registry=now)
    if backend is not None:
        now.register(_State(backend))
    text = generate_latest(now)
    if backend is not None:
        counted = (backend.engine.metrics.registry, backend.registry.metrics.registry)
        text += b"".join(generate_latest(registry) for registry in counted)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_1_0_0)


class _State(Collector):
    """Gauges of what is under way, and the counters of the caches."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        load = self._backend.engine.load()
        yield GaugeMetricFamily("knnlm_requests_running", "Requests that generate.", load.running)
        yield GaugeMetricFamily("knnlm_requests_waiting", "Requests that wait for a sequence.", load.waiting)
        yield GaugeMetricFamily("knnlm_requests_scoring", "Requests that are scored.", load.scoring)
        lm = self._backend.lm
        yield GaugeMetricFamily(
            "knnlm_sequences_used", "Sequences of the KV cache in use.", lm.num_sequences - lm.num_free_sequences
        )
        yield GaugeMetricFamily("knnlm_sequences", "Sequences that the KV cache holds at most.", lm.num_sequences)
        yield GaugeMetricFamily("knnlm_kv_cache_bytes", "Bytes reserved for the KV cache.", lm.kv_cache_bytes)
        yield from self._prefix_cache()
        yield from self._query_cache()
        yield from self._datastores()

    def _prefix_cache(self) -> Iterator[Metric]:
        use = self._backend.lm.prefix_cache_use
        yield CounterMetricFamily(
            "knnlm_prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.", use.asked_tokens
        )
        yield CounterMetricFamily(
            "knnlm_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.", use.reused_tokens
        )
        yield GaugeMetricFamily("knnlm_prefix_cache_used_bytes", "Bytes of blocks that are filled.", use.used_bytes)
        yield GaugeMetricFamily("knnlm_prefix_cache_bytes", "Bytes reserved for blocks.", use.reserved_bytes)

    def _query_cache(self) -> Iterator[Metric]:
        cache = self._backend.query_cache
        use = cache.use if cache is not None else QueryCacheUse(0, 0, 0, 0)
        yield CounterMetricFamily(
            "knnlm_query_cache_hits", "Searches answered by an earlier one of the same context.", use.hits
        )
        yield CounterMetricFamily("knnlm_query_cache_misses", "Searches looked up there in vain.", use.misses)
        yield GaugeMetricFamily("knnlm_query_cache_used_bytes", "Bytes of search results kept.", use.used_bytes)
        yield GaugeMetricFamily("knnlm_query_cache_bytes", "Bound on search results kept.", use.max_bytes)

    def _datastores(self) -> Iterator[Metric]:
        statuses = self._backend.registry.statuses()
        gauges: list[tuple[str, str, Callable[[DatastoreStatus], int]]] = [
            ("leases", "Leases of all open generations.", lambda status: status.leases),
            ("generation", "Generation that serves.", lambda status: status.generation),
            ("revision", "Counter of what the name has learned and deleted.", lambda status: status.datastore.revision),
            ("entries", "Entries that serve, learned ones included.", lambda status: status.datastore.entries),
            ("learned_documents", "Documents learned since the build.", lambda status: status.datastore.counts.learned),
            ("deleted_documents", "Documents deleted from the name.", lambda status: status.datastore.counts.deleted),
        ]
        for name, help_text, read in gauges:
            gauge = GaugeMetricFamily(f"knnlm_datastore_{name}", help_text, labels=["datastore"])
            for status in statuses:
                gauge.add_metric([status.name], read(status))
            yield gauge
        used = self._backend.registry.budget.used
        yield GaugeMetricFamily("knnlm_datastores_used_bytes", "Bytes of open generations and learned entries.", used)
