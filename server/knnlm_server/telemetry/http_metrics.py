"""What is counted of HTTP, whatever the request was for; there before a model is."""

from __future__ import annotations

from knnlm_server.telemetry.families import Families
from knnlm_server.telemetry.record import RequestRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))


class HttpMetrics:
    """Requests by route and status; labels come from the server's own routes, so there are only so many."""

    def __init__(self) -> None:
        make = Families()
        self.registry, self.families = make.registry, make.made
        self._requests = make.counter(
            "knnlm_http_requests",
            "HTTP requests answered, by the route's path; other where no route was reached, 0 where nothing was sent.",
            "method",
            "route",
            "status",
        )
        self._seconds = make.histogram(
            "knnlm_http_request_seconds",
            "From a request's head to the end of its answer, streams included.",
            _SECONDS,
            "route",
        )

    def count(self, record: RequestRecord) -> None:
        """A request is over."""
        method = record.method if record.method in _METHODS else "other"
        self._requests.labels(method, record.route, str(record.status)).inc()
        self._seconds.labels(record.route).observe(record.seconds)
