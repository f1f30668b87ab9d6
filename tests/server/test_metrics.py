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


def test_a_request_is_timed_from_queue_to_end(live_server: LiveServer) -> None:
    before = read(live_server)
    live_server.complete(["The tenant", "The landlord pays"], model=LAW, max_tokens=6, ignore_eos=True)
    live_server.complete("The tenant", max_tokens=1)
    score = "knnlm_request_seconds_count{kind=score}"
    live_server.score(["The tenant pays the rent."], model=LAW)
    wait_until(lambda: moved(before, read(live_server), score) == 1)
    after = read(live_server)
    for name, count in {
        "knnlm_request_queue_seconds_count{kind=completion}": 3,
        "knnlm_request_queue_seconds_count{kind=score}": 1,
        "knnlm_request_prefill_seconds_count": 3,
        "knnlm_request_decode_seconds_count": 3,
        "knnlm_time_per_output_token_seconds_count": 2,  # a single token has no time between
        "knnlm_request_prompt_tokens_count": 3,
        "knnlm_request_generation_tokens_sum": 13,
    }.items():
        assert moved(before, after, name) == count, name
    parts = ("queue_seconds_sum{kind=completion}", "prefill_seconds_sum", "decode_seconds_sum")
    whole = moved(before, after, "knnlm_request_seconds_sum{kind=completion}")
    assert whole > 0
    assert abs(sum(moved(before, after, f"knnlm_request_{part}") for part in parts) - whole) < 1e-6 + 0.02 * whole


def test_steps_are_measured_by_what_is_in_them(live_server: LiveServer) -> None:
    before = read(live_server)
    live_server.complete([5, 6, 7], model=LAW, max_tokens=4, ignore_eos=True, n=2, echo=True, logprobs=0)
    after = read(live_server)
    # One step reads the prompt and draws two first tokens; three draw the others.
    assert moved(before, after, "knnlm_step_tokens_count") == 4
    assert moved(before, after, "knnlm_step_tokens_sum") == 3 + 3 * 2
    assert moved(before, after, "knnlm_step_sequences_sum") == 1 + 3 * 2
    for part in ("forward", "gate", "search", "mix"):
        assert moved(before, after, f"knnlm_{part}_seconds_count{{kind=completion}}") == 4, part
        assert moved(before, after, f"knnlm_{part}_seconds_sum{{kind=completion}}") > 0, part
    assert (
        moved(before, after, "knnlm_lambda_count") == moved(before, after, "knnlm_nearest_distance_count") == 1 + 3 * 2
    )


def test_lambda_and_distance_are_those_of_the_trace(live_server: LiveServer) -> None:
    before = read(live_server)
    answer = live_server.complete("The tenant", model=LAW, max_tokens=5, ignore_eos=True, knn={"trace": True})
    trace, after = answer["choices"][0]["knn"], read(live_server)
    lambdas = sum(token["lambda"] for token in trace)
    nearest = sum(min(neighbor["distance"] for neighbor in token["neighbors"]) for token in trace)
    assert abs(moved(before, after, "knnlm_lambda_sum") - lambdas) < 1e-4
    assert abs(moved(before, after, "knnlm_nearest_distance_sum") - nearest) < 1e-2


def test_without_a_datastore_or_a_search_none_is_measured(live_server: LiveServer) -> None:
    before = read(live_server)
    live_server.complete("The tenant", max_tokens=3, ignore_eos=True)
    live_server.complete("The tenant", model=LAW, max_tokens=3, ignore_eos=True, knn={"gate": "never"})
    live_server.score(["The tenant pays the rent."])
    after = read(live_server)
    assert moved(before, after, "knnlm_search_seconds_count{kind=completion}") == 0
    assert moved(before, after, "knnlm_search_seconds_count{kind=score}") == 0
    assert moved(before, after, "knnlm_gate_seconds_count{kind=completion}") == 3
    assert moved(before, after, "knnlm_lambda_count") == 0
    assert moved(before, after, "knnlm_forward_seconds_count{kind=completion}") == 6


def test_a_refused_request_is_counted_with_its_reason(published: Published, start_server: Start) -> None:
    server = start_server(max_sequences=1, max_queued=0)
    with Brake(server.lm) as brake:
        connection = server.begin("/v1/completions", {"prompt": "a", "max_tokens": 1})
        brake.wait_held()
        assert server.post("/v1/completions", {"prompt": "b"}).status_code == 503
        brake.release()
        connection.recv(12)
        connection.close()
    wait_until(server.is_idle)
    figures = read(server)
    assert figures["knnlm_rejected_requests_total{reason=overloaded}"] == 1
    assert figures["knnlm_http_requests_total{method=POST}{route=/v1/completions}{status=503}"] == 1


def test_http_requests_are_counted_by_the_path_of_their_route(live_server: LiveServer) -> None:
    name = "knnlm_http_requests_total{{method={}}}{{route={}}}{{status={}}}"
    before = read(live_server)
    live_server.http.get("/v1/datastores/law")
    live_server.http.get("/v1/datastores/absent")
    live_server.http.get("/no/such/route/at-all")
    live_server.http.request("TRACE", "/health")
    live_server.stream("The tenant", max_tokens=2)
    awaited = {
        name.format("GET", "/v1/datastores/{name}", 200): 1,
        name.format("GET", "/v1/datastores/{name}", 404): 1,
        name.format("GET", "other", 404): 1,
        name.format("other", "/health", 405): 1,
        name.format("POST", "/v1/completions", 200): 1,
    }
    wait_until(
        lambda: all(read(live_server).get(key, 0.0) - before.get(key, 0.0) == count for key, count in awaited.items()),
        within_s=5,
    )
