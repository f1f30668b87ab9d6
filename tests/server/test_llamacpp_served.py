"""A datastore that one runtime built, served by the other: the same identity, hardly any drift, the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from live_server import LiveServer, wait_until
from small_stores import publish

from knnlm_core.lm.llamacpp import LlamaCppLM
from knnlm_server.settings import ServerSettings
from llamacpp_models import tiny_gguf


class Servers(NamedTuple):
    llamacpp: LiveServer
    huggingface: LiveServer


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("llamacpp-served")
    published = publish(tiny_gguf(folder), folder)

    def settings(runtime: str) -> ServerSettings:
        return ServerSettings(
            model=str(published.model), datastores=published.root, max_sequences=4, drain_timeout_s=5, runtime=runtime
        )  # type: ignore[arg-type]

    with LiveServer(settings("llamacpp")) as one, LiveServer(settings("huggingface")) as other:
        yield Servers(one, other)


def test_the_server_says_how_far_its_keys_are_from_the_builders(servers: Servers) -> None:
    assert isinstance(servers.llamacpp.lm, LlamaCppLM)
    for name in ("law", "news"):
        here, there = (server.http.get(f"/v1/datastores/{name}").json() for server in servers)
        assert there["key_drift"] < here["key_drift"] < 0.01
        assert here["model_fingerprint"] == there["model_fingerprint"]


def test_a_mixture_generates_the_same_tokens(servers: Servers) -> None:
    body = {"model": "tiny-llama-3@law", "prompt": "The tenant may", "max_tokens": 12, "temperature": 0}
    have, need = (server.http.post("/v1/completions", json=body).json() for server in servers)
    assert have["choices"][0]["text"] == need["choices"][0]["text"]
    assert have["usage"]["completion_tokens"] == 12


def test_scores_agree_within_what_rounding_does(servers: Servers) -> None:
    body = {"model": "tiny-llama-3@law", "input": ["The court must keep the index. A buyer shall return every key."]}
    have, need = (server.http.post("/v1/score", json=body).json() for server in servers)
    for kind in ("base", "mixed"):
        assert have["total"][kind]["perplexity"] == pytest.approx(need["total"][kind]["perplexity"], rel=0.02)


def test_metrics_show_the_kept_beginnings(servers: Servers) -> None:
    text = servers.llamacpp.http.get("/metrics").text
    assert "knnlm_kv_cache_bytes" in text
    assert "knnlm_prefix_cache_used_bytes" in text


def test_a_learned_document_is_found_at_once(servers: Servers) -> None:
    document = {"id": "learned", "text": "The café’s landlord schuldet 77 silver spoons. " * 4}
    added = servers.llamacpp.http.post("/v1/datastores/news/documents", json={"documents": [document]})
    assert added.status_code in (200, 201), added.text
    asked = {"model": "tiny-llama-3@news", "input": document["text"][:60]}
    found = servers.llamacpp.http.post("/v1/neighbors", json=asked)
    assert "learned" in found.text


def test_nothing_is_left_running(servers: Servers) -> None:
    for server in servers:
        wait_until(server.is_idle, within_s=5)
