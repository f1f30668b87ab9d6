"""Histograms for the engine's thread: to observe is to append; bucketing waits until there is much, or a scrape."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_MOST_PENDING = 1024


class Series:
    """The observations of one label. Any thread may observe, and any may count.

    Args:   bounds: upper bounds of the buckets, ascending, inclusive; one above all of them is added.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.asarray(bounds, dtype=np.float64)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        self._pending: list[float] = []
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """One observation."""
        with self._lock:
            self._pending.append(value)
            if len(self._pending) >= _MOST_PENDING:
                self._fold()

    def observe_all(self, values: Sequence[float]) -> None:
        """Some of them."""
        with self._lock:
            self._pending += values
            if len(self._pending) >= _MOST_PENDING:
                self._fold()

    def totals(self) -> tuple[list[int], float]:
        """Observations up to each bound, the last one without a bound, and their sum."""
        with self._lock:
            self._fold()
            return np.cumsum(self._counts).tolist(), self._sum

    def _fold(self) -> None:
        values = np.asarray(self._pending, dtype=np.float64)
        self._pending.clear()
        at = np.searchsorted(self._bounds, values, side="left")
        self._counts += np.bincount(at, minlength=len(self._counts))
        self._sum += float(values.sum())


class BatchedHistogram(Collector):
    """What prometheus_client's Histogram is, without its price per observation.

    Args:
        label: name of the one label that it has, or None.
        values: of that label; all that there can be, so that none appears late.
    """

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], label: str | None = None, values: Sequence[str] = ()
    ) -> None:
        self._name, self._text, self._label = name, text, label
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._series = {value: Series(bounds) for value in (values if label is not None else ("",))}

    def labels(self, value: str = "") -> Series:
        """The series of a label's value; without a label, the only one."""
        return self._series[value]

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label is not None else [])
        for value, series in self._series.items():
            counts, total = series.totals()
            labels = [value] if self._label is not None else []
            family.add_metric(labels, list(zip(self._names, map(float, counts), strict=True)), total)
        yield family
