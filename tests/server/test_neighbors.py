"""POST /v1/neighbors on a live server against slow float64 recomputations."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from exact_reference import ExactReference, Knn, stored
from live_server import LiveServer, wait_until

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.api.schemas.neighbors import NeighborsAnswer
from knnlm_server.engine.neighbors import ContextNeighbors, NeighborsRequest

LAW = "tiny-lm@law"
KNN = Knn(k=12, temperature=15.0, lmbda=0.4)
KNN_BODY = {"k": KNN.k, "temperature": KNN.temperature, "lambda": KNN.lmbda}
CONTEXTS = ["The court may refuse", "3. new: Der Käufer schuldet the goods. The café’s", "A buyer", "🙂 zzz"]
SOON_S = 5.0


def neighbors(server: LiveServer, given: Any, **body: Any) -> list[dict[str, Any]]:
    response = server.post("/v1/neighbors", {"input": given, "model": LAW, "knn": KNN_BODY, **body})
    assert response.status_code == 200, response.text
    NeighborsAnswer.model_validate_json(response.content)
    answer = response.json()
    assert [result["index"] for result in answer["results"]] == list(range(len(answer["results"])))
    return answer["results"]


def test_neighbours_are_the_nearest_of_all_entries(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM
) -> None:
    keys, values = stored(law)
    results = neighbors(live_server, CONTEXTS, limit=100)
    for text, result in zip(CONTEXTS, results, strict=True):
        ids = lm.tokenizer.encode(text)
        assert result["tokens"] == len(ids)
        distances = ((keys - reference.run(ids).keys[-1]) ** 2).sum(axis=1)
        found = [near["entry_id"] for near in result["neighbors"]]
        assert len(set(found)) == KNN.k
        assert [near["distance"] for near in result["neighbors"]] == pytest.approx(
            np.sort(distances)[: KNN.k], rel=1e-3
        )
        assert distances[found] == pytest.approx(np.sort(distances)[: KNN.k], rel=1e-3)
        assert [near["token_id"] for near in result["neighbors"]] == values[found].tolist()
        weights = np.exp(-(distances[found] - distances.min()) / KNN.temperature)
        need = weights / weights.sum()
        assert [near["weight"] for near in result["neighbors"]] == pytest.approx(need, abs=1e-4)
        for near in result["neighbors"]:
            assert near["token"] == lm.tokenizer.token_text(near["token_id"])


def test_next_tokens_carry_the_probabilities_of_a_float64_recomputation(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM
) -> None:
    compared = 0
    for text, result in zip(CONTEXTS, neighbors(live_server, CONTEXTS, limit=100), strict=True):
        ids = lm.tokenizer.encode(text)
        seen = reference.run(ids)
        p_lm = np.exp(seen.log_probs[-1])
        p_knn, margin = reference.knn_probs(law, seen.keys[-1], KNN, len(p_lm))
        if margin < 1e-3:  # it is a matter of rounding which neighbour is the k-th
            continue
        compared += 1
        tokens = result["next_tokens"]
        assert {token["token_id"] for token in tokens} == set(np.flatnonzero(p_knn).tolist())
        assert [token["p_knn"] for token in tokens] == sorted((token["p_knn"] for token in tokens), reverse=True)
        assert math.fsum(token["p_knn"] for token in tokens) == pytest.approx(1, abs=1e-5)
        mixed = np.exp(reference.mixed(law, ids, KNN)[0])
        for token in tokens:
            given = (token["p_knn"], token["p_lm"], token["p"])
            at = token["token_id"]
            assert given == pytest.approx((p_knn[at], p_lm[at], mixed[at]), rel=1e-3, abs=1e-6)
            assert token["token"] == lm.tokenizer.token_text(at)
    assert compared >= 3


def test_limit_cuts_both_lists_after_weighting(live_server: LiveServer) -> None:
    (everything,) = neighbors(live_server, CONTEXTS[0], limit=100)
    (few,) = neighbors(live_server, CONTEXTS[0], limit=2)
    assert few["neighbors"] == everything["neighbors"][:2]
    assert few["next_tokens"] == everything["next_tokens"][:2]
    assert len(everything["next_tokens"]) > 2
    (default,) = neighbors(live_server, CONTEXTS[0])
    assert len(default["neighbors"]) == 10


@pytest.mark.parametrize("chars", [0, 7, 2000])
def test_source_text_stands_around_the_value(
    live_server: LiveServer, law: Datastore, lm: HuggingFaceLM, chars: int
) -> None:
    for result in neighbors(live_server, CONTEXTS, context_chars=chars, limit=100):
        for near in result["neighbors"]:
            document = law.document(near["document_id"])
            start, end = near["char_start"], near["char_end"]
            assert (near["uri"], near["title"], near["licence"]) == (document.uri, document.title, document.licence)
            assert near["text"] == document.text[start:end]
            assert (near["before"] + near["text"] + near["after"]) in document.text
            assert len(near["before"]) == min(chars, start)
            assert len(near["after"]) == min(chars, len(document.text) - end)
            assert document.text[:start].endswith(near["before"])
            assert document.text[end:].startswith(near["after"])
            if "\ufffd" not in near["token"]:
                assert near["text"] == near["token"]
            (place,) = law.locate([near["entry_id"]])
            assert (place.document_id, place.char_start) == (near["document_id"], start)


def test_every_form_of_input_is_the_same_context(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    ids = lm.tokenizer.encode(CONTEXTS[0])
    forms = (CONTEXTS[0], [CONTEXTS[0]], ids, [ids])
    need, *others = (neighbors(live_server, form) for form in forms)
    assert all(other == need for other in others)


def test_a_batch_equals_its_contexts_one_by_one(live_server: LiveServer) -> None:
    together = neighbors(live_server, CONTEXTS)
    for text, result in zip(CONTEXTS, together, strict=True):
        (alone,) = neighbors(live_server, text)
        assert [near["entry_id"] for near in alone["neighbors"]] == [near["entry_id"] for near in result["neighbors"]]
        assert [token["p"] for token in alone["next_tokens"]] == pytest.approx(
            [token["p"] for token in result["next_tokens"]], abs=1e-5
        )


def test_excluded_documents_are_not_found_and_excluding_all_finds_nothing(
    live_server: LiveServer, law: Datastore
) -> None:
    ids = law.document_ids()
    (free,) = neighbors(live_server, CONTEXTS[1], limit=100)
    excluded = free["neighbors"][0]["document_id"]
    (rest,) = neighbors(live_server, CONTEXTS[1], limit=100, exclude_documents=[excluded])
    assert len(rest["neighbors"]) == KNN.k
    assert excluded not in {near["document_id"] for near in rest["neighbors"]}
    nothing = neighbors(live_server, CONTEXTS, exclude_documents=ids)
    assert all(result["neighbors"] == result["next_tokens"] == [] for result in nothing)


def test_a_context_may_fill_the_lms_and_no_more(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    most = lm.max_length
    (result,) = neighbors(live_server, [[5] * most])
    assert result["tokens"] == most
    response = live_server.post("/v1/neighbors", {"input": [[5], [5] * (most + 1)], "model": LAW})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert str(most) in error["message"]
    assert str(most + 1) in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"model": "tiny-lm"}, 400, "invalid_parameter", "model"),
        ({"model": "tiny-lm@nope"}, 404, "datastore_not_found", "knn.datastore"),
        ({"input": []}, 400, "invalid_parameter", "input"),
        ({"input": ""}, 400, "invalid_parameter", "input"),
        ({"input": ["x", ""]}, 400, "invalid_parameter", "input"),
        ({"input": [[5], []]}, 400, "invalid_parameter", "input"),
        ({"input": [512]}, 400, "invalid_parameter", "input"),
        ({"input": [-1]}, 400, "invalid_parameter", "input"),
        ({"input": ["x"] * 129}, 400, "invalid_parameter", "input"),
        ({"limit": 0}, 400, "invalid_parameter", "limit"),
        ({"limit": 101}, 400, "invalid_parameter", "limit"),
        ({"context_chars": -1}, 400, "invalid_parameter", "context_chars"),
        ({"context_chars": 2001}, 400, "invalid_parameter", "context_chars"),
        ({"knn": {"k": 0}}, 400, "invalid_knn_params", "knn.k"),
        ({"knn": {"gate": "never"}}, 400, "invalid_knn_params", "knn.gate"),
        ({"knn": {"depth": 1}}, 400, "invalid_parameter", "knn.depth"),
        ({"exclude_documents": ["old-1"]}, 404, "document_not_found", "document"),
    ],
)
def test_a_bad_request_gets_its_own_error(
    live_server: LiveServer, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    response = live_server.post("/v1/neighbors", {"input": "The court", "model": LAW, **body})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"].split(".0")[0].split(".1")[0]) == (code, param)
    wait_until(live_server.is_idle, within_s=SOON_S)


def test_leaving_frees_engine_and_lease(live_server: LiveServer) -> None:
    encode, gone = live_server.lm.encode, threading.Event()

    def encode_when_gone(*args: Any) -> Any:
        gone.wait(SOON_S)
        return encode(*args)

    live_server.lm.encode = encode_when_gone  # type: ignore[method-assign]
    try:
        body = {"input": CONTEXTS * 30, "model": LAW}
        with httpx.Client(base_url=live_server.url, trust_env=False) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/neighbors", json=body, timeout=0.3)
        assert live_server.backend.engine.load().scoring == 1
        gone.set()
        wait_until(live_server.is_idle, within_s=SOON_S)
    finally:
        del live_server.lm.encode


@pytest.mark.parametrize("budget", [1, 10, 4096])
def test_passes_take_each_context_once_within_the_budget(lm: HuggingFaceLM, law: Datastore, budget: int) -> None:
    contexts = [[3 + i] * length for i, length in enumerate((4, 1, 9, 2, 2, 7))]
    done: list[tuple[int, ContextNeighbors]] = []
    retrieval = Retrieval((Source(law, *KNN),))
    request = NeighborsRequest("test", contexts, retrieval, 3, lambda *found: done.append(found), lambda error: None)
    sizes = []
    while not request.is_done:
        before = len(done)
        request.run(lm, budget)
        taken = contexts[before : len(done)]
        assert len(taken) == 1 or len(taken) * max(map(len, taken)) <= budget
        sizes.append(len(taken))
    assert [position for position, _ in done] == list(range(len(contexts)))
    assert sizes == {1: [1] * 6, 10: [2, 1, 2, 1], 4096: [6]}[budget]
    for (_, found), (_, other) in itertools.pairwise(done):
        assert found.nearest.entry_ids.tolist() != other.nearest.entry_ids.tolist()
