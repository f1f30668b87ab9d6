"""Requests whose contexts come again are answered without a search, and as if there had been one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, wait_until
from prometheus_client.parser import text_string_to_metric_families
from small_stores import Published, Start

FACT = "Note 17: the ZX-81 valve's limit is 4.7 bar, said the engineer at the harbour."
PROMPT = "Note 17: the ZX-81 valve's limit is"
LAW = "tiny-lm@law"
KNN = {"k": 4, "temperature": 0.01, "lambda": 0.99}


@pytest.fixture
def server(start_server: Start, own_root: Path) -> Iterator[LiveServer]:
    server = start_server(datastores=own_root)
    yield server
    wait_until(server.is_idle, within_s=5)


@pytest.fixture
def plain(start_server: Start, own_root: Path) -> LiveServer:
    """The same without a cache."""
    return start_server(datastores=own_root, query_cache_bytes=0)


def counted(server: LiveServer) -> tuple[int, int]:
    """Hits and misses so far."""
    cache = server.backend.query_cache
    assert cache is not None
    return cache.use[:2]


def complete(server: LiveServer, prompt: str = PROMPT, **body: Any) -> dict[str, Any]:
    given = {"model": LAW, "max_tokens": 12, "ignore_eos": True, "logprobs": 0, "knn": KNN}
    return server.complete(prompt, **{**given, **body})


def alike(have: dict[str, Any], need: dict[str, Any]) -> bool:
    """Whether two answers have the same texts with the same log-probabilities, but for rounding."""
    return all(
        one["text"] == other["text"]
        and one["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], rel=1e-4, abs=1e-4)
        for one, other in zip(have["choices"], need["choices"], strict=True)
    )


def test_the_same_prompt_again_is_answered_without_a_search(server: LiveServer, plain: LiveServer) -> None:
    first = complete(server)
    assert counted(server) == (0, 12)
    second = complete(server)
    assert counted(server) == (12, 12)
    assert alike(second, first)
    assert alike(first, complete(plain))
    assert second["usage"]["knn"] == first["usage"]["knn"]
    assert second["usage"]["knn"]["searched"] == 12
    # More of it: only what comes after is new.
    longer = complete(server, max_tokens=15)
    assert counted(server) == (24, 15)
    assert longer["choices"][0]["text"].startswith(first["choices"][0]["text"])


def test_a_prompt_found_in_the_prefix_cache_is_the_same_context(server: LiveServer) -> None:
    prompt = " ".join(f"{i}. The tenant may keep every key." for i in range(8))
    first = complete(server, prompt)
    again = complete(server, prompt)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    assert alike(again, first)
    assert counted(server) == (12, 12)


def test_samples_of_one_prompt_share_their_beginnings(server: LiveServer, plain: LiveServer) -> None:
    body = {"n": 4, "temperature": 0.7, "seed": 5, "max_tokens": 8}
    have = complete(server, **body)
    hits, misses = counted(server)
    assert hits > 0
    assert hits + misses == have["usage"]["knn"]["searched"] - 3, "the prompt's own row is one for all four"
    assert alike(have, complete(plain, **body))


def test_what_is_learned_and_forgotten_meanwhile_is_never_served_stale(server: LiveServer) -> None:
    before = complete(server)
    assert "4.7" not in before["choices"][0]["text"]
    for _ in range(2):  # what was forgotten can be learned again
        learned = server.post("/v1/datastores/law/documents", {"documents": [{"id": "valve", "text": FACT}]})
        assert learned.status_code == 201, learned.text
        for _ in range(2):
            assert "4.7" in complete(server)["choices"][0]["text"]
        assert server.http.delete("/v1/datastores/law/documents/valve").status_code == 200
        for _ in range(2):
            after = complete(server, knn={**KNN, "attribution": True})
            assert alike(after, before)
            assert "valve" not in str(after["choices"][0]["attribution"])
    hits, misses = counted(server)
    assert (hits, misses) == (4 * 12, 5 * 12), "the first answer from each state is searched for"


def test_a_swap_leaves_nothing_of_the_version_before(start_server: Start, own_root: Path, published: Published) -> None:
    server = start_server(datastores=own_root, load=("law",))
    plain = start_server(datastores=own_root, load=("law",), query_cache_bytes=0)
    new = complete(server)
    assert server.backend.query_cache is not None
    used = server.backend.query_cache.use.used_bytes
    before = weakref.ref(server.backend.registry.status("law").datastore)
    for one in (server, plain):
        answer = one.http.put("/v1/datastores/law", json={"version": published.law_old})
        assert answer.status_code == 200, answer.text
    old = complete(server)
    assert alike(old, complete(plain))
    assert not alike(old, new)
    assert counted(server) == (0, 24)
    # Requests that have ended may wait for the garbage collector.
    wait_until(lambda: gc.collect() >= 0 and before() is None)
    complete(server)
    assert server.backend.query_cache.use == (12, 24, used, 64 << 20)


def test_scores_and_lookups_neither_read_nor_fill_the_cache(server: LiveServer) -> None:
    complete(server)
    before = server.backend.query_cache.use  # type: ignore[union-attr]
    body = {"model": LAW, "knn": KNN}
    scores = [server.post("/v1/score", {**body, "input": [FACT, PROMPT]}).json()["total"] for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]["searched"] > 0
    for _ in range(2):
        assert server.post("/v1/neighbors", {**body, "input": PROMPT}).status_code == 200
    assert server.backend.query_cache.use == before  # type: ignore[union-attr]


def test_the_shadow_sees_real_searches_only(start_server: Start, published: Published) -> None:
    server = start_server(datastores=published.root, shadow_exact=1.0)
    metrics = server.backend.engine.metrics.registry
    for _ in range(3):
        complete(server)
    wait_until(lambda: metrics.get_sample_value("knnlm_shadow_recall_count") == 12)
    assert counted(server) == (24, 12)


def figures(server: LiveServer) -> dict[str, float]:
    """The cache's metrics, without what their names begin with."""
    text, prefix = server.http.get("/metrics").text, "knnlm_query_cache_"
    return {
        sample.name.removeprefix(prefix): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(prefix)
    }


