"""What becomes of error answers, whoever writes them."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator

import httpx
import pytest
from contract_bodies import CHUNKS, COMPLETION, sse
from contract_double import ContractDouble, StreamScript
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse

import knnlm_client
from knnlm_client import (
    APIError,
    AsyncClient,
    Client,
    ConnectionFailed,
    DatastoreBusy,
    DatastoreError,
    ErrorInfo,
    InvalidRequest,
    KnnlmClientError,
    ModelNotFound,
    NotFound,
    Overloaded,
    TimedOut,
    Unauthorized,
    UnexpectedResponse,
)
from knnlm_client._connection import Connection
from knnlm_client._prepared import PreparedRequest
from knnlm_client.errors import CLASS_BY_CODE, CLASS_BY_STATUS, error_class
from knnlm_core.errors import BuildError, CorpusError, DuplicateDocument, KnnlmError

# What only a build can meet; a document added at runtime may still be a duplicate.
BUILD_ONLY = (BuildError, CorpusError)


def family(base: type[BaseException]) -> Iterator[type[BaseException]]:
    yield base
    for child in base.__subclasses__():
        yield from family(child)


def codes_a_server_can_send() -> set[str]:
    return {
        cls.code
        for cls in family(KnnlmError)
        if issubclass(cls, KnnlmError) and (cls is DuplicateDocument or not issubclass(cls, BUILD_ONLY))
    }


def test_every_code_that_a_server_can_send_has_a_class_of_the_clients() -> None:
    assert set(CLASS_BY_CODE) == codes_a_server_can_send()
    assert len(set(CLASS_BY_CODE.values())) == len(CLASS_BY_CODE)


def test_the_clients_tree_keeps_the_servers_kinship() -> None:
    servers = {cls.code: cls for cls in family(KnnlmError) if issubclass(cls, KnnlmError)}
    for code, ours in CLASS_BY_CODE.items():
        for parent_code, parent in CLASS_BY_CODE.items():
            if parent_code != KnnlmError.code and issubclass(servers[code], servers[parent_code]):
                assert issubclass(ours, parent), f"{code} is a {parent_code} there but not here"


def test_every_error_is_exported_and_stands_in_the_drawn_tree() -> None:
    tree = (knnlm_client.errors.__doc__ or "").split()
    for cls in family(KnnlmClientError):
        assert cls.__name__ in knnlm_client.__all__
        assert cls.__name__ in tree


@pytest.mark.parametrize("code", sorted(CLASS_BY_CODE))
def test_an_error_answer_raises_the_class_of_its_code(code: str, double: ContractDouble, client: Client) -> None:
    double.error(418, code, "explained", x_request_id="req-9")
    with pytest.raises(APIError) as caught:
        client.completions("x", model="smollm2")
    error = caught.value
    assert type(error) is CLASS_BY_CODE[code]
    assert (error.message, error.status, error.code) == ("explained", 418, code)
    assert (error.type, error.param, error.request_id) == ("invalid_request_error", "model", "req-9")
    assert error.retry_after_s is None
    assert str(error) == f"explained (status=418, code={code}, param=model, request_id=req-9)"


@pytest.mark.parametrize(
    ("status", "expected"),
    [*CLASS_BY_STATUS.items(), (400, InvalidRequest), (422, InvalidRequest), (502, knnlm_client.ServiceError)],
)
def test_an_unknown_code_falls_back_to_the_status(
    status: int, expected: type[APIError], double: ContractDouble, client: Client
) -> None:
    double.error(status, "of_a_newer_server")
    with pytest.raises(APIError) as caught:
        client.models()
    assert type(caught.value) is expected
    assert caught.value.code == "of_a_newer_server"


def test_a_status_without_a_meaning_of_its_own_is_a_plain_api_error(double: ContractDouble, client: Client) -> None:
    double.next_answer = RedirectResponse("/elsewhere", 307)
    with pytest.raises(APIError, match="GET /v1/models: HTTP 307") as caught:
        client.models()
    assert type(caught.value) is APIError
    assert error_class(None, 302) is APIError


def test_the_error_families_can_be_caught_by_either_parent() -> None:
    assert issubclass(ModelNotFound, NotFound)
    assert issubclass(DatastoreBusy, DatastoreError)
    assert issubclass(DatastoreBusy, knnlm_client.Conflict)


def test_a_proxys_page_gives_an_error_that_quotes_its_beginning_only(double: ContractDouble, client: Client) -> None:
    double.next_answer = HTMLResponse("<html><h1>Bad\n   gateway</h1>" + "x" * 5000, 502)
    with pytest.raises(knnlm_client.ServiceError) as caught:
        client.score(["x"], model="smollm2")
    assert caught.value.message.startswith("POST /v1/score: HTTP 502 Bad Gateway: <html><h1>Bad gateway</h1>xxx")
    assert len(caught.value.message) < 300
    assert caught.value.code is None


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"null", b'{"detail": "no"}', b'{"error":']
)
def test_any_body_of_a_failed_request_gives_an_api_error(body: bytes, double: ContractDouble, client: Client) -> None:
    double.next_answer = PlainTextResponse(body, 401)
    with pytest.raises(Unauthorized, match="GET /v1/models: HTTP 401 Unauthorized"):
        client.models()


def test_an_error_that_is_a_string_is_the_message(double: ContractDouble, client: Client) -> None:
    double.next_answer = JSONResponse({"error": "Who are you?"}, 401)
    with pytest.raises(Unauthorized) as caught:
        client.models()
    assert caught.value.message == "Who are you?"


def test_a_code_that_is_a_number_is_kept_as_text(double: ContractDouble, client: Client) -> None:
    double.next_answer = JSONResponse({"error": {"message": "no", "code": 404}}, 404)
    with pytest.raises(NotFound) as caught:
        client.models()
    assert caught.value.code == "404"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        (
            {"retry-after": "Sat, 21 Nov 2026 10:00:30 GMT", "date": "Sat, 21 Nov 2026 10:00:00 GMT"},
            30.0,
        ),
        ({"retry-after": "Sat, 21 Nov 2026 09:00:00 GMT", "date": "Sat, 21 Nov 2026 10:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_as_seconds(
    headers: dict[str, str], expected: float | None, double: ContractDouble, client: Client
) -> None:
    # A transport of its own, since uvicorn puts the real date beside the one given here.
    body = {"error": {"message": "full", "code": "overloaded"}}
    transport = httpx.MockTransport(lambda request: httpx.Response(503, headers=headers, json=body))
    with Client(transport=transport) as mocked, pytest.raises(Overloaded) as caught:
        mocked.models()
    assert caught.value.retry_after_s == expected


def test_retry_after_arrives_over_the_socket(double: ContractDouble, client: Client) -> None:
    double.error(503, "overloaded", retry_after="7")
    with pytest.raises(Overloaded) as caught:
        client.models()
    assert caught.value.retry_after_s == 7.0
    assert len(double.seen) == 1, "nothing is retried"


@pytest.mark.parametrize(
    "body",
    ["<html>Welcome!</html>", "{}", '{"id": "x"}', '{"data": 3}', "[]", "", '{"data": [{"object": "model"}]}'],
)
def test_a_success_with_a_strange_body_is_an_unexpected_response(
    body: str, double: ContractDouble, client: Client
) -> None:
    double.next_answer = PlainTextResponse(body, 200)
    with pytest.raises(UnexpectedResponse, match="GET /v1/models: this is no ModelListBody") as caught:
        client.models()
    assert caught.value.status == 200


def test_an_unexpected_response_names_the_missing_field(double: ContractDouble, client: Client) -> None:
    double.next_answer = JSONResponse({name: value for name, value in COMPLETION.items() if name != "usage"})
    with pytest.raises(UnexpectedResponse, match=r"no Completion \(usage: Field required\)"):
        client.completions("x", model="smollm2")


def test_an_error_inside_a_stream_raises_after_the_chunks_before_it(double: ContractDouble, client: Client) -> None:
    error = {"error": {"message": "step failed", "type": "server_error", "param": None, "code": "engine_failure"}}
    double.stream = StreamScript([b"".join(sse(CHUNKS[0], error, CHUNKS[1]))])  # all in one piece
    texts: list[str] = []

    def read_all() -> None:
        with client.stream_completions("x", model="smollm2") as stream:
            texts.extend(chunk.choices[0].text for chunk in stream)

    with pytest.raises(knnlm_client.EngineFailure, match="step failed") as caught:
        read_all()
    assert caught.value.status == 200
    assert texts == [" Käufer"]


def test_an_error_instead_of_a_stream_is_the_same_error(double: ContractDouble, client: Client) -> None:
    double.error(404, "model_not_found")
    with client.stream_completions("x", model="none") as stream, pytest.raises(ModelNotFound):
        next(stream)


def test_a_plain_answer_instead_of_a_stream_is_unexpected(double: ContractDouble, client: Client) -> None:
    double.next_answer = JSONResponse(COMPLETION)
    with client.stream_completions("x", model="m") as stream, pytest.raises(UnexpectedResponse, match="event-stream"):
        next(stream)


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: {}\n\n", b"data: \n\n", b'data: {"error": null}\n\n'])
def test_an_event_that_is_no_chunk_is_unexpected(event: bytes, double: ContractDouble, client: Client) -> None:
    double.stream = StreamScript([event])
    with (
        client.stream_completions("x", model="m") as stream,
        pytest.raises(UnexpectedResponse, match="CompletionChunk"),
    ):
        next(stream)


def test_a_stream_without_its_end_mark_is_interrupted(double: ContractDouble, client: Client) -> None:
    double.stream = StreamScript(sse(CHUNKS[0]))
    with client.stream_completions("x", model="m") as stream:
        assert next(stream).choices[0].text == " Käufer"
        with pytest.raises(knnlm_client.StreamInterrupted, match="incomplete"):
            next(stream)


def test_a_connection_that_breaks_inside_a_stream_has_failed(double: ContractDouble, client: Client) -> None:
    double.stream = StreamScript(sse(CHUNKS[0]), breaks_off=True)
    with client.stream_completions("x", model="m") as stream:
        next(stream)
        with pytest.raises(ConnectionFailed, match=r"POST /v1/completions at 127\.0\.0\.1"):
            next(stream)


def test_nobody_listening_is_a_failed_connection() -> None:
    url = "http://127.0.0.1:9"  # the discard service, which nothing offers any more

    async def ask() -> None:
        async with AsyncClient(url) as client:
            await client.models()

    with pytest.raises(ConnectionFailed, match=r"GET /v1/models at 127\.0\.0\.1:9"), Client(url) as client:
        client.models()
    with pytest.raises(ConnectionFailed, match=r"GET /v1/models at 127\.0\.0\.1:9"):
        asyncio.run(ask())


def test_silence_is_a_timeout(double: ContractDouble) -> None:
    double.hang = threading.Event()

    async def ask() -> None:
        async with AsyncClient(double.url, timeout=0.1) as client:
            await client.completions("x", model="m")

    with (
        pytest.raises(TimedOut, match=r"no answer in time \(`timeout` is 0.1 s\)"),
        Client(double.url, timeout=0.1) as c,
    ):
        c.completions("x", model="m")
    with pytest.raises(TimedOut):
        asyncio.run(ask())


def test_silence_inside_a_stream_is_a_timeout(double: ContractDouble) -> None:
    double.stream = StreamScript(sse(*CHUNKS), allowed=threading.Semaphore(1))
    with Client(double.url, timeout=0.2) as client, client.stream_completions("x", model="m") as stream:
        next(stream)
        with pytest.raises(TimedOut):
            next(stream)
    assert double.stream.closed.wait(10)


def httpx_errors() -> list[type[httpx.RequestError]]:
    return [cls for cls in family(httpx.RequestError) if issubclass(cls, httpx.RequestError)]


@pytest.mark.parametrize("error", httpx_errors())
def test_every_error_of_sending_is_mapped_to_one_of_ours(error: type[httpx.RequestError]) -> None:
    connection = Connection("http://localhost", api_key=None, admin_key=None, timeout=1)
    expected = TimedOut if issubclass(error, httpx.TimeoutException) else ConnectionFailed
    with pytest.raises(KnnlmClientError) as caught, connection.mapped_errors(PreparedRequest("GET", "/health")):
        raise error("")
    assert type(caught.value) is expected
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("cls", [cls for cls in family(APIError) if issubclass(cls, APIError)])
def test_an_api_error_survives_pickling(cls: type[APIError]) -> None:
    error = cls(ErrorInfo("no", 503, code="overloaded", retry_after_s=2.0))
    twin = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(twin) is cls
    assert vars(twin) == vars(error)
