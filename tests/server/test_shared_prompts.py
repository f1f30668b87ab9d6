"""Prompts that share a beginning: it is read once, and the answers do not change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import LiveServer
from small_stores import Published, Start

from knnlm_core.lm.prefix_cache import BLOCK_TOKENS, PrefixCache

LAW = "tiny-lm@law"
SHARED = [(7 * i) % 480 + 5 for i in range(3 * BLOCK_TOKENS)]


@pytest.fixture
def server(published: Published, start_server: Start) -> LiveServer:
    return start_server(datastores=published.root, step_tokens=64)


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_shared_prompt_is_read_once_whatever_the_datastore(server: LiveServer) -> None:
    assert cached(server.complete([*SHARED, 9], max_tokens=2)) == 0
    assert cached(server.complete([*SHARED, 10], max_tokens=2)) == len(SHARED)
    # A KV cache knows no datastore.
    assert cached(server.complete([*SHARED, 11], max_tokens=2, model=LAW)) == len(SHARED)
    assert cached(server.complete([4, *SHARED], max_tokens=2)) == 0


def test_the_last_prompt_token_is_always_read(server: LiveServer) -> None:
    first = server.complete(SHARED, max_tokens=3, logprobs=0)
    again = server.complete(SHARED, max_tokens=3, logprobs=0)
    assert cached(again) == len(SHARED) - BLOCK_TOKENS
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_a_conversation_goes_on_from_what_was_generated(server: LiveServer) -> None:
    prompt = SHARED[:40]
    traced = {"knn": {"trace": True}}
    first = server.complete(prompt, max_tokens=40, ignore_eos=True, **traced)
    generated = [entry["token_id"] for entry in first["choices"][0]["knn"]]
    assert cached(server.complete([*prompt, *generated, 5, 6], max_tokens=1)) == 64  # two blocks of 40 + 39 tokens


def test_answers_are_the_same_with_and_without_the_cache(
    server: LiveServer, published: Published, start_server: Start
) -> None:
    without = start_server(datastores=published.root, prefix_cache_bytes=0, step_tokens=64)
    for i in range(6):
        prompt = [*SHARED[: 40 + 9 * i], 3 + i]
        body = {"max_tokens": 6, "logprobs": 3, "model": LAW, "temperature": 0.9, "seed": i, "ignore_eos": True}
        have, need = server.complete(prompt, **body), without.complete(prompt, **body)
        assert (cached(have) > 0, cached(need)) == (i > 0, 0)
        assert have["choices"][0]["text"] == need["choices"][0]["text"]
        assert have["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
            need["choices"][0]["logprobs"]["token_logprobs"], abs=1e-4
        )


def test_scoring_a_prompt_does_not_read_the_cache(server: LiveServer) -> None:
    server.complete([*SHARED, 9], max_tokens=1)
    before = server.lm.prefix_cache_use.asked_tokens
    assert cached(server.complete([*SHARED, 9], max_tokens=1, echo=True, logprobs=0)) == 0
    server.score([[*SHARED, 9]])
    assert server.lm.prefix_cache_use.asked_tokens == before


def test_many_at_once_with_a_cache_that_hardly_holds_anything(published: Published, start_server: Start) -> None:
    probe = start_server()
    small = start_server(prefix_cache_bytes=40_000, step_tokens=32)
    prompts = [[*SHARED[: 10 * (i % 9 + 1)], 5 + i] for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        have = list(pool.map(lambda prompt: small.complete(prompt, max_tokens=4, ignore_eos=True), prompts))
    for prompt, answer in zip(prompts, have, strict=True):
        need = probe.complete(prompt, max_tokens=4, ignore_eos=True, logprobs=2)["choices"][0]
        assert answer["choices"][0]["text"] == need["text"]
    use = small.lm.prefix_cache_use
    assert 0 < use.used_bytes <= use.reserved_bytes <= 40_000


@pytest.mark.parametrize("broken", ["_fill", "load"])
def test_a_cache_that_fails_changes_no_answer(server: LiveServer, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    body = {"max_tokens": 3, "logprobs": 0, "ignore_eos": True}

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    def log_probs() -> list[float]:
        answer = server.complete([*SHARED, 9], **body)
        reused.append(cached(answer))
        return answer["choices"][0]["logprobs"]["token_logprobs"]

    reused: list[int] = []
    server.complete([*SHARED[::-1], 9], **body)  # what a block that was never filled might hold
    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, broken, fail)
        first, second = log_probs(), log_probs()
    third, fourth = log_probs(), log_probs()
    for again in (second, third, fourth):
        assert again == pytest.approx(first, abs=1e-4)
    whole = len(SHARED)
    assert reused == [0, 0, 0 if broken == "_fill" else whole, whole]
    assert server.backend.engine.is_alive
