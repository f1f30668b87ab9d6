"""What one request can cost the others is bounded: keys, threads, sizes, and how much an error says."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from live_server import LiveServer, wait_until
from pydantic import BaseModel, ValidationError
from small_stores import Published, Start

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import InvalidParameter
from knnlm_core.mixture import find
from knnlm_core.retrieval import Retrieval, Source
from knnlm_core.types import EntryRange
from knnlm_server.api import neighbors, score_inputs, score_job
from knnlm_server.api.schemas.common import MAX_EXCLUDED_DOCUMENTS, KnnBody
from knnlm_server.api.schemas.score import DocumentInput, ScoreBody
from knnlm_server.api.score_inputs import read_texts
from knnlm_server.settings import read_settings

LAW = "tiny-lm@law"
KNN = {"k": 4, "temperature": 15.0, "lambda": 0.4}
SOON_S = 5.0


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(published: Published, start_server: Start) -> LiveServer:
    return start_server(
        datastores=published.root, load=("news",), api_key="one,two", admin_key="admin", max_requests_per_key=1
    )


def bearers(*keys: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {key}") for key in keys]


def test_two_authorization_headers_are_no_key(keyed: LiveServer) -> None:
    for keys in (("one", "wrong"), ("wrong", "one"), ("one", "two"), ("one", "one"), ("admin", "one")):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/score"), ("DELETE", "/v1/datastores/news")):
            refused = keyed.http.request(method, path, headers=bearers(*keys))
            assert error_of(refused, 401)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert keyed.http.get("/health", headers=bearers(*keys)).status_code == 200
    assert keyed.http.get("/v1/models", headers=bearers("one")).status_code == 200


def test_whoever_lacks_the_key_is_refused_before_the_body_is_sent(keyed: LiveServer, subtests: pytest.Subtests) -> None:
    for request_line, key, status in (
        ("POST /v1/completions", None, 401),
        ("POST /v1/chat/completions", "wrong", 401),
        ("POST /v1/score", None, 401),
        ("POST /v1/neighbors", None, 401),
        ("POST /tokenize", None, 401),
        ("POST /detokenize", None, 401),
        ("PUT /v1/datastores/news", None, 401),
        ("PUT /v1/datastores/news", "one", 403),
        ("POST /v1/nothing", None, 404),
        ("POST /v1/models", None, 405),
    ):
        head = f"{request_line} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        if key is not None:
            head += f"Authorization: Bearer {key}\r\n"
        with (
            subtests.test(request_line),
            socket.create_connection(("127.0.0.1", keyed.port), timeout=SOON_S) as connection,
        ):
            connection.sendall(f"{head}\r\n{{".encode())
            answer = connection.recv(1 << 16).decode()
            assert answer.startswith(f"HTTP/1.1 {status} "), answer
            assert ("www-authenticate: Bearer" in answer) is (status == 401)


def test_the_body_is_looked_at_once_the_key_is_right(keyed: LiveServer) -> None:
    headers = {"content-type": "application/json"}
    for key, status in (("one", 400), ("wrong", 401)):
        refused = keyed.http.post("/v1/score", content="{", headers=[*headers.items(), *bearers(key)])
        error_of(refused, status)


def test_a_limit_per_key_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KNNLM_")]:
        monkeypatch.delenv(name)
    with pytest.raises(InvalidParameter, match=r"`max_requests_per_key`: needs at least one API key.*got 2") as caught:
        read_settings(model="m", max_requests_per_key=2)
    assert caught.value.param == "max_requests_per_key"
    assert read_settings(model="m", max_requests_per_key=2, api_key=("k",)).max_requests_per_key == 2
    with pytest.raises(InvalidParameter, match="`api_key`"):
        read_settings(model="m", max_requests_per_key=2, api_key="")


# -- threads -----------------------------------------------------------------------------------------------------------


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[threading.Event]:
    """Calls of a function wait until the event is set."""
    function, go = getattr(module, name), threading.Event()

    def wait_and_call(*args: Any, **given: Any) -> Any:
        assert go.wait(30), "never released"
        return function(*args, **given)

    monkeypatch.setattr(module, name, wait_and_call)
    try:
        yield go
    finally:
        go.set()


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many threads asyncio's own executor gets in a server started from here on."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return 5


def test_searches_for_overlaps_leave_completions_their_threads(
    published: Published, start_server: Start, monkeypatch: pytest.MonkeyPatch, few_threads: int
) -> None:
    server = start_server(datastores=published.root)
    body = {"model": LAW, "input": ["The court may refuse"], "overlap": True}
    with held(monkeypatch, score_job, "longest_matches"):
        searching = [server.begin("/v1/score", body) for _ in range(few_threads + 1)]
        wait_until(lambda: server.leases() == len(searching) and not any(server.backend.engine.load()))
        server.http.timeout = SOON_S
        assert server.complete("The tenant", max_tokens=2)["choices"]
        assert server.post("/tokenize", {"prompt": "The tenant"}).status_code == 200
        assert server.score(["The tenant may"])["results"]
    for connection in searching:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    wait_until(server.is_idle)


def test_a_shutdown_waits_for_no_busy_thread(
    published: Published, start_server: Start, monkeypatch: pytest.MonkeyPatch, few_threads: int
) -> None:
    server = start_server(datastores=published.root)
    engine = server.backend.engine
    with held(monkeypatch, neighbors, "_render"):
        body = {"model": LAW, "input": "The court", "knn": KNN}
        rendering = [server.begin("/v1/neighbors", body) for _ in range(few_threads + 1)]
        wait_until(lambda: server.leases() == len(rendering) and not any(engine.load()))
        for connection in rendering:
            connection.close()
        server._server.should_exit = True
        wait_until(lambda: not engine.is_alive, within_s=SOON_S)


# -- excluded documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/score", "/v1/neighbors"])
def test_so_many_documents_may_be_excluded_and_no_more(live_server: LiveServer, path: str) -> None:
    body = {"model": LAW, "input": ["The court may"]}
    most = ["new-1"] * MAX_EXCLUDED_DOCUMENTS
    answers = [live_server.post(path, {**body, "exclude_documents": given}) for given in (most, ["new-1"])]
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json() == answers[1].json()
    error = error_of(live_server.post(path, {**body, "exclude_documents": [*most, "new-2"]}))
    assert (error["code"], error["param"]) == ("invalid_parameter", "exclude_documents")
    assert f"at most {MAX_EXCLUDED_DOCUMENTS} documents, got {MAX_EXCLUDED_DOCUMENTS + 1}" in error["message"]


class HashCounted(tuple[EntryRange, ...]):
    """Counts how often exclusions are hashed."""

    hashed = 0

    def __hash__(self) -> int:
        HashCounted.hashed += 1
        return super().__hash__()


def test_an_exclusion_is_hashed_per_request_and_not_per_row(law: Datastore) -> None:
    ranges = [law.document_entries(document_id) for document_id in law.document_ids()]
    plain = Source(law, 4, 15.0, 0.4)
    kinds = [
        None,
        Retrieval((plain,)),
        Retrieval((replace(plain, exclude=HashCounted(ranges[:2])),)),
        Retrieval((replace(plain, exclude=HashCounted(ranges[:2]), k=2),)),  # equal, of another request
        Retrieval((replace(plain, exclude=HashCounted(ranges[3:4])),)),
    ]
    retrievals = [kinds[row % len(kinds)] for row in range(60)]
    keys = torch.randn(60, law.dim, generator=torch.Generator().manual_seed(1))
    HashCounted.hashed = 0
    together = find(keys, retrievals)
    assert 3 <= HashCounted.hashed <= 12
    for row, retrieval in enumerate(retrievals):
        alone = find(keys[row : row + 1], [retrieval])
        assert bool(together.searched[row]) is (retrieval is not None) is bool(alone.searched[0])
        width = alone.neighbors.entry_ids.shape[1]
        assert together.neighbors.entry_ids[row, :width].tolist() == alone.neighbors.entry_ids[0].tolist()
        assert not together.neighbors.entry_ids[row, width:].ge(0).any()


# -- unknown fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "known"), [(KnnBody, {"lambda": 0.5, "k": 3}), (DocumentInput, {"document_id": "new-1"})]
)
def test_thousands_of_unknown_fields_are_one_error(body: type[BaseModel], known: dict[str, Any]) -> None:
    assert body.model_validate(known).model_dump(by_alias=True, exclude_unset=True) == known
    with pytest.raises(ValidationError) as caught:
        body.model_validate(known | {f"x{i}": i for i in range(5000)})
    (error,) = caught.value.errors()
    assert (error["type"], error["loc"], error["input"]) == ("extra_forbidden", ("x0",), 0)


def test_the_first_unknown_field_is_named(live_server: LiveServer) -> None:
    error = error_of(live_server.post("/v1/score", {"input": "x", "knn": {"k": 3, "depth": 1, "width": 2}}))
    assert (error["code"], error["param"]) == ("invalid_parameter", "knn.depth")
    assert "got '1'" in error["message"]


# -- documents and tokens ----------------------------------------------------------------------------------------------


def test_a_document_given_often_is_read_once(
    live_server: LiveServer, law: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, encoded = live_server.backend, []
    encode = backend.tokenizer.encode_with_spans
    monkeypatch.setattr(backend.tokenizer, "encode_with_spans", lambda text: (encoded.append(text), encode(text))[1])
    ids = ["new-1", "new-4", "new-1"] * 20
    body = ScoreBody.model_validate({"input": [{"document_id": name} for name in ids], "per_token": True})
    texts = read_texts(backend, body, law, lambda: None)
    assert [text.document_id for text in texts] == ids
    assert [text.own for text in texts] == [law.document_entries(name) for name in ids]
    assert encoded == [law.document(name).text for name in ("new-1", "new-4")]
    assert len({id(text.token_ids) for text in texts}) == len({id(text.starts) for text in texts}) == 2


def test_the_tokens_of_a_score_are_bounded_while_they_are_read(
    live_server: LiveServer, law: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [len(live_server.lm.tokenizer.encode(law.document(name).text)) for name in ("new-1", "new-2")]
    monkeypatch.setattr(score_inputs, "MAX_SCORE_TOKENS", sum(sizes))
    tokenizer, encoded = live_server.backend.tokenizer, []
    encode = tokenizer.encode_with_spans
    monkeypatch.setattr(tokenizer, "encode_with_spans", lambda text: (encoded.append(text), encode(text))[1])
    given = [{"document_id": f"new-{i}"} for i in (1, 2, 3, 4, 5)]
    assert live_server.post("/v1/score", {"model": LAW, "input": given[:2]}).status_code == 200
    encoded.clear()
    error = error_of(live_server.post("/v1/score", {"model": LAW, "input": given}))
    assert (error["code"], error["param"]) == ("invalid_parameter", "input")
    assert f"at most {sum(sizes)} tokens in all" in error["message"]
    assert "in the first 3 of 5 texts" in error["message"]
    assert len(encoded) == 3
    error_of(live_server.post("/v1/score", {"input": [[5] * sum(sizes), [5]]}))
    error_of(live_server.post("/v1/score", {"model": LAW, "input": [given[0]] * 4096}))


# -- null --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/score", {"input": ["The court may"]}, ("exclude_documents", "per_token", "overlap", "stream")),
        ("/v1/neighbors", {"input": ["The court may"]}, ("exclude_documents",)),
        ("/tokenize", {"prompt": "The court may"}, ("return_token_strs",)),
    ],
)
def test_null_is_the_default(live_server: LiveServer, path: str, body: dict[str, Any], fields: tuple[str, ...]) -> None:
    plain = live_server.post(path, {**body, "model": LAW})
    nulls = live_server.post(path, {**body, "model": LAW, **dict.fromkeys(fields), "knn": {"trace": None}})
    assert plain.status_code == nulls.status_code == 200, nulls.text
    assert nulls.json() == plain.json()
    document = live_server.http.get("/openapi.json").json()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schemas = document["components"]["schemas"]
    shown = schemas[reference.rsplit("/", 1)[1]]["properties"]
    for schema in [*(shown[field] for field in fields), schemas["KnnBody"]["properties"]["trace"]]:
        assert {"type": "null"} in schema["anyOf"]
    if "exclude_documents" in fields:
        (items,) = (member for member in shown["exclude_documents"]["anyOf"] if member["type"] == "array")
        assert items["maxItems"] == MAX_EXCLUDED_DOCUMENTS


@pytest.mark.parametrize("wrong", [0, 1, "true", []])
def test_a_flag_takes_true_false_and_null_alone(live_server: LiveServer, wrong: object) -> None:
    error = error_of(live_server.post("/v1/score", {"input": "x", "per_token": wrong}))
    assert (error["code"], error["param"]) == ("invalid_parameter", "per_token")


# -- a dead engine -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is what kills the engine
def test_a_server_whose_engine_has_died_is_neither_ready_nor_healthy(start_server: Start) -> None:
    server = start_server()
    assert server.http.get("/ready").status_code == 200

    def die() -> None:
        raise SystemExit

    server.backend.engine._commands.put(die)
    wait_until(lambda: not server.backend.engine.is_alive)
    for path in ("/ready", "/health"):
        refused = server.http.get(path)
        error = error_of(refused, 503)
        assert (error["code"], error["message"]) == ("not_ready", "the engine's thread has died")
        assert refused.headers["retry-after"]
