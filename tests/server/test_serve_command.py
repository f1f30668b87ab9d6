"""`knnlm serve` as its users run it: a process of its own, a port, a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from small_stores import Published

PATIENCE_S = 60.0


@contextmanager
def serve(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process and its address, as its first line tells it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    environment["OMP_NUM_THREADS"] = "1"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "knnlm_cli", "serve", "--port", "0", *arguments], stderr=stderr, env=environment
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"knnlm listens on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def wait_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while (response := client.get("/ready")).status_code != 200:
        assert response.json()["error"]["code"] == "not_ready"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_serve_answers_drains_on_sigterm_and_exits_with_zero(published: Published, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["--model", str(published.model), "--datastores", str(published.root), "--drain-timeout-s", "20"]
    with serve(log, *arguments) as (process, url), httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        wait_ready(client)
        assert client.get("/ready").json()["datastores"] == ["law", "news"]
        body = {"prompt": "The tenant", "model": "tiny-lm@law", "max_tokens": 8}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["knn"]["searched"] == 8

        body |= {"max_tokens": 200, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        # What was under way is finished, not cut off.
        assert rest[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason": "length"' in rest[-4]
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - started < 20
        with pytest.raises(httpx.ConnectError):
            client.get("/ready")
    text = log.read_text()
    assert "Traceback" not in text
    assert "request method=POST path='/v1/completions' status=200" in text
    assert "The tenant" not in text  # no prompt is ever logged


def test_serve_that_cannot_start_ends_with_one_and_says_why(published: Published, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["--model", str(published.model), "--datastores", str(published.root), "--load", "absent"]
    with serve(log, *arguments) as (process, _):
        assert process.wait(PATIENCE_S) == 1
    text = log.read_text()
    assert "no datastore 'absent' is published" in text
    assert "error: the server could not start" in text
    assert "Traceback" not in text
