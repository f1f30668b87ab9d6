"""`/metrics`: every figure moves with what it counts, and gauges come back to where they were."""

from __future__ import annotations

from live_server import Brake, LiveServer, wait_until
from prometheus_client.parser import text_string_to_metric_families
from small_stores import Published, Start

LAW = "tiny-lm@law"


def read(server: LiveServer) -> dict[str, float]:
    """Samples by ``name{labels}``."""
    response = server.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def moved(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before.get(name, 0.0)


def test_counters_count_tokens_searches_and_requests(live_server: LiveServer) -> None:
    before = read(live_server)
    live_server.complete(["The tenant", "The landlord"], model=LAW, max_tokens=5, ignore_eos=True, n=2)
    live_server.complete("The tenant", model=LAW, max_tokens=3, ignore_eos=True, knn={"gate": "never"})
    scored = live_server.score(["The tenant pays the rent."], model=LAW)["total"]["searched"]
    assert scored > 3
    # The engine counts a pass when it is over, which may be after its answer has been sent.
    awaited = {
        "knnlm_retrievals_total{decision=searched}": 20 + scored,
        "knnlm_requests_total{kind=score}{outcome=finished}": 1,
    }
    wait_until(lambda: all(moved(before, read(live_server), name) == count for name, count in awaited.items()))
    after = read(live_server)
    assert moved(before, after, "knnlm_generation_tokens_total") == 23
    assert moved(before, after, "knnlm_retrievals_total{decision=skipped}") == 3
    assert moved(before, after, "knnlm_requests_total{kind=completion}{outcome=finished}") == 3
    assert moved(before, after, "knnlm_time_to_first_token_seconds_count") == 3
    assert moved(before, after, "knnlm_inter_token_latency_seconds_count") == 23 - 5
    assert moved(before, after, "knnlm_request_seconds_count{kind=completion}") == 3


def test_gauges_show_what_is_under_way_and_return_to_zero(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, max_sequences=2)
    gauges = ("knnlm_requests_running", "knnlm_requests_waiting", "knnlm_datastore_leases{datastore=law}")
    with Brake(server.lm) as brake:
        request = server.http.build_request(
            "POST", "/v1/completions", json={"prompt": ["a", "b", "c"], "model": LAW, "max_tokens": 2, "stream": True}
        )
        response = server.http.send(request, stream=True)
        brake.wait_held()
        wait_until(lambda: [read(server)[name] for name in gauges] == [2, 1, 1])
        assert read(server)["knnlm_sequences_used"] == 2
        brake.release()
        response.read()
    wait_until(lambda: [read(server)[name] for name in (*gauges, "knnlm_sequences_used")] == [0, 0, 0, 0])


def test_the_prefix_cache_reports_its_hits_and_its_bound(published: Published, start_server: Start) -> None:
    server = start_server(prefix_cache_bytes=1 << 20)
    for last in (5, 6):
        server.complete([*range(10, 80), last], max_tokens=1)
    figures = read(server)
    assert figures["knnlm_prefix_cache_queried_tokens_total"] == 2 * 70
    assert figures["knnlm_prefix_cache_hit_tokens_total"] == 64
    assert 0 < figures["knnlm_prefix_cache_used_bytes"] <= figures["knnlm_prefix_cache_bytes"] <= 1 << 20


def test_metrics_need_no_key_and_no_model(published: Published, start_server: Start) -> None:
    guarded = start_server(api_key="secret")
    assert "knnlm_requests_running" in read(guarded)
    starting = start_server(wait=False)
    assert "process_open_fds" in read(starting)
    starting.wait_ready()
