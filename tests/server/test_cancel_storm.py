"""Two hundred requests abandoned in mid-flight leave no slot, no lease, no socket, and few threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psutil
import pytest
from live_server import LiveServer, slowed, wait_until
from small_stores import Published, Start

SOON_S = 5.0
STORM = 200
MOST_WORKERS = 40  # idle threads that pools may keep; far fewer than requests
LAW = "tiny-lm@law"
TEXT = "The tenant shall pay the rent on the first day of each month. "
GENERATE = {"model": LAW, "prompt": TEXT, "max_tokens": 150, "ignore_eos": True, "n": 2}
# What each kind of client is in the middle of when it leaves.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", GENERATE),
    ("/v1/completions", GENERATE | {"stream": True}),
    ("/v1/completions", GENERATE | {"prompt": [TEXT * 5] * 3, "echo": True, "logprobs": 5, "n": 1}),
    ("/v1/score", {"model": LAW, "input": [TEXT * 200] * 4}),
]


def resources(server: LiveServer) -> dict[str, float]:
    process = psutil.Process()
    figures = server.http.get("/metrics").text.splitlines()
    gauges = {line.split()[0]: float(line.split()[1]) for line in figures if line.startswith("knnlm_requests_")}
    return {
        "file descriptors": process.num_fds(),
        **{name: value for name, value in gauges.items() if "{" not in name},
    }


@pytest.mark.slow
def test_two_hundred_abandoned_requests_leave_the_server_as_it_was(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, max_sequences=8, max_queued=2 * STORM, draft_tokens=8)
    server.complete(TEXT, model=LAW)
    server.score([TEXT], model=LAW)
    before, threads = resources(server), threading.active_count()
    with slowed(server.lm, 0.2), ExitStack() as storm:
        for i in range(STORM):
            storm.enter_context(server.begin(*KINDS[i % len(KINDS)]))
        # Some generate, some are scored, most wait.
        wait_until(lambda: sum(server.backend.engine.load()) >= STORM // 2)
        assert server.backend.engine.load().waiting > STORM // 4
        storm.close()
        asked = time.monotonic()
        answer = server.complete(TEXT, model=LAW, max_tokens=3, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 3
        assert time.monotonic() - asked < SOON_S
        wait_until(server.is_idle, within_s=SOON_S)
    _settles(lambda: resources(server), before)
    assert threading.active_count() <= threads + MOST_WORKERS


def _settles(read: Callable[[], dict[str, float]], need: dict[str, float]) -> None:
    """Sockets close a moment after their answer."""
    deadline = time.monotonic() + SOON_S
    while True:
        have = read()
        more = {name: have[name] - need[name] for name in need if have[name] > need[name]}
        if not more:
            return
        assert time.monotonic() < deadline, more
        time.sleep(0.05)
