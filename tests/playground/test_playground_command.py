"""`knnlm playground` as its users run it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

PATIENCE_S = 90.0
COMMAND = (sys.executable, "-m", "knnlm_cli", "playground")


def test_the_page_is_served_and_stops_when_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen([*COMMAND, "--url", "http://127.0.0.1:9", "--port", "0"], stderr=stderr)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"knnlm playground of http://127.0.0.1:9 on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with httpx.Client(base_url=found[1], trust_env=False, timeout=PATIENCE_S) as client:
            page = client.get("/")
            assert page.status_code == 200
            assert "knnlm playground" in page.text
            assert client.post("/gradio_api/upload").status_code == 404
            with client.stream("GET", "/gradio_api/heartbeat/x") as endless:
                beats = endless.iter_text()
                assert next(beats).startswith("data:")
                process.send_signal(signal.SIGTERM)
                list(beats)  # ends, and as a whole answer does
        assert process.wait(PATIENCE_S) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "ftp://x"], "must begin with http:// or https://"),
        (["--api-key", "two words"], "must be printable ASCII"),
        (["--host", "127.0.0.1", "--port", "{taken}"], "cannot listen on 127.0.0.1"),
    ],
)
def test_what_cannot_work_is_told_without_a_traceback(arguments: list[str], words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [argument.format(taken=taken.getsockname()[1]) for argument in arguments]
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
        ended = subprocess.run([*COMMAND, *given], capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "two words" not in ended.stderr
