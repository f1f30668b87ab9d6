"""Documents learned and forgotten over HTTP while the server runs: at once, for good, and traceably."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from live_server import LiveServer, before_each_pass, wait_until
from small_stores import Start

from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.windows import rolling_windows

FACT = "Note 17: the ZX-81 valve's limit is 4.7 bar, said the engineer at the harbour."
PROMPT = "Note 17: the ZX-81 valve's limit is"
KNN = {"k": 4, "temperature": 0.01, "lambda": 0.99}


@pytest.fixture
def server(start_server: Start, own_root: Path) -> Iterator[LiveServer]:
    server = start_server(datastores=own_root)
    yield server
    wait_until(server.is_idle, within_s=5)


def learn(server: LiveServer, *documents: dict[str, Any], name: str = "law", **fields: Any) -> httpx.Response:
    return server.http.post(f"/v1/datastores/{name}/documents", json={"documents": list(documents), **fields})


def forget(server: LiveServer, document_id: str, name: str = "law") -> httpx.Response:
    return server.http.delete(f"/v1/datastores/{name}/documents/{document_id}")


def complete(server: LiveServer, prompt: str = PROMPT, max_tokens: int = 12, **knn: Any) -> dict[str, Any]:
    body = {
        "model": "tiny-lm@law", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 0,
        "ignore_eos": True, "knn": {**KNN, **knn},
    }  # fmt: skip
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    body = answer.json()["error"]
    return answer.status_code, body["code"], body["param"]


def test_a_fact_is_learned_attributed_and_forgotten(server: LiveServer) -> None:
    before = complete(server)
    answer = learn(server, {"id": "manuals/valve", "text": FACT, "title": "Valves", "licence": "CC0"})
    assert answer.status_code == 201, answer.text
    card = answer.json()
    assert (card["name"], card["revision"], card["generation"]) == ("law", 1, 1)
    tokens = len(server.backend.tokenizer.encode(FACT))
    assert card["documents"] == [{"id": "manuals/valve", "tokens": tokens, "entries": tokens - 1}]

    told = complete(server, attribution=True)
    choice = told["choices"][0]
    assert FACT.startswith(PROMPT + choice["text"][:8])
    assert "4.7" in choice["text"]
    assert told["system_fingerprint"].endswith(":1.1")
    shares = {source["document_id"]: source for source in choice["attribution"]["documents"]}
    assert shares["manuals/valve"]["share"] > 0.9
    assert shares["manuals/valve"]["licence"] == "CC0"
    spans = [span for entry in choice["knn"] for source in entry["attribution"]["sources"] for span in source["spans"]]
    assert any("4" in FACT[start:stop] for start, stop in spans)

    gone = forget(server, "manuals/valve")
    assert gone.status_code == 200, gone.text
    assert gone.json()["revision"] == 2
    assert gone.json()["document_id"] == "manuals/valve"
    after = complete(server, attribution=True)
    assert after["system_fingerprint"].endswith(":1.2")
    for field in ("tokens", "token_logprobs"):
        assert after["choices"][0]["logprobs"][field] == before["choices"][0]["logprobs"][field]
    assert "manuals/valve" not in str(after)
    assert error(forget(server, "manuals/valve")) == (404, "document_not_found", "document")


def test_what_was_learned_and_forgotten_survives_a_restart(start_server: Start, own_root: Path) -> None:
    first = start_server(datastores=own_root)
    assert (
        learn(first, {"id": "valve", "text": FACT}, {"id": "other", "text": "Another text about keys."}).status_code
        == 201
    )
    assert forget(first, "other").status_code == 200
    assert forget(first, "new-1").status_code == 200
    told = complete(first)["choices"][0]
    second = start_server(datastores=own_root)
    again = complete(second)
    assert again["system_fingerprint"].endswith(".3")
    assert again["choices"][0]["text"] == told["text"]
    assert again["choices"][0]["logprobs"]["token_logprobs"] == told["logprobs"]["token_logprobs"]
    card = second.http.get("/v1/datastores/law").json()
    assert (card["revision"], card["learned_documents"], card["deleted_documents"]) == (3, 1, 2)
    assert error(forget(second, "new-1"))[1] == "document_not_found"


def test_learned_keys_are_those_of_a_build(server: LiveServer, lm: HuggingFaceLM, own_root: Path) -> None:
    text = " ".join(f"{i}. The buyer may refuse what the court has lost." for i in range(30))
    assert learn(server, {"id": "long", "text": text}).status_code == 201
    snapshot = server.backend.registry.status("law").datastore
    first, stop = snapshot.document_entries("long")
    ids = lm.tokenizer.encode(text)
    context = snapshot.manifest.context
    assert len(ids) > 2 * context.window, "several windows"
    need = []
    for window in rolling_windows(len(ids), context.window, context.stride):
        row = window.first_target - 1 - window.begin
        need.append(lm.encode([ids[window.begin : window.end - 1]], [row]).keys.numpy())
    have = snapshot.keys(torch.arange(first, stop)).numpy()
    np.testing.assert_allclose(have, np.concatenate(need).astype(np.float16), atol=2e-3)
    assert snapshot.values(torch.arange(first, stop)).tolist() == ids[1:]
    for place, token_id in zip(snapshot.locate(range(first, stop)), ids[1:], strict=True):
        assert place is not None
        assert place.document_id == "long"
        assert lm.tokenizer.token_text(token_id) in (
            text[place.char_start : place.char_end],
            "\N{REPLACEMENT CHARACTER}",
        )


def test_an_id_that_is_there_needs_update(server: LiveServer) -> None:
    assert error(learn(server, {"id": "new-0", "text": FACT})) == (409, "document_exists", "documents")
    answer = learn(server, {"id": "new-0", "text": FACT}, update=True)
    assert answer.status_code == 201
    snapshot = server.backend.registry.status("law").datastore
    assert snapshot.document("new-0").text == FACT
    assert snapshot.document_ids().count("new-0") == 1
    assert "4.7" in complete(server)["choices"][0]["text"]


def test_a_learned_document_is_scored_without_itself(server: LiveServer) -> None:
    base = server.http.post("/v1/score", json={"model": "tiny-lm", "input": [FACT]}).json()["total"]["base"]["nll"]
    learn(server, {"id": "a/valve", "text": FACT})
    body = {"model": "tiny-lm@law", "knn": KNN}
    known = server.http.post("/v1/score", json={**body, "input": [FACT]}).json()["total"]["mixed"]["nll"]
    own = server.http.post("/v1/score", json={**body, "input": [{"document_id": "a/valve"}]}).json()["total"]
    excluded = {**body, "input": [FACT], "exclude_documents": ["a/valve"]}
    assert known < 0.2 * base
    assert own["mixed"]["nll"] > 2 * known
    assert server.http.post("/v1/score", json=excluded).json()["total"]["mixed"]["nll"] == pytest.approx(
        own["mixed"]["nll"]
    )


def test_a_document_of_one_token_is_kept_and_makes_no_entry(server: LiveServer, lm: HuggingFaceLM) -> None:
    word = lm.tokenizer.token_text(lm.tokenizer.encode(FACT)[0])
    assert len(lm.tokenizer.encode(word)) == 1
    card = learn(server, {"id": "one", "text": word}).json()
    assert card["documents"] == [{"id": "one", "tokens": 1, "entries": 0}]
    assert server.backend.registry.status("law").datastore.document("one").text == word
    assert forget(server, "one").status_code == 200


def test_text_is_kept_as_a_build_would(server: LiveServer) -> None:
    learn(server, {"id": "crlf", "text": "One line.\r\nAnother\rand one.", "tags": ["a"], "uri": "file:x"})
    document = server.backend.registry.status("law").datastore.document("crlf")
    assert document.text == "One line.\nAnother\nand one."
    assert (document.tags, document.uri) == (("a",), "file:x")


@pytest.mark.parametrize(
    ("documents", "status", "code", "param"),
    [
        ([], 400, "invalid_parameter", "documents"),
        ([{"id": "a", "text": "x\0y"}], 400, "invalid_parameter", "documents"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], 400, "invalid_parameter", "documents"),
        ([{"id": "a" * 4097, "text": "x"}], 400, "invalid_parameter", "documents"),
        ([{"id": "a", "text": "x", "tags": ["t"] * 65}], 400, "invalid_parameter", "documents"),
        ([{"id": "a", "text": "x", "title": "t" * 1025}], 400, "invalid_parameter", "documents"),
        ([{"id": "a", "text": "The tenant " * 80_000}], 400, "invalid_parameter", "documents"),
        ([{"id": "a", "text": "x", "colour": "red"}], 400, "invalid_parameter", "documents.0.colour"),
        ([{"id": f"{i}", "text": "x"} for i in range(1025)], 400, "invalid_parameter", "documents"),
    ],
    ids=["none", "NUL", "twice", "long id", "many tags", "long title", "many tokens", "unknown field", "many"],
)
def test_bad_documents_are_refused_and_change_nothing(
    server: LiveServer, own_root: Path, documents: list[dict[str, Any]], status: int, code: str, param: str
) -> None:
    assert error(learn(server, *documents)) == (status, code, param)
    assert read_ledger(own_root, "law").revision == 0


def test_only_loaded_datastores_learn(server: LiveServer) -> None:
    assert error(learn(server, {"id": "a", "text": "x y"}, name="nothing"))[:2] == (404, "datastore_not_found")


def test_a_client_that_leaves_while_keys_are_made_teaches_nothing(server: LiveServer, own_root: Path) -> None:
    with before_each_pass(server.backend.lm, lambda: time.sleep(0.3)), pytest.raises(httpx.ReadTimeout):
        server.http.post(
            "/v1/datastores/law/documents",
            json={"documents": [{"id": f"d{i}", "text": FACT * 40} for i in range(4)]},
            timeout=0.2,
        )
    wait_until(server.is_idle)
    assert read_ledger(own_root, "law").revision == 0
    assert "4.7" not in complete(server)["choices"][0]["text"]


def test_forgetting_reaches_a_request_under_way(server: LiveServer) -> None:
    """The first tokens repeat the document; from the deletion on nothing of it is retrieved."""
    learn(server, {"id": "valve", "text": FACT * 8})
    seen: list[bool] = []
    body = {
        "model": "tiny-lm@law", "prompt": FACT[:30], "max_tokens": 60, "temperature": 0, "ignore_eos": True,
        "stream": True, "knn": {**KNN, "trace": True},
    }  # fmt: skip
    with (
        before_each_pass(server.backend.lm, lambda: time.sleep(0.01), path="forward"),
        server.http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for entry in json.loads(line[6:])["choices"][0].get("knn") or ():
                seen.append(any(neighbor["document_id"] == "valve" for neighbor in entry["neighbors"]))
            if len(seen) == 10:
                assert forget(server, "valve").status_code == 200
                told = len(seen)
    assert all(seen[:10])
    assert len(seen) == 60
    # Tokens that were on their way when the deletion was answered may still name it.
    assert not any(seen[told + 10 :])
