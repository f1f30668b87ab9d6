"""A server that drafts against one that does not: the same answers, and counts that tell what was spared."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import LiveServer
from small_stores import Published

from knnlm_core.datastore.reader import Datastore

LAW, BOTH = "tiny-lm@law", "tiny-lm@law+news"
Start = Callable[..., LiveServer]
BODIES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "knn": {"lambda": 0.999, "temperature": 0.5}},
    {"temperature": 0, "knn": {"gate": "automaton", "gate_threshold": 2, "lambda": 0.9}},
    {"temperature": 0, "knn": {"gate": "confidence", "gate_threshold": 0.3, "lambda": 0.9}},
    {"temperature": 0.8, "top_p": 0.9, "seed": 4, "n": 3, "knn": {"lambda": 0.95}},
    {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5, "stop": ["goods", "rent"], "knn": {"lambda": 0.95}},
    {"temperature": 0, "model": BOTH, "knn": {"lambda": 0.999, "temperature": 0.5, "mixture": "neighbors"}},
    {"temperature": 0, "model": "tiny-lm"},
]


@pytest.fixture
def drafting(start_server: Start, published: Published) -> LiveServer:
    return start_server(datastores=published.root, max_sequences=8, draft_tokens=6)


def test_a_server_that_drafts_says_the_same(drafting: LiveServer, live_server: LiveServer, law: Datastore) -> None:
    texts = [law.document(f"new-{i}").text for i in (1, 3)]
    jobs = [
        (text[start : start + 60], {"model": LAW, "max_tokens": 40, "ignore_eos": True, "logprobs": 1, **body})
        for body in BODIES
        for text in texts
        for start in (0, 45)
    ]
    need = [live_server.complete(prompt, **body) for prompt, body in jobs]
    with ThreadPoolExecutor(6) as threads:
        have = list(threads.map(lambda job: drafting.complete(job[0], **job[1]), jobs))
    drafted = accepted = 0
    counted = dict.fromkeys(("searched", "followed", "skipped"), 0)
    for (_, body), one, other in zip(jobs, have, need, strict=True):
        for choice, same in zip(one["choices"], other["choices"], strict=True):
            assert (choice["text"], choice["finish_reason"]) == (same["text"], same["finish_reason"])
            for name in ("tokens", "text_offset"):
                assert choice["logprobs"][name] == same["logprobs"][name]
            values = [value["logprobs"]["token_logprobs"] for value in (choice, same)]
            assert values[0] == pytest.approx(values[1], abs=2e-3)
        if "@" not in body["model"]:
            assert one["usage"].get("knn") == other["usage"].get("knn")
            continue
        usage, same_usage = one["usage"]["knn"], other["usage"]["knn"]
        for name in ("searched", "followed", "skipped"):
            if "stop" not in body:
                assert usage[name] == same_usage[name]
            assert usage[name] >= same_usage[name]  # what was done behind a stop string counts
            counted[name] += usage[name]
        assert (same_usage["drafted"], same_usage["accepted"]) == (0, 0)
        assert 0 <= usage["accepted"] <= min(usage["drafted"], one["usage"]["completion_tokens"])
        drafted, accepted = drafted + usage["drafted"], accepted + usage["accepted"]
    assert drafted > 0
    assert accepted > 0
    metrics = drafting.http.get("/metrics").text
    assert f"knnlm_drafted_tokens_total {float(drafted)}" in metrics
    assert f"knnlm_accepted_tokens_total {float(accepted)}" in metrics
    for name, count in counted.items():
        assert f'knnlm_retrievals_total{{decision="{name}"}} {float(count)}' in metrics


def test_a_request_may_want_no_drafts(drafting: LiveServer, law: Datastore) -> None:
    body = {"model": LAW, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    prompt, knn = law.document("new-2").text[:80], {"lambda": 0.999, "temperature": 0.5}
    wanted, unwanted = (
        drafting.complete(prompt, knn={**knn, "speculate": speculate}, **body) for speculate in (True, False)
    )
    assert wanted["usage"]["knn"]["drafted"] > 0
    assert unwanted["usage"]["knn"]["drafted"] == 0
    assert wanted["choices"] == unwanted["choices"]


def test_drafts_are_refused_where_nothing_is_generated(drafting: LiveServer) -> None:
    for path, body in (("score", {"input": ["The tenant"]}), ("neighbors", {"input": "The tenant"})):
        answer = drafting.post(f"/v1/{path}", {"model": LAW, "knn": {"speculate": True}, **body})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_feature", "knn.speculate")
        assert "for completions" in error["message"]


def test_what_streams_from_drafts_is_what_comes_whole(drafting: LiveServer, law: Datastore) -> None:
    body = {"model": LAW, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    knn = {"lambda": 0.999, "temperature": 0.5, "trace": True}
    prompt = law.document("new-2").text[:80]
    (whole,) = drafting.complete(prompt, knn=knn, **body)["choices"]
    chunks = [chunk["choices"][0] for chunk in drafting.stream(prompt, knn=knn, **body)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    tokens = [token for chunk in chunks for token in chunk["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    assert len([entry for chunk in chunks for entry in chunk["knn"]]) == len(tokens) == 60
