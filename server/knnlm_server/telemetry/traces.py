"""Spans of requests, if there is a collector to send them to. Nothing here needs OpenTelemetry; `otlp` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from knnlm_core.errors import UnsupportedFeature
from knnlm_server.telemetry.record import RequestRecord, WorkReport


class RequestSpan(Protocol):
    """The span of one HTTP request."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty for a request without spans."""
        ...

    def end(self, record: RequestRecord, report: WorkReport | None) -> None:
        """The request is over; its parts become spans too."""
        ...


class Tracing(Protocol):
    """Makes spans of requests."""

    def begin(self, headers: Mapping[str, str], record: RequestRecord) -> RequestSpan:
        """A request has come in.

        Args:   headers: by lower-case name; ``traceparent`` says whose span this one belongs to.
        """
        ...

    def close(self) -> None:
        """Send what is left; takes a few seconds at most, whatever the collector does."""
        ...


class NoTracing:
    """Without a collector."""

    def begin(self, headers: Mapping[str, str], record: RequestRecord) -> RequestSpan:
        """No span."""
        return NO_SPAN

    def close(self) -> None:
        """Nothing to send."""


class _NoSpan:
    trace_id = ""

    def end(self, record: RequestRecord, report: WorkReport | None) -> None:
        """Nothing to end."""


NO_SPAN: RequestSpan = _NoSpan()


def make_tracing(endpoint: str | None, sample_ratio: float) -> Tracing:
    """Spans to a collector, or none.

    Args:
        endpoint: of OTLP over HTTP; None sends nothing, and needs no OpenTelemetry.
        sample_ratio: share of the requests that get spans where the client has not decided, 0 … 1.
    Raises: UnsupportedFeature: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NoTracing()
    try:
        from knnlm_server.telemetry.otlp import otlp_tracing  # an extra
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise UnsupportedFeature("--otlp-endpoint needs OpenTelemetry: pip install 'knnlm[otel]'") from None
    return otlp_tracing(endpoint, sample_ratio)
