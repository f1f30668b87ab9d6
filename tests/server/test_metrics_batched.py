"""The batched histogram counts as prometheus_client's does, from whichever thread, and says so at any time."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from knnlm_server.telemetry.batched import BatchedHistogram, Series

BOUNDS = (0.0, 0.5, 1.0, 8.0)
values = st.lists(st.floats(0, 16) | st.sampled_from(BOUNDS), max_size=40)


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *map(str, sorted(sample.labels.items()))): round(sample.value, 6)
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


@given(st.lists(values, max_size=4), values)
def test_it_shows_what_the_librarys_own_shows(batches: list[list[float]], single: list[float]) -> None:
    own, theirs = CollectorRegistry(), CollectorRegistry()
    batched = BatchedHistogram("waited", "How long.", BOUNDS, "kind", ("a", "b"))
    own.register(batched)
    reference = Histogram("waited", "How long.", ["kind"], buckets=BOUNDS, registry=theirs)
    reference.labels("a"), reference.labels("b")
    for batch in batches:
        batched.labels("a").observe_all(batch)
        for value in batch:
            reference.labels("a").observe(value)
    for value in single:
        batched.labels("b").observe(value)
        reference.labels("b").observe(value)
    assert samples(own) == samples(theirs)
    assert samples(own) == samples(theirs), "a scrape changes nothing"


def test_without_a_label_there_is_one_series() -> None:
    registry = CollectorRegistry()
    batched = BatchedHistogram("waited", "How long.", BOUNDS)
    registry.register(batched)
    batched.labels().observe_all([0.5, 20.0])
    assert registry.get_sample_value("waited_bucket", {"le": "0.5"}) == 1
    assert registry.get_sample_value("waited_bucket", {"le": "+Inf"}) == 2
    assert registry.get_sample_value("waited_sum") == 20.5


def test_nothing_is_lost_between_threads_and_little_is_kept_between_scrapes() -> None:
    series, each = Series(BOUNDS), 5000

    def observe() -> None:
        for _ in range(each):
            series.observe(0.75)

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counts, _ = series.totals()
        assert counts[1] == 0
        assert counts[2] == counts[-1]
    assert series.totals() == ([0, 0, 4 * each, 4 * each, 4 * each], 0.75 * 4 * each)
    for _ in range(10_000):
        series.observe(1.0)
    assert len(series._pending) < 1024
