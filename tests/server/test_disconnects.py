"""A client that goes away gives its slot and its lease back at once, whatever it had asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer, slowed, wait_until

SOON_S = 5.0
# Takes over a minute at a tenth of a second per step, so that only the disconnect can end it soon.
BODY = {"prompt": "The tenant", "model": "tiny-lm@law", "max_tokens": 200, "ignore_eos": True, "n": 2}


@pytest.fixture
def slow_server(live_server: LiveServer) -> Iterator[LiveServer]:
    with slowed(live_server.lm, 0.1):
        yield live_server


def check_freed(server: LiveServer) -> None:
    wait_until(server.is_idle, within_s=SOON_S)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_tokens_come_frees_slot_and_lease(slow_server: LiveServer, stream: bool) -> None:
    connection = slow_server.begin("/v1/completions", {**BODY, "stream": stream})
    wait_until(lambda: slow_server.lm.num_free_sequences == slow_server.lm.num_sequences - 2)
    assert slow_server.leases() == 1
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.close()
    check_freed(slow_server)


def test_leaving_a_stream_with_an_ordinary_client_frees_it(slow_server: LiveServer) -> None:
    with httpx.Client(base_url=slow_server.url, trust_env=False) as client:
        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            assert next(response.iter_lines()).startswith("data: ")
        check_freed(slow_server)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_anything_is_answered_frees_it(live_server: LiveServer, stream: bool) -> None:
    with slowed(live_server.lm, 0.1):
        for _ in range(10):
            live_server.begin("/v1/completions", {**BODY, "stream": stream}).close()
        check_freed(live_server)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_waiting_for_a_slot_frees_it(slow_server: LiveServer, stream: bool) -> None:
    wide = slow_server.begin("/v1/completions", {**BODY, "n": 8})
    wait_until(lambda: not slow_server.lm.num_free_sequences)
    waiting = [slow_server.begin("/v1/completions", {**BODY, "stream": stream}) for _ in range(3)]
    wait_until(lambda: slow_server.backend.engine.load().waiting == 3)
    for connection in waiting:
        connection.close()
    wait_until(lambda: slow_server.leases() == 1, within_s=SOON_S)
    assert not slow_server.lm.num_free_sequences
    wide.close()
    check_freed(slow_server)


def test_leaving_a_score_frees_it(live_server: LiveServer) -> None:
    encode, passes = live_server.lm.encode, threading.Semaphore(3)

    def encode_slowly(*args: Any) -> Any:
        passes.acquire(timeout=0.2)
        return encode(*args)

    live_server.lm.encode = encode_slowly  # type: ignore[method-assign]
    try:
        body = {"input": ["The tenant must keep every key. " * 20] * 400, "model": "tiny-lm@law", "window": 256}
        connection = live_server.begin("/v1/score", body)
        wait_until(lambda: live_server.backend.engine.load().scoring == 1)
        connection.close()
        check_freed(live_server)
    finally:
        del live_server.lm.encode


def test_others_are_not_disturbed(live_server: LiveServer) -> None:
    body = {"model": "tiny-lm@law", "max_tokens": 20, "seed": 1, "temperature": 1.0}
    need = live_server.complete("A buyer", **body)["choices"]
    with slowed(live_server.lm, 0.05):
        leaving = [live_server.begin("/v1/completions", {**BODY, "stream": i % 2 == 0, "n": 1}) for i in range(5)]
        wait_until(lambda: live_server.lm.num_free_sequences <= 3)
        timer = threading.Timer(0.3, lambda: [connection.close() for connection in leaving])
        timer.start()
        answer = live_server.complete("A buyer", **body)
        timer.join()
        check_freed(live_server)
    assert answer["choices"] == need
