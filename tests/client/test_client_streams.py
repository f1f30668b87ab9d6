"""Streams: chunk by chunk, closed when left early, whole or an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import httpx
import pytest
from contract_double import CHUNKS, DONE, ContractDouble, StreamScript, run_async, sse

from knnlm_client import (
    AsyncClient,
    Client,
    CompletionChunk,
    ConnectionFailed,
    EngineFailure,
    KnnlmClientError,
    ModelNotFound,
    StreamInterrupted,
    UnexpectedResponse,
)


def test_sync_and_async_stream_the_same(double: ContractDouble, client: Client) -> None:
    async def read(client: AsyncClient) -> list[CompletionChunk]:
        async with client.stream_completions("Der", model="smollm2", max_tokens=2) as stream:
            return [chunk async for chunk in stream]

    with client.stream_completions("Der", model="smollm2", max_tokens=2) as stream:
        chunks = list(stream)
    assert chunks == run_async(double, read) == [CompletionChunk.model_validate(chunk) for chunk in CHUNKS]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " Käufer muß"
    assert double.seen[0] == double.seen[1]
    assert double.seen[0].body == {"prompt": "Der", "model": "smollm2", "max_tokens": 2, "stream": True}


BROKEN = {"error": {"message": "step failed", "type": "server_error", "param": None, "code": "engine_failure"}}


@pytest.mark.parametrize(
    ("script", "status", "expected"),
    [
        (StreamScript(sse(CHUNKS[0])), 200, StreamInterrupted),
        (StreamScript(sse(CHUNKS[0]), breaks_off=True), 200, ConnectionFailed),
        (StreamScript(sse(CHUNKS[0], BROKEN, CHUNKS[1])), 200, EngineFailure),
        (StreamScript([*sse(CHUNKS[0]), b"data: {}\n\n"]), 200, UnexpectedResponse),
        (StreamScript([]), 404, ModelNotFound),
    ],
)
def test_sync_and_async_streams_fail_alike(
    script: StreamScript, status: int, expected: type[KnnlmClientError], double: ContractDouble, client: Client
) -> None:
    received: dict[str, list[CompletionChunk]] = {"sync": [], "async": []}

    def read_all() -> None:
        with client.stream_completions("x", model="m") as stream:
            for chunk in stream:
                received["sync"].append(chunk)

    async def read_all_async(client: AsyncClient) -> None:
        async with client.stream_completions("x", model="m") as stream:
            async for chunk in stream:
                received["async"].append(chunk)

    errors = []
    for read in (read_all, lambda: run_async(double, read_all_async)):
        double.stream = script
        if status != 200:
            double.error(status, "model_not_found", "no such model")
        with pytest.raises(KnnlmClientError) as caught:
            read()
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][0] is expected
    assert received["sync"] == received["async"]
    assert len(received["sync"]) == (1 if status == 200 else 0)


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


def test_a_stream_is_the_same_however_its_bytes_arrive(double: ContractDouble, client: Client) -> None:
    body = b": keep-alive\r\n\r\n" + b"".join([*sse(*CHUNKS), DONE]).replace(b"\n", b"\r\n")
    double.stream = StreamScript([body[place : place + 1] for place in range(len(body))])
    with client.stream_completions("x", model="m") as stream:
        assert list(stream) == [CompletionChunk.model_validate(chunk) for chunk in CHUNKS]


def test_nothing_after_the_end_mark_is_yielded(double: ContractDouble, client: Client) -> None:
    double.stream = StreamScript([*sse(CHUNKS[0]), DONE, *sse(CHUNKS[1])])
    with client.stream_completions("x", model="m") as stream:
        assert len(list(stream)) == 1


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