def test_metrics_tell_hits_misses_and_bytes(start_server: Start, published: Published) -> None:
    server = start_server(datastores=published.root, query_cache_bytes=40_000)
    for _ in range(2):
        complete(server)
    have = figures(server)
    assert (have["hits_total"], have["misses_total"], have["bytes"]) == (12, 12, 40_000)
    assert 0 < have["used_bytes"] <= 40_000
    complete(server, "The court has lost", max_tokens=60)
    assert figures(server)["used_bytes"] <= 40_000
    off = start_server(datastores=published.root, query_cache_bytes=0)
    for _ in range(2):
        complete(off)
    assert set(figures(off).values()) == {0}


def test_several_datastores_are_kept_apart(server: LiveServer, plain: LiveServer) -> None:
    body = {"model": "tiny-lm@law+news"}
    for _ in range(2):
        assert alike(complete(server, **body), complete(plain, **body))
    assert alike(complete(server), complete(plain))
    hits, misses = counted(server)
    assert misses >= 24, "each context is searched in both"
    assert hits >= 24


def test_gates_that_follow_do_so_from_kept_results(server: LiveServer, plain: LiveServer) -> None:
    body = {"knn": {**KNN, "gate": "automaton", "gate_threshold": 1, "trace": True}, "max_tokens": 30}
    first, again, need = complete(server, **body), complete(server, **body), complete(plain, **body)
    for have in (first, again):
        assert alike(have, need)
        assert have["usage"]["knn"] == need["usage"]["knn"]
    searched = need["usage"]["knn"]["searched"]
    assert 0 < searched < 30
    assert counted(server) == (searched, searched)
