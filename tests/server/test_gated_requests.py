"""Gates over HTTP: what is skipped stays the base LM's, and generation and scoring decide alike."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import LiveServer

from knnlm_core.lm.huggingface import HuggingFaceLM

PROMPT = "3. new: Der Käufer schuldet the goods. The café’s landlord must keep"
LAW, BOTH = "tiny-lm@law", "tiny-lm@law+news"
KNN: dict[str, Any] = {"k": 12, "temperature": 15.0, "lambda": 0.4}
GATES: list[dict[str, Any]] = [
    {"gate": "every_n", "gate_threshold": 3},
    {"gate": "confidence", "gate_threshold": 0.14},
    {"gate": "confidence", "gate_threshold": 0.0},
    {"gate": "never"},
]


def traced(server: LiveServer, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0, **options}
    answer = server.post("/v1/completions", {**body, "knn": {**body["knn"], "trace": True}})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["knn"], answer.json()["usage"]["knn"]


@pytest.mark.parametrize("model", [LAW, BOTH])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate['gate']}-{gate.get('gate_threshold')}")
def test_a_greedy_generation_is_scored_as_it_was_generated(
    live_server: LiveServer, lm: HuggingFaceLM, gate: dict[str, Any], model: str
) -> None:
    knn = {**KNN, **gate}
    trace, usage = traced(live_server, model=model, knn=knn)
    ids = [*lm.tokenizer.encode(PROMPT), *(entry["token_id"] for entry in trace)]
    body = {"model": model, "input": [ids], "per_token": True, "window": 256, "knn": knn}
    scored = live_server.post("/v1/score", body).json()["results"][0]["per_token"][-len(trace) :]
    for told, entry in zip(trace, scored, strict=True):
        assert (entry["searched"], entry["decision"]) == (told["searched"], gate["gate"])
        assert entry["lambda"] == pytest.approx(told["lambda"], abs=1e-12)
        assert entry["mixed"] == pytest.approx(math.log(told["p"]), abs=1e-4)
        if not told["searched"]:
            assert (told["lambda"], told["neighbors"], told["p"]) == (0.0, [], pytest.approx(told["p_lm"]))
    searched = sum(entry["searched"] for entry in trace)
    assert (usage["searched"], usage["skipped"]) == (searched, len(trace) - searched)


@pytest.mark.parametrize("gate", GATES[:2], ids=lambda gate: str(gate["gate"]))
def test_a_gate_shows_what_it_decided_by(live_server: LiveServer, lm: HuggingFaceLM, gate: dict[str, Any]) -> None:
    trace, _ = traced(live_server, model=LAW, knn={**KNN, **gate})
    assert {entry["searched"] for entry in trace} == {True, False}
    first = len(lm.tokenizer.encode(PROMPT))
    for position, entry in enumerate(trace, first):
        if gate["gate"] == "every_n":
            assert entry["gate_score"] == position % 3
            assert entry["searched"] is (position % 3 == 0)
        else:
            assert entry["p_lm"] <= entry["gate_score"] + 1e-6
            assert entry["searched"] is (entry["gate_score"] < 0.14)


@pytest.mark.parametrize("gate", GATES[:2], ids=lambda gate: str(gate["gate"]))
def test_an_echoed_prompt_is_gated_as_a_score_is(live_server: LiveServer, gate: dict[str, Any]) -> None:
    knn = {**KNN, **gate}
    body = {"model": LAW, "prompt": PROMPT, "echo": True, "max_tokens": 0, "logprobs": 0, "knn": knn}
    echoed = live_server.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"][1:]
    answer = live_server.post("/v1/score", {"model": LAW, "input": [PROMPT], "per_token": True, "knn": knn}).json()
    (scored,) = answer["results"]
    assert [entry["mixed"] for entry in scored["per_token"]] == pytest.approx(echoed, abs=1e-4)
    assert 0 < scored["searched"] < scored["tokens"]


def test_requests_with_gates_of_their_own_do_not_disturb_each_other(live_server: LiveServer) -> None:
    alone = [traced(live_server, model=LAW, knn={**KNN, **gate})[0] for gate in GATES]
    with ThreadPoolExecutor(len(GATES)) as threads:
        together = list(threads.map(lambda gate: traced(live_server, model=LAW, knn={**KNN, **gate})[0], GATES))
    for need, have in zip(alone, together, strict=True):
        assert [e["token_id"] for e in have] == [e["token_id"] for e in need]
        assert [e["searched"] for e in have] == [e["searched"] for e in need]


@pytest.mark.parametrize(
    ("knn", "param", "message"),
    [
        ({"gate": "confidence"}, "knn.gate_threshold", "must be given where `knn.gate` is confidence"),
        ({"gate": "confidence", "gate_threshold": 2}, "knn.gate_threshold", "must be in 0 … 1, got 2"),
        ({"gate": "every_n", "gate_threshold": 1.5}, "knn.gate_threshold", "must be a whole number, got 1.5"),
        ({"gate": "never", "gate_threshold": 1}, "knn.gate_threshold", "must not be given where `knn.gate` is never"),
        ({"gate_threshold": 0.5}, "knn.gate_threshold", "needs `knn.gate`"),
        ({"gate": "automaton", "gate_threshold": 0}, "knn.gate_threshold", "a whole number in 1 … 64, got 0"),
        ({"gate": "automaton", "gate_threshold": 65}, "knn.gate_threshold", "a whole number in 1 … 64, got 65"),
        ({"gate": "automaton", "gate_threshold": 1.5}, "knn.gate_threshold", "a whole number in 1 … 64, got 1.5"),
        ({"gate": "learned", "gate_threshold": 0.5}, "knn.gate", "calibration of datastore 'law', and there is none"),
        (
            {"gate": "sometimes"},
            "knn.gate",
            "must be one of always, never, every_n, confidence, automaton, learned, got 'sometimes'",
        ),
    ],
)
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/score"])
def test_what_is_wrong_with_a_gate_is_refused(
    live_server: LiveServer, route: str, knn: dict[str, Any], param: str, message: str
) -> None:
    given = {"prompt": PROMPT} if route == "/v1/completions" else {"input": [PROMPT]}
    answer = live_server.post(route, {"model": LAW, **given, "knn": knn})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
