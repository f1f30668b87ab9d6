"""Requests as OpenTelemetry spans, sent as OTLP over HTTP by the SDK's own thread.

    POST /v1/completions            from the head to the end of the answer; the client's `traceparent` is its parent
    ├─ queue                        until the first pass
    ├─ prefill                      until the first token
    │  ├─ forward ─ gate ─ search ─ mix
    └─ decode                       until the end
       └─ forward ─ gate ─ search ─ mix

A completion of a thousand tokens takes a thousand passes and has as many spans as one of two: what stands under a phase
are sums over its passes, laid end to end from the phase's beginning; their lengths are true, their places are not.
Spans are made when a request is over, on the event loop; the engine's thread only adds up seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from knnlm_core import __version__
from knnlm_server.telemetry.record import RequestRecord, WorkReport
from knnlm_server.telemetry.seldom import Seldom
from knnlm_server.telemetry.timeline import Phase

MAX_TIMELINES = 16  # of one request; its other prompts, up to a thousand, are in its attributes alone
_CLOSE_S = 5.0
_TRACES_PATH = "/v1/traces"
# Where the SDK says that a collector cannot be reached, several times for every batch.
_NOISY = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
_SUMS = ("forward", "gate", "search", "mix")


def otlp_tracing(endpoint: str, sample_ratio: float) -> SpanTracing:
    """Tracing to a collector; nobody ever waits for it.

    Args:   endpoint: without a path, that of OTLP is added.
    """
    url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + _TRACES_PATH
    return SpanTracing(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)), sample_ratio)


class SpanTracing:
    """Makes spans of requests and hands them to a processor.

    Args:
        processor: gets every span that has ended; closed with this.
        sample_ratio: share of the requests that get spans where the client has not decided.
    """

    def __init__(self, processor: SpanProcessor, sample_ratio: float = 1.0) -> None:
        # OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME add to it.
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "knnlm"}))
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("knnlm_server", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._seldom = Seldom()
        for name in _NOISY:
            logging.getLogger(name).addFilter(self._seldom)

    def begin(self, headers: Mapping[str, str], record: RequestRecord) -> RecordedSpan:
        """A request has come in."""
        parent = self._propagator.extract(headers)  # a header that is no traceparent is none
        span = self._tracer.start_span(record.method, context=parent, kind=SpanKind.SERVER)
        return RecordedSpan(self._tracer, span)

    def close(self) -> None:
        """Send what is left; gives up after some seconds."""
        # The SDK itself would wait for half a minute.
        sending = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        sending.start()
        sending.join(_CLOSE_S)
        for name in _NOISY:
            logging.getLogger(name).removeFilter(self._seldom)


class RecordedSpan:
    """The span of one request."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._clock = _Clock()
        self.trace_id = format_trace_id(span.get_span_context().trace_id) if span.is_recording() else ""

    def end(self, record: RequestRecord, report: WorkReport | None) -> None:
        """The request is over; its parts become spans too."""
        if self._span.is_recording():
            self._span.update_name(f"{record.method} {record.route}")
            self._span.set_attributes(_attributes(record, report))
            if record.status >= 500 or (report is not None and report.error is not None):
                self._span.set_status(Status(StatusCode.ERROR))
            if report is not None:
                self._add_phases(report, record.ended_s)
        self._span.end(self._clock.ns(record.ended_s))

    def _add_phases(self, report: WorkReport, ended_s: float) -> None:
        for timeline in report.timelines[:MAX_TIMELINES]:
            for phase in timeline.phases(working=report.working, now_s=ended_s):
                self._add(phase)

    def _add(self, phase: Phase) -> None:
        """A phase, and under it the sums over its passes."""
        span = self._child(self._span, phase.name, phase.start_s)
        if phase.spent is not None and phase.spent.passes:
            span.set_attribute("knnlm.passes", phase.spent.passes)
            start_s = phase.start_s
            for name in _SUMS:
                seconds = getattr(phase.spent, name)
                if not seconds:
                    continue
                # Where a phase was cut off in the middle of a pass, the sums may be longer than it.
                end_s = min(start_s + seconds, phase.end_s)
                part = self._child(span, name, start_s)
                part.set_attributes({"knnlm.sum_of_passes": phase.spent.passes, "knnlm.seconds": seconds})
                part.end(self._clock.ns(end_s))
                start_s = end_s
        span.end(self._clock.ns(phase.end_s))

    def _child(self, parent: Span, name: str, start_s: float) -> Span:
        return self._tracer.start_span(name, set_span_in_context(parent), start_time=self._clock.ns(start_s))


class _Clock:
    """Times of day for monotonic ones, the same for all spans of a request."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, monotonic_s: float) -> int:
        """Since 1970."""
        return int(monotonic_s * 1e9) + self._offset_ns


def _attributes(record: RequestRecord, report: WorkReport | None) -> dict[str, str | int]:
    """Names and numbers alone; never a text."""
    attributes: dict[str, str | int] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "knnlm.request_id": record.request_id,
    }
    if report is not None:
        attributes |= {
            "knnlm.model": report.model,
            "knnlm.datastores": report.datastores,
            "knnlm.requests": len(report.timelines),
            "knnlm.prompt_tokens": report.prompt_tokens,
            "knnlm.tokens": report.tokens,
        }
        attributes |= {f"knnlm.{name}": count for name, count in report.retrievals.items()}
        attributes |= {"error.type": report.error} if report.error is not None else {}
    return attributes
