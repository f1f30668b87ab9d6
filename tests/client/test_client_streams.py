"""Streams: chunk by chunk, closed when left early, whole or an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest
from contract_bodies import CHUNKS, DONE, SCORE_EVENTS, ndjson, sse
from contract_double import ContractDouble, StreamScript, run_async
from every_operation import STREAMS
from fastapi.responses import Response

from knnlm_client import (
    AsyncClient,
    Client,
    CompletionChunk,
    ConnectionFailed,
    Datastore,
    DatastoreProgress,
    EngineFailure,
    KnnlmClientError,
    ModelNotFound,
    ScoreProgress,
    ScoreResult,
    ScoreResultEvent,
    ScoreTotal,
    ScoreTotalEvent,
    StreamInterrupted,
    UnexpectedResponse,
)
from knnlm_client.responses import ScoreLine


@pytest.mark.parametrize("name", STREAMS)
def test_sync_and_async_stream_the_same(name: str, double: ContractDouble, client: Client) -> None:
    open_stream, path, body, event_type, bodies = STREAMS[name]

    async def read(client: AsyncClient) -> list[object]:
        async with open_stream(client) as stream:
            return [event async for event in stream]

    with open_stream(client) as stream:
        events = list(stream)
    expected = [event_type.model_validate(event) for event in bodies]
    assert events == run_async(double, read) == [getattr(event, "root", event) for event in expected]
    assert double.seen[0] == double.seen[1]
    assert (double.seen[0].path, double.seen[0].body) == (path, body)


def test_the_pieces_of_a_stream_are_its_text(client: Client) -> None:
    with client.stream_completions("Der", model="m") as chunks:
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " Käufer muß"
    with client.stream_chat([{"role": "user", "content": "Wer?"}], model="m") as chunks:
        pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert pieces == ["", "Der Käufer", " muß", None]


BROKEN = {"error": {"message": "step failed", "type": "server_error", "param": None, "code": "engine_failure"}}


# Of each stream: how bodies become pieces, and how an answer of this kind ends.
WIRES = {
    "stream_completions": (sse, DONE),
    "stream_chat": (sse, DONE),
    "stream_score": (ndjson, b""),
    "datastores.stream_load": (sse, DONE),
    "datastores.export": (ndjson, b""),
}
# An export ends where its answer does.
WITH_AN_END = [name for name in STREAMS if name != "datastores.export"]


def broken_streams() -> Iterator[tuple[str, StreamScript | None, type[KnnlmClientError]]]:
    for name, (wire, _) in WIRES.items():
        first, second, *_ = STREAMS[name][4]
        cut = wire(first) if name in WITH_AN_END else [*wire(first), wire(second)[0].rstrip(b"\n")]
        yield name, StreamScript(cut), StreamInterrupted
        yield name, StreamScript(wire(first), breaks_off=True), ConnectionFailed
        yield name, StreamScript([b"".join(wire(first, BROKEN, second))]), EngineFailure
        yield name, StreamScript(wire(first, {})), UnexpectedResponse
        yield name, StreamScript(wire(first, {"object": "score.other"})), UnexpectedResponse
        yield name, None, ModelNotFound


@pytest.mark.parametrize(("name", "script", "expected"), list(broken_streams()))
def test_sync_and_async_streams_fail_alike(
    name: str, script: StreamScript | None, expected: type[KnnlmClientError], double: ContractDouble, client: Client
) -> None:
    open_stream = STREAMS[name][0]
    received: dict[str, list[object]] = {"sync": [], "async": []}

    def read_all() -> None:
        with open_stream(client) as stream:
            for event in stream:
                received["sync"].append(event)

    async def read_all_async(client: AsyncClient) -> None:
        async with open_stream(client) as stream:
            async for event in stream:
                received["async"].append(event)

    errors = []
    for read in (read_all, lambda: run_async(double, read_all_async)):
        if script is None:
            double.error(404, "model_not_found", "no such model")
        else:
            double.stream = script
        with pytest.raises(KnnlmClientError) as caught:
            read()
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][0] is expected
    assert received["sync"] == received["async"]
    assert len(received["sync"]) == (0 if script is None else 1)


def allow_one_at_a_time(double: ContractDouble) -> threading.Semaphore:
    allowed = threading.Semaphore(0)
    double.stream = StreamScript([*sse(*CHUNKS), DONE], allowed=allowed)
    return allowed


def test_chunks_arrive_one_by_one(double: ContractDouble, client: Client) -> None:
    allowed = allow_one_at_a_time(double)
    with client.stream_completions("x", model="m") as stream:
        assert double.seen == [], "the request goes out with the first chunk asked for"
        for expected in CHUNKS:
            allowed.release()  # the server sends this one only, so a client that waits for more would time out
            assert next(stream) == CompletionChunk.model_validate(expected)
        allowed.release()
        assert list(stream) == []


def test_chunks_arrive_one_by_one_in_an_event_loop(double: ContractDouble) -> None:
    allowed = allow_one_at_a_time(double)

    async def read(client: AsyncClient) -> None:
        async with client.stream_completions("x", model="m") as stream:
            for expected in CHUNKS:
                allowed.release()
                assert await anext(stream) == CompletionChunk.model_validate(expected)
            allowed.release()
            assert [chunk async for chunk in stream] == []

    run_async(double, read, timeout=20)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_same_however_its_bytes_arrive(
    name: str, end: bytes, double: ContractDouble, client: Client
) -> None:
    open_stream, _, _, event_type, bodies = STREAMS[name]
    wire, done = WIRES[name]
    noise = b": keep-alive\n\n" if wire is sse else b"\n"
    body = (noise + b"".join(wire(*bodies)) + done).replace(b"\n", end)
    double.stream = StreamScript([body[place : place + 1] for place in range(len(body))])
    with open_stream(client) as stream:
        expected = [event_type.model_validate(event) for event in bodies]
        assert list(stream) == [getattr(event, "root", event) for event in expected]


@pytest.mark.parametrize("name", WITH_AN_END)
def test_nothing_after_the_end_is_yielded(name: str, double: ContractDouble, client: Client) -> None:
    open_stream, _, _, _, bodies = STREAMS[name]
    wire, done = WIRES[name]
    double.stream = StreamScript([*wire(*bodies), done, *wire(bodies[0], BROKEN)])
    with open_stream(client) as stream:
        assert len(list(stream)) == len(bodies)


@pytest.mark.parametrize("name", ["stream_completions", "stream_score", "datastores.export"])
def test_a_stream_of_another_kind_is_unexpected(name: str, double: ContractDouble, client: Client) -> None:
    other = "text/event-stream" if WIRES[name][0] is ndjson else "application/x-ndjson"
    double.next_answer = Response(b"", media_type=other)
    with STREAMS[name][0](client) as stream, pytest.raises(UnexpectedResponse, match=f"got {other}"):
        next(stream)


# -- a streamed score ------------------------------------------------------------------------------------------------


def test_the_events_of_a_score_are_told_apart_by_their_type(client: Client) -> None:
    with client.stream_score(["one", "two"], model="m") as stream:
        events = list(stream)
    kinds = [ScoreProgress, ScoreResultEvent, ScoreProgress, ScoreResultEvent, ScoreTotalEvent]
    assert [type(event) for event in events] == kinds
    results = [event for event in events if isinstance(event, ScoreResult)]
    assert [result.index for result in results] == [1, 0]
    assert not any(isinstance(event, ScoreTotal) for event in events), "a text's score is no total"
    last = events[-1]
    assert isinstance(last, ScoreTotalEvent)
    assert (last.total.tokens, last.system_fingerprint) == (5, "lm-4f1c law:v3:2.0")


def test_a_streamed_result_has_what_a_whole_answers_has(client: Client) -> None:
    with client.stream_score(["one"], model="m") as stream:
        streamed = [event for event in stream if isinstance(event, ScoreResult)][-1]
    [whole] = client.score(["one"], model="m").results
    assert streamed.model_dump(exclude={"object"}) == whole.model_dump()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_total_that_is_cut_off_is_no_total(cut: int, double: ContractDouble, client: Client) -> None:
    double.stream = StreamScript([b"".join(ndjson(*SCORE_EVENTS))[:-cut]])
    received = []
    with (
        client.stream_score(["one"], model="m") as stream,
        pytest.raises(StreamInterrupted, match=r"the stream of /v1/score ended without score\.total"),
    ):
        received.extend(stream)
    assert len(received) == len(SCORE_EVENTS) - 1


def test_progress_arrives_line_by_line(double: ContractDouble, client: Client) -> None:
    allowed = threading.Semaphore(0)
    double.stream = StreamScript(ndjson(*SCORE_EVENTS), allowed=allowed)
    with client.stream_score(["one", "two"], model="m") as stream:
        for expected in SCORE_EVENTS:
            allowed.release()  # the server sends this one only, so a client that waits for more would time out
            assert next(stream) == ScoreLine.model_validate(expected).root
        assert list(stream) == []


# -- a streamed load -------------------------------------------------------------------------------------------------


def test_a_streamed_load_tells_its_progress_and_ends_with_the_datastore(double: ContractDouble) -> None:
    with (
        Client(double.url, api_key="user-key", admin_key="admin-key") as client,
        client.datastores.stream_load("law") as stream,
    ):
        *progress, datastore = stream
    assert [type(event) for event in progress] == [DatastoreProgress] * 3
    assert isinstance(datastore, Datastore)
    assert (datastore.version, datastore.aliases) == ("v3", ["statutes"])
    (seen,) = double.seen
    assert (seen.method, seen.authorization, seen.body) == (
        "PUT",
        "Bearer admin-key",
        {"version": "current", "stream": True},
    )


# -- leaving ---------------------------------------------------------------------------------------------------------


def test_leaving_a_stream_early_closes_the_connection(double: ContractDouble, client: Client) -> None:
    double.stream = StreamScript(sse(CHUNKS[0]), endless=True)
    with client.stream_completions("x", model="m") as stream:
        for _ in stream:
            assert not double.stream.closed.is_set()
            break
    assert double.stream.closed.wait(10)
    assert list(stream) == []


def test_leaving_a_stream_early_closes_the_connection_in_an_event_loop(double: ContractDouble) -> None:
    double.stream = StreamScript(sse(CHUNKS[0]), endless=True)

    async def read(client: AsyncClient) -> None:
        async with client.stream_completions("x", model="m") as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(double.stream.closed.wait, 10)

    run_async(double, read)


def test_cancelling_a_task_closes_its_connection(double: ContractDouble) -> None:
    double.stream = StreamScript(sse(CHUNKS[0]), allowed=threading.Semaphore(1))

    async def read(client: AsyncClient) -> None:
        arrived = asyncio.Event()

        async def wait_for_more() -> None:
            async with client.stream_completions("x", model="m") as stream:
                await anext(stream)
                double.stream.endless = True
                arrived.set()
                await anext(stream)

        task = asyncio.create_task(wait_for_more())
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(double.stream.closed.wait, 10)

    double.stream.endless = True
    run_async(double, read)


def test_a_finished_stream_gives_its_connection_back() -> None:
    opened: list[httpx.Request] = []

    class Body(httpx.SyncByteStream):
        closed = read_to_end = False

        def __iter__(self) -> Iterator[bytes]:
            yield from [*sse(CHUNKS[0]), DONE]
            self.read_to_end = True

        def close(self) -> None:
            self.closed = True

    body = Body()

    def answer(request: httpx.Request) -> httpx.Response:
        opened.append(request)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=body)

    with Client(transport=httpx.MockTransport(answer)) as client:
        for _ in client.stream_completions("x", model="m"):
            assert not body.closed
        assert body.read_to_end
        assert body.closed
