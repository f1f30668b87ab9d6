"""Metrics in a registry of their own, and what is known of them: the documentation lists every one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from knnlm_server.telemetry.batched import BatchedHistogram

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)


class Family(NamedTuple):
    """One metric."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str  # counters without their _total
    text: str
    labels: tuple[str, ...] = ()

    def metric(self, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
        """A counter or gauge with its present values: those of its labels, and the number."""
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = make(self.name, self.text, labels=self.labels)
        for values, number in samples:
            metric.add_metric(values, number)
        return metric


class Families:
    """Makes metrics and keeps a list of them; nothing is global."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.made: list[Family] = []

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A counter; ``_total`` is added to its name."""
        self.made.append(Family("counter", name, text, labels))
        return Counter(name, text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        """A histogram of what happens once in a request or less."""
        self.made.append(Family("histogram", name, text, labels))
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def batched(
        self, name: str, text: str, buckets: Sequence[float], label: str | None = None, values: Sequence[str] = ()
    ) -> BatchedHistogram:
        """A histogram of what happens in every step."""
        self.made.append(Family("histogram", name, text, () if label is None else (label,)))
        histogram = BatchedHistogram(name, text, buckets, label, values)
        self.registry.register(histogram)
        return histogram
