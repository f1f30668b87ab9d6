"""Every way to ask wrongly gets an error of its own, in the one body shape, and leaves the server as it was."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Brake, LiveServer, parse_events, wait_until
from pydantic import ValidationError
from small_stores import Published, Start

from knnlm_core.datastore import layout
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreCorrupt
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_server.api.schemas.completions import CompletionBody
from knnlm_server.engine import engine as engine_module

LAW = "tiny-lm@law"
PROMPT = "The tenant"


def check_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer in the one body shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert error["type"]
    assert error["message"]
    return error


# -- completions -----------------------------------------------------------------------------------------------------

KNN = {"datastore": "law"}


def two(law: dict[str, Any], news: dict[str, Any], **knn: Any) -> dict[str, Any]:
    """A body that mixes two datastores, each with fields of its own."""
    return {"knn": {"datastore": [{"name": "law", **law}, {"name": "news", **news}], **knn}}


# body over {"prompt": PROMPT}, status, code, param, and what the message says
BAD_COMPLETIONS: list[tuple[dict[str, Any], int, str, str | None, str]] = [
    ({"model": "gpt-5"}, 404, "model_not_found", "model", "'gpt-5'.*'tiny-lm'"),
    ({"model": "tiny-lm@"}, 404, "model_not_found", "model", "names no datastore"),
    ({"model": "tiny-lm@nope"}, 404, "datastore_not_found", "knn.datastore", "'nope'.*law, news"),
    ({"knn": {"datastore": "nope"}}, 404, "datastore_not_found", "knn.datastore", "'nope'"),
    ({"knn": {"datastore": ""}}, 400, "invalid_parameter", "knn.datastore", "''"),
    ({"model": LAW, "knn": {"datastore": "news"}}, 400, "invalid_parameter", "knn.datastore", "'law'.*'news'"),
    ({"knn": {"k": 4}}, 400, "invalid_parameter", "knn.k", "needs a datastore"),
    ({"knn": {"lambda": 0.5}}, 400, "invalid_parameter", "knn.lambda", "needs a datastore"),
    ({"knn": {**KNN, "lambda": 2}}, 400, "invalid_knn_params", "knn.lambda", r"0 … 1, got 2"),
    ({"knn": {**KNN, "lambda": -0.1}}, 400, "invalid_knn_params", "knn.lambda", r"got -0\.1"),
    ({"knn": {**KNN, "temperature": 0}}, 400, "invalid_knn_params", "knn.temperature", "1e-06 … .*, got 0"),
    ({"knn": {**KNN, "temperature": 1e-46}}, 400, "invalid_knn_params", "knn.temperature", "got 1e-46"),
    ({"knn": {**KNN, "temperature": 1e39}}, 400, "invalid_knn_params", "knn.temperature", r"got 1e\+39"),
    ({"knn": {**KNN, "k": 0}}, 400, "invalid_knn_params", "knn.k", "1 … 4096, got 0"),
    ({"knn": {**KNN, "k": 10**6}}, 400, "invalid_knn_params", "knn.k", "1 … 4096, got 1000000"),
    ({"knn": {**KNN, "gate": "sometimes"}}, 400, "invalid_knn_params", "knn.gate", "always, .*, got 'sometimes'"),
    ({"knn": {**KNN, "gate": "learned"}}, 400, "invalid_knn_params", "knn.gate", "'law', and there is none"),
    (
        {"knn": {**KNN, "gate": "automaton", "gate_threshold": 0}},
        400,
        "invalid_knn_params",
        "knn.gate_threshold",
        "1 … 64",
    ),
    ({"knn": {**KNN, "gate_threshold": 0.5}}, 400, "invalid_knn_params", "knn.gate_threshold", "threshold"),
    ({"knn": {**KNN, "speculate": True}}, 400, "unsupported_feature", "knn.speculate", "--draft-tokens 0"),
    ({"knn": {"datastore": []}}, 400, "invalid_parameter", "knn.datastore", "1 … 8 datastores, got 0"),
    ({"knn": {"datastore": [{"name": f"n{i}"} for i in range(9)]}}, 400, "invalid_parameter", "knn.datastore", "got 9"),
    (two({"weight": 1}, {}), 400, "invalid_knn_params", "knn.datastore", "to all datastores or to none, got 1 of 2"),
    (two({"weight": 1}, {"weight": 0}), 400, "invalid_knn_params", "knn.datastore.1.weight", "above 0 .*, got 0"),
    (two({"weight": 1e7}, {"weight": 1}), 400, "invalid_knn_params", "knn.datastore.0.weight", r"1e\+06, got 1e\+07"),
    (two({}, {"name": "law"}), 400, "invalid_parameter", "knn.datastore", "'law' as 'law' and as 'law'"),
    (two({}, {"name": "nope"}), 404, "datastore_not_found", "knn.datastore", "'nope'"),
    (two({}, {"name": ""}), 400, "invalid_parameter", "knn.datastore", "name of a loaded datastore, got ''"),
    (two({"weight": "1"}, {}), 400, "invalid_parameter", "knn.datastore.0.weight", "valid number, got '1'"),
    (two({"share": 1}, {}), 400, "invalid_parameter", "knn.datastore.0.share", "Extra inputs"),
    (two({}, {}, mixture="both"), 400, "invalid_knn_params", "knn.mixture", "distributions, neighbors, got 'both'"),
    (two({}, {}, weights="some"), 400, "invalid_knn_params", "knn.weights", "given, prompt, got 'some'"),
    (two({}, {}, mixture="neighbors"), 400, "invalid_knn_params", "knn.temperature", "one `knn.temperature`"),
    (
        two({}, {}, mixture="neighbors", temperature=5.0),
        400,
        "invalid_knn_params",
        "knn.lambda",
        "one `knn.lambda` for all",
    ),
    (
        two({"weight": 1}, {"weight": 2}, mixture="neighbors", **{"temperature": 5.0, "lambda": 0.5}),
        400,
        "invalid_knn_params",
        "knn.mixture",
        "knows no weights",
    ),
    (
        two({}, {}, mixture="neighbors", weights="prompt", **{"temperature": 5.0, "lambda": 0.5}),
        400,
        "invalid_knn_params",
        "knn.mixture",
        "knows no weights",
    ),
    (
        two({"weight": 1}, {"weight": 2}, weights="prompt"),
        400,
        "invalid_knn_params",
        "knn.weights",
        "gives weights",
    ),
    (two({}, {}, weights="prompt", gate="never"), 400, "invalid_knn_params", "knn.weights", "`knn.gate` is never"),
    (two({}, {}, k=4097), 400, "invalid_knn_params", "knn.k", "1 … 4096, got 4097"),
    ({"knn": {"weights": "prompt"}}, 400, "invalid_parameter", "knn.weights", "needs a datastore"),
    ({"knn": {"mixture": "distributions"}}, 400, "invalid_parameter", "knn.mixture", "needs a datastore"),
    (
        {"model": "tiny-lm@law+news", "knn": {"datastore": "law"}},
        400,
        "invalid_parameter",
        "knn.datastore",
        r"'law\+news' but .* names 'law'",
    ),
    ({"model": "tiny-lm@law+law"}, 400, "invalid_parameter", "knn.datastore", "'law' as 'law' and as 'law'"),
    ({"model": "tiny-lm@law+"}, 404, "model_not_found", "model", "names no datastore"),
    ({"model": "tiny-lm@" + "+".join("abcdefghi")}, 400, "invalid_parameter", "model", "at most 8 datastores, got 9"),
    (
        {"model": LAW, "max_tokens": 240, "n": 8, "knn": {"k": 4096, "attribution": True}},
        400,
        "invalid_parameter",
        "knn.attribution",
        "1920 tokens × 4096 = 7864320",
    ),
    ({"knn": {**KNN, "lamda": 0.5}}, 400, "invalid_parameter", "knn.lamda", "Extra inputs"),
    ({"knn": {**KNN, "k": "8"}}, 400, "invalid_parameter", "knn.k", "valid integer, got '8'"),
    ({"knn": "law"}, 400, "invalid_parameter", "knn", "got 'law'"),
    ({"suffix": "end"}, 400, "unsupported_feature", "suffix", "not offered"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_feature", "tools", "not offered"),
    ({"functions": [{"name": "f"}]}, 400, "unsupported_feature", "functions", "not offered"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_feature", "response_format", "other than text"),
    ({"n": 3, "best_of": 2}, 400, "invalid_parameter", "best_of", r"at least `n` \(3\), got 2"),
    ({"best_of": 3, "stream": True}, 400, "invalid_parameter", "best_of", "got 3"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_parameter", "stream_options", "stream"),
    ({"max_tokens": 0}, 400, "invalid_parameter", "max_tokens", "at least 1 without `echo`, got 0"),
    ({"max_tokens": 256}, 400, "context_length_exceeded", "max_tokens", "at most 256 tokens.* 256 = "),
    ({"max_tokens": 10**30}, 400, "context_length_exceeded", "max_tokens", "at most 256"),
    ({"prompt": [1] * 256}, 400, "context_length_exceeded", "prompt", r"256 \+ 16 = 272"),
    ({"prompt": "long " * 500}, 400, "context_length_exceeded", "prompt", "at most 256"),
    ({"prompt": ""}, 400, "invalid_parameter", "prompt", "at least 1 token"),
    ({"prompt": []}, 400, "invalid_parameter", "prompt", "got 0"),
    ({"prompt": [[]]}, 400, "invalid_parameter", "prompt", "at least 1 token"),
    ({"prompt": [""]}, 400, "invalid_parameter", "prompt", ""),
    ({"prompt": [512]}, 400, "invalid_parameter", "prompt", "token id 512.*0 … 511"),
    ({"prompt": [[3], [-1]]}, 400, "invalid_parameter", "prompt", "token id -1"),
    ({"prompt": [10**30]}, 400, "invalid_parameter", "prompt", "0 … 511"),
    ({"prompt": ["a"] * 1000}, 400, "invalid_parameter", "prompt", "1 … 264 prompts, got 1000"),
    ({"prompt": 5}, 400, "invalid_parameter", "prompt", "got '5'"),
    ({"prompt": None}, 400, "invalid_parameter", "prompt", ""),
    ({"prompt": [1, "a"]}, 400, "invalid_parameter", "prompt", ""),
    ({"prompt": [True]}, 400, "invalid_parameter", "prompt", ""),
    ({"stream": "yes"}, 400, "invalid_parameter", "stream", "valid boolean, got 'yes'"),
    ({"temperature": "hot"}, 400, "invalid_parameter", "temperature", "valid number, got 'hot'"),
    ({"temperature": -1}, 400, "invalid_parameter", "temperature", "at least 0, got -1"),
    ({"top_p": 1.5}, 400, "invalid_parameter", "top_p", r"from 0 to 1, got 1\.5"),
    ({"n": 0}, 400, "invalid_parameter", "n", "got 0"),
    ({"n": 9}, 400, "invalid_parameter", "n", "at most 8.*got 9"),
    ({"n": 1.5}, 400, "invalid_parameter", "n", r"got '1\.5'"),
    ({"logprobs": 21}, 400, "invalid_parameter", "logprobs", "from 0 to 20, got 21"),
    ({"stop": ["x"] * 33}, 400, "invalid_parameter", "stop", "at most 32"),
    ({"stop": [""]}, 400, "invalid_parameter", "stop", "from 1 to"),
    ({"stop": 7}, 400, "invalid_parameter", "stop", ""),
    ({"stop_token_ids": [512]}, 400, "invalid_parameter", "stop_token_ids", "got 512"),
    ({"logit_bias": {"x": 1}}, 400, "invalid_parameter", "logit_bias", "'x'"),
    ({"logit_bias": {"--5": 1}}, 400, "invalid_parameter", "logit_bias", "'--5'"),
    ({"logit_bias": {"²": 1}}, 400, "invalid_parameter", "logit_bias", "'²'"),
    ({"logit_bias": {"5": "1"}}, 400, "invalid_parameter", "logit_bias", "for token 5"),
    ({"logit_bias": {str(i): "x" for i in range(2000)}}, 400, "invalid_parameter", "logit_bias", "1024 .*got 2000"),
    ({"logit_bias": {"512": 1}}, 400, "invalid_parameter", "logit_bias", "got 512"),
    ({"logit_bias": {"1": 1e9}}, 400, "invalid_parameter", "logit_bias", "for token 1"),
]


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"),
    BAD_COMPLETIONS,
    ids=lambda v: str(v)[:50] if type(v) is dict else "",
)
def test_a_bad_completion_gets_its_own_error(
    live_server: LiveServer, body: dict[str, Any], status: int, code: str, param: str | None, message: str
) -> None:
    for stream in ({}, {"stream": True}):
        if stream and body.keys() & {"stream", "stream_options"}:
            continue
        response = live_server.post("/v1/completions", {"prompt": PROMPT, **stream, **body})
        error = check_error(response, status, code)
        assert param in (error["param"], (error["param"] or "").split(".0")[0].split(".1")[0])
        assert re.search(message, error["message"]), error["message"]


def test_null_and_unknown_fields_change_nothing(live_server: LiveServer) -> None:
    plain = live_server.complete(PROMPT, max_tokens=4)["choices"]
    nulls = dict.fromkeys(("top_p", "n", "stop", "seed", "logprobs", "logit_bias", "suffix", "best_of", "user", "knn"))
    assert live_server.complete(PROMPT, max_tokens=4, **nulls)["choices"] == plain
    extra = {"guided_decoding": 7, "user": "somebody", "response_format": {"type": "text"}, "tools": []}
    assert live_server.complete(PROMPT, max_tokens=4, **extra)["choices"] == plain


def test_half_a_surrogate_pair_is_refused(live_server: LiveServer) -> None:
    for path, content in (
        ("/v1/completions", r'{"prompt": "\ud800"}'),
        ("/v1/completions", r'{"prompt": ["ok", "\udc00"]}'),
        ("/v1/completions", r'{"prompt": "ok", "stop": "\ud800"}'),
        ("/v1/completions", r'{"prompt": "ok", "knn": {"\ud800": 1}}'),
        ("/v1/score", r'{"input": ["\ud800"]}'),
    ):
        response = live_server.http.post(path, content=content, headers={"content-type": "application/json"})
        check_error(response, 400, "invalid_parameter")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty"])
def test_numbers_that_are_none_are_refused(live_server: LiveServer, field: str, number: str) -> None:
    content = f'{{"prompt": "x", "{field}": {number}}}'
    response = live_server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert check_error(response, 400, "invalid_parameter")["param"] == field


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
@pytest.mark.parametrize("field", ["lambda", "temperature"])
def test_numbers_that_are_none_are_refused_inside_knn(live_server: LiveServer, field: str, number: str) -> None:
    content = f'{{"prompt": "x", "knn": {{"datastore": "law", "{field}": {number}}}}}'
    response = live_server.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert check_error(response, 400, "invalid_knn_params")["param"] == f"knn.{field}"


# -- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_parameter", "input"),
        ({"input": []}, 400, "invalid_parameter", "input"),
        ({"input": ""}, 400, "invalid_parameter", "input"),
        ({"input": [""]}, 400, "invalid_parameter", "input"),
        ({"input": [1, 2]}, 400, "invalid_parameter", "input"),
        ({"input": [[1, 512]]}, 400, "invalid_parameter", "input"),
        ({"input": ["x"] * 4097}, 400, "invalid_parameter", "input"),
        ({"input": ["x"], "stride": "x"}, 400, "invalid_parameter", "stride"),
        ({"input": ["x"], "model": "other"}, 404, "model_not_found", "model"),
        ({"input": ["x"], "model": "tiny-lm@nope"}, 404, "datastore_not_found", "knn.datastore"),
        ({"input": ["x"], "model": LAW, "knn": {"k": 0}}, 400, "invalid_knn_params", "knn.k"),
        ({"input": ["x"], "knn": {"k": 3}}, 400, "invalid_parameter", "knn.k"),
        ({"input": ["x"], "exclude_documents": ["new-1"]}, 400, "invalid_parameter", "exclude_documents"),
        ({"input": ["x"], "model": LAW, "exclude_documents": ["old-1"]}, 404, "document_not_found", "document"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_bad_score_gets_its_own_error(
    live_server: LiveServer, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    error = check_error(live_server.post("/v1/score", body), status, code)
    assert error["param"].split(".0")[0] == param


# -- bodies and routes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['{"prompt": ', "", "[]", '"text"', "\xff", "[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(live_server: LiveServer, content: str) -> None:
    headers = {"content-type": "application/json"}
    response = live_server.http.post("/v1/completions", content=content.encode("latin-1"), headers=headers)
    assert response.status_code == 400
    error = check_error(response, 400, response.json()["error"]["code"])
    assert error["code"] in ("invalid_parameter", "invalid_request")
    assert error["param"] is None


def test_an_unknown_route_and_a_wrong_method_have_the_one_shape(live_server: LiveServer) -> None:
    check_error(live_server.http.get("/v1/nothing"), 404, "route_not_found")
    wrong = live_server.http.get("/v1/completions")
    check_error(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_models_are_listed_and_others_not_found(live_server: LiveServer) -> None:
    cards = live_server.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("tiny-lm", None),
        ("tiny-lm@law", "tiny-lm"),
        ("tiny-lm@news", "tiny-lm"),
    ]
    for card in cards:
        assert live_server.http.get(f"/v1/models/{card['id']}").json() == card
    check_error(live_server.http.get("/v1/models/gpt-5"), 404, "model_not_found")


def test_a_request_id_is_echoed_or_made(live_server: LiveServer) -> None:
    def echoed(given: str) -> str:
        return live_server.http.get("/version", headers={"x-request-id": given}).headers["x-request-id"]

    assert echoed("trace-42:a.b") == "trace-42:a.b"
    assert re.fullmatch(r"[0-9a-f]{32}", echoed("with spaces and 'quotes'"))
    answer = live_server.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"})
    assert answer.json()["id"] == "cmpl-mine"


@pytest.fixture(scope="module")
def narrow(published: Published) -> Iterator[LiveServer]:
    """A server that takes bodies of at most 200,000 bytes and asks for keys."""
    from knnlm_server.settings import ServerSettings

    settings = ServerSettings(
        model=str(published.model),
        datastores=published.root,
        load=("news",),
        max_sequences=2,
        max_body_bytes=200_000,
        api_key="user-key",  # type: ignore[arg-type]
        admin_key="admin-key",  # type: ignore[arg-type]
    )
    with LiveServer(settings) as server:
        yield server


USER = {"authorization": "Bearer user-key"}
ADMIN = {"authorization": "Bearer admin-key"}


@pytest.mark.parametrize("size", [200_001, 5_000_000])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_body_over_the_limit_is_refused(narrow: LiveServer, size: int, announced: bool) -> None:
    body = json.dumps({"prompt": "x" * size}).encode()
    pieces = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    headers = {**USER, "content-type": "application/json"}
    response = narrow.http.post("/v1/completions", content=body if announced else pieces, headers=headers)
    error = check_error(response, 413, "payload_too_large")
    assert "200000 bytes" in error["message"]


def test_a_body_up_to_the_limit_is_read(narrow: LiveServer) -> None:
    body = json.dumps({"prompt": "x", "padding": ""}).encode()
    body = json.dumps({"prompt": "x", "padding": "p" * (200_000 - len(body))}).encode()
    assert len(body) == 200_000
    headers = {**USER, "content-type": "application/json"}
    for content in (body, iter([body[:100_000], body[100_000:]])):
        assert narrow.http.post("/v1/completions", content=content, headers=headers).status_code == 200


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "user-key"},
        {"authorization": "Basic user-key"},
        {"x-api-key": "user-key"},
    ],
)
def test_every_v1_route_asks_for_the_key(narrow: LiveServer, headers: dict[str, str]) -> None:
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/score"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny-lm"),
        ("GET", "/v1/datastores"),
        ("GET", "/v1/datastores/news"),
        ("PUT", "/v1/datastores/news"),
        ("DELETE", "/v1/datastores/news"),
    ):
        response = narrow.http.request(method, path, json=None if method == "GET" else {}, headers=headers)
        if method in ("PUT", "DELETE") and "authorization" in headers:
            check_error(response, 403, "forbidden")
        else:
            check_error(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert "key" not in narrow.http.get("/health", headers=headers).text
    assert {narrow.http.get(path, headers=headers).status_code for path in ("/health", "/ready", "/version")} == {200}


def test_only_the_admin_key_changes_datastores(narrow: LiveServer) -> None:
    error = check_error(narrow.http.put("/v1/datastores/news", headers=USER), 403, "forbidden")
    assert "admin key" in error["message"]
    check_error(narrow.http.delete("/v1/datastores/news", headers=USER), 403, "forbidden")
    assert narrow.http.put("/v1/datastores/news", headers=ADMIN).status_code == 200
    for headers in (USER, ADMIN, {"authorization": "bearer user-key"}):
        assert narrow.http.get("/v1/models", headers=headers).status_code == 200


def test_without_an_admin_key_only_loopback_changes_datastores(published: Published, start_server: Start) -> None:
    # Only what the settings say: the test's own socket is bound to loopback all the same.
    public = start_server(datastores=published.root, load=("news",), host="0.0.0.0")
    error = check_error(public.http.put("/v1/datastores/news"), 403, "forbidden")
    assert "0.0.0.0" in error["message"]
    assert public.complete(PROMPT, model="tiny-lm@news", max_tokens=1)


def test_without_an_admin_key_pages_of_others_change_nothing(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, load=("news",))
    own = str(server.http.base_url).rstrip("/")
    others = ("https://example.org", "null", "http://localhost:3000", "http://[", f"http://evil.test:{own[-5:]}")
    for origin in others:
        for method, path in (("PUT", ""), ("DELETE", ""), ("POST", "/rollback")):
            answer = server.http.request(method, f"/v1/datastores/news{path}", headers={"origin": origin})
            assert origin in check_error(answer, 403, "forbidden")["message"]
    # A name of another site's that leads here.
    named = {"host": "example.org", "origin": "http://example.org"}
    check_error(server.http.put("/v1/datastores/news", headers=named), 403, "forbidden")
    assert server.http.put("/v1/datastores/news", headers={"origin": own}).status_code == 200


def test_without_an_admin_key_loopback_still_asks_for_the_api_key(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, load=("news",), api_key="user-key")
    check_error(server.http.put("/v1/datastores/news"), 401, "invalid_api_key")
    assert server.http.put("/v1/datastores/news", headers=USER).status_code == 200


# -- starting, full --------------------------------------------------------------------------------------------------


def test_until_ready_every_answer_is_503_with_a_reason(
    published: Published, start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm_server import app

    go, load = threading.Event(), app.load_lm

    def load_later(*args: Any) -> HuggingFaceLM:
        assert go.wait(30)
        return load(*args)

    monkeypatch.setattr(app, "load_lm", load_later)
    server = start_server(wait=False, datastores=published.root)
    try:
        for response in (
            server.http.get("/ready"),
            server.post("/v1/completions", {"prompt": PROMPT}),
            server.post("/v1/score", {"input": [PROMPT]}),
            server.http.get("/v1/models"),
            server.http.get("/v1/datastores"),
            server.http.put("/v1/datastores/law"),
        ):
            error = check_error(response, 503, "not_ready")
            assert "waiting for the model" in error["message"]
            assert int(response.headers["retry-after"]) >= 1
        assert server.http.get("/health").status_code == 200
    finally:
        go.set()
    server.wait_ready()
    assert server.http.get("/ready").json() == {
        "status": "ready", "model": "tiny-lm", "datastores": ["law", "news"], "running": 0, "waiting": 0, "scoring": 0,
    }  # fmt: skip


def damage_current(root: Path, name: str) -> None:
    """Make a version without an index the current one."""
    index = next(root.glob(f"{name}/*/shard-00000/index.faiss"))
    index.unlink()
    layout.write_current(root, name, layout.Current(index.parent.parent.name, None))


def test_a_damaged_datastore_that_nobody_asked_for_by_name_is_skipped(
    start_server: Start, own_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_current(own_root, "law")
    server = start_server(datastores=own_root)
    assert server.http.get("/ready").json()["datastores"] == ["news"]
    assert server.http.get("/v1/datastores").json()["published"] == ["law"]
    (record,) = [r for r in caplog.records if "datastore skipped" in r.message]
    assert "index.faiss" in record.message


@pytest.mark.parametrize("wrong", ["model", "datastore"])
def test_a_start_that_fails_says_why(
    published: Published, start_server: Start, own_root: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    damage_remove(own_root / "law" / published.law_new)
    given: dict[str, object] = {"datastores": own_root, "load": ("law",)}
    server = start_server(wait=False, **({"model": str(published.model / "missing")} if wrong == "model" else given))
    wait_until(lambda: bool(server.failures))
    assert server.failures == ["failed"]
    error = check_error(server.http.get("/ready"), 503, "not_ready")
    assert "failed to start" in error["message"]
    assert ("missing" if wrong == "model" else "shard-00000/keys.arrow") in error["message"]
    check_error(server.post("/v1/completions", {"prompt": PROMPT}), 503, "not_ready")
    assert server.http.get("/health").status_code == 503


def test_a_damaged_store_that_nobody_asked_for_does_not_stop_the_others(
    published: Published, start_server: Start, own_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_remove(own_root / "law" / published.law_new)
    with caplog.at_level(logging.ERROR):
        server = start_server(datastores=own_root)
    assert server.http.get("/ready").json()["datastores"] == ["news"]
    assert "name=law" in caplog.text
    assert "shard-00000/keys.arrow" in caplog.text
    assert server.complete(PROMPT, model="tiny-lm@news", max_tokens=1)
    check_error(server.post("/v1/completions", {"prompt": PROMPT, "model": LAW}), 404, "datastore_not_found")


def test_a_full_queue_is_503_and_passes(start_server: Start) -> None:
    server = start_server(max_sequences=1, max_queued=1)
    with Brake(server.lm) as brake, ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(server.complete, PROMPT, max_tokens=2) for _ in range(2)]
        brake.wait_held()
        wait_until(lambda: len(server.backend.engine._accepted) == 2)
        for path, body in (("/v1/completions", {"prompt": PROMPT}), ("/v1/score", {"input": [PROMPT]})):
            response = server.post(path, body)
            error = check_error(response, 503, "overloaded")
            assert "at most 2 requests" in error["message"]
            assert int(response.headers["retry-after"]) >= 1
        brake.release()
        assert all(future.result()["usage"]["completion_tokens"] == 2 for future in accepted)
    assert server.complete(PROMPT, max_tokens=1)
    # Several prompts are accepted together or not at all.
    check_error(server.post("/v1/completions", {"prompt": ["a", "b", "c"]}), 400, "invalid_parameter")
    wait_until(server.is_idle)


# -- datastores ------------------------------------------------------------------------------------------------------


def test_a_datastore_is_described(live_server: LiveServer, published: Published) -> None:
    listed = live_server.http.get("/v1/datastores").json()
    assert listed["object"] == "list"
    assert listed["published"] == []
    assert [entry["name"] for entry in listed["data"]] == ["law", "news"]
    law = live_server.http.get("/v1/datastores/law").json()
    assert law == listed["data"][0]
    calibration = law.pop("calibration")
    assert calibration.keys() == {
        "id", "k", "temperature", "lambda", "lambda_mode", "lambda_modes", "gate", "gate_threshold",
        "learned_threshold", "helps",
        "report", "held_out_documents",
    }  # fmt: skip
    assert law.keys() == {
        "object", "name", "version", "generation", "revision", "state", "entries", "bytes", "unit", "documents",
        "learned_documents", "deleted_documents", "leases", "aliases", "follows_current", "previous", "self_test",
        "key_drift", "model_fingerprint",
    }  # fmt: skip
    assert (law["version"], law["state"], law["leases"]) == (published.law_new, "ready", 0)
    check_error(live_server.http.get("/v1/datastores/nope"), 404, "datastore_not_found")


def damage_fingerprint(version: Path) -> None:
    manifest = json.loads((version / layout.MANIFEST).read_text())
    del manifest["sha256"]
    manifest["lm"]["model_fingerprint"] = "0" * 32
    (version / layout.MANIFEST).write_text(json.dumps(manifest))


def damage_truncate(version: Path) -> None:
    index = version / "shard-00001" / layout.INDEX
    with index.open("r+b") as file:
        file.truncate(index.stat().st_size // 2)


def damage_remove(version: Path) -> None:
    (version / "shard-00000" / layout.KEYS).unlink()


def damage_manifest(version: Path) -> None:
    (version / layout.MANIFEST).write_text("{}")


def test_a_store_that_does_not_fit_is_refused_and_the_old_one_serves_on(
    published: Published, start_server: Start, own_root: Path
) -> None:
    set_current(own_root, "law", published.law_old)
    server = start_server(datastores=own_root, load=("law",))
    body = {"model": LAW, "max_tokens": 6, "knn": {"k": 8, "lambda": 0.5, "temperature": 9.0}}
    before = server.complete(PROMPT, **body)
    new = own_root / "law" / published.law_new
    for damage, code, words in (
        (
            damage_fingerprint,
            "datastore_mismatch",
            ("model_fingerprint", "0" * 32, server.lm.identity.model_fingerprint),
        ),
        (damage_truncate, "datastore_corrupt", ("shard-00001/index.faiss",)),
        (damage_remove, "datastore_corrupt", ("shard-00000/keys.arrow",)),
        (damage_manifest, "datastore_corrupt", (layout.MANIFEST,)),
    ):
        damage(new)
        response = server.http.put("/v1/datastores/law", json={"version": published.law_new})
        error = check_error(response, 409, code)
        assert response.headers["x-should-retry"] == "false"
        assert all(word in error["message"] for word in words), error["message"]
        if code == "datastore_mismatch":
            assert error["param"] == "model_fingerprint"
        after = server.complete(PROMPT, **body)
        assert after["choices"] == before["choices"]
        assert after["system_fingerprint"] == before["system_fingerprint"]
    assert server.http.get("/v1/datastores/law").json()["generation"] == 1


def test_a_version_that_is_none_is_refused(live_server: LiveServer) -> None:
    def put(body: Any, name: str = "law") -> httpx.Response:
        return live_server.http.put(f"/v1/datastores/{name}", json=body)

    error = check_error(put({"version": "0" * 16}), 404, "datastore_not_found")
    assert "0" * 16 in error["message"]
    for version in ("../news", "latest", "0" * 15, "", "A" * 16):
        assert check_error(put({"version": version}), 400, "invalid_parameter")["param"] == "version"
    assert check_error(put({"version": 7}), 400, "invalid_parameter")["param"] == "version"
    assert check_error(put({"versoin": "current"}), 400, "invalid_parameter")["param"] == "versoin"
    check_error(put(None, "absent"), 404, "datastore_not_found")
    check_error(live_server.http.delete("/v1/datastores/absent"), 404, "datastore_not_found")


@pytest.mark.parametrize(
    "name", ["../x", "%2e%2e%2fx", "..", "%2e%2e", "law%2f..", "%00", "a%5cb", "LAW", ".hidden", "x.tmp"]
)
def test_a_name_like_a_path_never_touches_the_file_system(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the file system was touched: {args}")

    for method in ("open", "stat", "is_dir", "is_file", "exists", "iterdir", "resolve"):
        monkeypatch.setattr(Path, method, touched)
    for verb in ("GET", "PUT", "DELETE"):
        # Written to the socket as it stands: a client library would tidy the path up.
        request = httpx.Request(verb, f"{live_server.url}/v1/datastores/x", extensions={})
        request.url = httpx.URL(live_server.url).copy_with(raw_path=f"/v1/datastores/{name}".encode())
        response = live_server.http.send(request)
        assert response.status_code in (400, 404), response.text
        check_error(response, response.status_code, response.json()["error"]["code"])
    for body in ({"knn": {"datastore": name}}, {"model": f"tiny-lm@{name}"}):
        check_error(live_server.post("/v1/completions", {"prompt": PROMPT, **body}), 404, "datastore_not_found")


def test_a_server_without_a_root_loads_nothing(start_server: Start) -> None:
    server = start_server()
    listed = server.http.get("/v1/datastores").json()
    assert (listed["data"], listed["published"], listed["aliases"], listed["default"]) == ([], [], {}, None)
    error = check_error(server.http.put("/v1/datastores/law"), 404, "datastore_not_found")
    assert "--datastores" in error["message"]


# -- our own defects -------------------------------------------------------------------------------------------------


class Secret(RuntimeError):
    pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the forward pass", "after it"])
def test_a_failed_step_hides_its_inside_and_frees_everything(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch, stream: bool, when: str
) -> None:
    run_step = engine_module.run_step

    def failing(*args: Any) -> Any:
        if when == "after it":
            run_step(*args)
        raise Secret("/etc/shadow says so")

    body = {"prompt": [PROMPT, "A buyer"], "model": LAW, "n": 2, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "run_step", failing)
        response = live_server.post("/v1/completions", body)
    if stream:
        assert response.status_code == 200
        (event,) = parse_events(response.text)
        error = event["error"]
    else:
        error = check_error(response, 500, "engine_failure")
    assert error["code"] == "engine_failure"
    assert "shadow" not in response.text
    assert "Secret" not in response.text
    wait_until(live_server.is_idle, within_s=5)
    assert live_server.complete(PROMPT, max_tokens=2)


def test_a_failed_scoring_pass_frees_everything(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise Secret("/etc/shadow says so")

    with monkeypatch.context() as patch:
        patch.setattr(live_server.lm, "encode", failing)
        response = live_server.post("/v1/score", {"input": [PROMPT, "A buyer"], "model": LAW})
    check_error(response, 500, "engine_failure")
    assert "shadow" not in response.text
    wait_until(live_server.is_idle, within_s=5)
    assert live_server.score([PROMPT], model=LAW)["total"]["tokens"] > 0


def test_an_unforeseen_error_in_a_route_hides_its_inside(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> Any:
        raise Secret("/etc/shadow says so")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(live_server.backend.registry, "statuses", failing)
        response = live_server.http.get("/v1/models")
    error = check_error(response, 500, "internal_error")
    assert error["message"] == "internal error"
    assert "shadow" not in response.text
    assert "shadow" in caplog.text
    assert live_server.http.get("/v1/models").status_code == 200


def test_a_failure_in_the_middle_of_a_stream_is_an_event(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step, steps = engine_module.run_step, 0

    def failing_at_the_third(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Secret("/etc/shadow says so")
        return run_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "run_step", failing_at_the_third)
        *chunks, last = live_server.stream(PROMPT, model=LAW, logprobs=0, max_tokens=8, ignore_eos=True)
    assert sum(len(choice["logprobs"]["tokens"]) for chunk in chunks for choice in chunk["choices"]) == 2
    assert last == {
        "error": {
            "message": "a step of the engine failed",
            "type": "internal_server_error",
            "param": None,
            "code": "engine_failure",
        }
    }


def test_a_long_list_of_bad_elements_is_one_error_not_millions() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"prompt": [1.5] * 10_000})
    assert caught.value.error_count() <= 4  # one for each form that a prompt can have


def test_a_datastore_that_cannot_be_searched_fails_its_own_requests_alone(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*args: Any, **kwargs: Any) -> Any:
        raise DatastoreCorrupt("values.arrow holds token 999999")

    with ThreadPoolExecutor(4) as pool:
        plain = [
            pool.submit(live_server.post, "/v1/completions", {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True})
            for _ in range(3)
        ]
        monkeypatch.setattr(Snapshot, "search", damaged)
        # A context of its own: what was searched for before need not be searched again.
        prompt = f"{PROMPT} Nobody has asked this yet."
        mixed = live_server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "knn": KNN})
        assert check_error(mixed, 409, "datastore_corrupt")["message"] == "values.arrow holds token 999999"
        assert [answer.result().status_code for answer in plain] == [200, 200, 200]
