"""Log lines: one for each request, with its id on all that it caused, as text or as JSON, and never a prompt."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer, wait_until
from small_stores import Published, Start
from test_serve_command import wait_ready

from knnlm_server.engine import engine as engine_module
from knnlm_server.telemetry.logs import JsonFormatter, TextFormatter, fields_of, logged_for

LAW = "tiny-lm@law"
PROMPT = "The tenant shall return the zebra"
ACCESS = "knnlm_server.access"


class Lines(logging.Handler):
    """What a formatter makes of the lines of a server, where they are written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.written]

    def of(self, request_id: str) -> list[dict[str, Any]]:
        return [line for line in self.parsed if line.get("request_id") == request_id]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """JSON lines of our own loggers, at INFO."""
    handler, ours = Lines(JsonFormatter()), logging.getLogger("knnlm_server")
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield handler
    ours.removeHandler(handler)
    ours.setLevel(before)


def record(message: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("knnlm_server.x", level, __file__, 1, message, args, None)


@pytest.mark.parametrize(
    ("message", "args", "fields"),
    [
        ("ready", (), {"event": "ready"}),
        ("loaded name=%s entries=%d", ("a b=c", 5), {"event": "loaded", "name": "a b=c", "entries": 5}),
        ("took seconds=%.3f", (0.123456,), {"event": "took", "seconds": 0.123}),
        (
            "search failed request=%s %s",
            ("r", "no disk"),
            {"event": "search failed", "detail": "no disk", "request": "r"},
        ),
        ("no drafts: %s", ("broken",), {"event": "no drafts", "detail": "broken"}),
        ("Started server process [%d]", (7,), {"event": "Started server process", "detail": "[7]"}),
        ("refused path=%r", ("/a b",), {"event": "refused", "path": "/a b"}),
        (
            "kept share=%g of 100%% flag=%s",
            (0.5, True),
            {"event": "kept", "detail": "of 100%", "share": 0.5, "flag": True},
        ),
        ("odd value=%f", (float("inf"),), {"event": "odd", "value": "inf"}),
        ("wrong number of %s %s", ("args",), None),
    ],
)
def test_fields_are_read_off_the_message(message: str, args: tuple[object, ...], fields: dict[str, Any] | None) -> None:
    if fields is None:
        with pytest.raises(TypeError):  # logging itself reports it, as ever
            fields_of(record(message, *args))
    else:
        assert fields_of(record(message, *args)) == fields


def test_json_lines_are_one_line_each_and_keep_their_own_members() -> None:
    with logged_for(request_id="mine"):
        line = JsonFormatter().format(record("said level=%s text=%s", "high", "two\nlines λ"))
    assert "\n" not in line
    parsed = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", parsed.pop("time"))
    assert parsed == {
        "level": "INFO",
        "logger": "knnlm_server.x",
        "event": "said",
        "level_": "high",
        "text": "two\nlines λ",
        "request_id": "mine",
    }


def test_a_traceback_is_a_member() -> None:
    try:
        raise ValueError("deep inside")
    except ValueError:
        failed = record("step failed")
        failed.exc_info = sys.exc_info()
    assert "ValueError: deep inside" in json.loads(JsonFormatter().format(failed))["exception"]


def test_a_message_as_text_is_one_line_whatever_it_quotes() -> None:
    with logged_for(request_id="mine"):
        line = TextFormatter().format(record("refused name=%s", "x\n2030 ERROR forged"))
    assert line.endswith(r"INFO knnlm_server.x refused name=x\n2030 ERROR forged request_id=mine")
    assert "\n" not in line


def test_each_request_has_one_line_that_says_what_became_of_it(live_server: LiveServer, lines: Lines) -> None:
    def ask(request_id: str, path: str, body: dict[str, Any]) -> None:
        live_server.http.post(path, json=body, headers={"x-request-id": request_id})

    completion = {"prompt": PROMPT, "model": LAW, "max_tokens": 4, "ignore_eos": True}
    ask("whole", "/v1/completions", completion)
    ask("stream", "/v1/completions", {**completion, "stream": True})
    ask("score", "/v1/score", {"input": [PROMPT], "model": LAW})
    ask("bad", "/v1/completions", {"prompt": ""})
    wait_until(lambda: all(lines.of(name) for name in ("whole", "stream", "score", "bad")))
    tokens = len(live_server.lm.tokenizer.encode(PROMPT))
    for request_id, expected in {
        "whole": {"path": "/v1/completions", "status": 200, "prompt_tokens": tokens, "tokens": 4, "searched": 4},
        "stream": {"path": "/v1/completions", "status": 200, "prompt_tokens": tokens, "tokens": 4, "searched": 4},
        "score": {"path": "/v1/score", "status": 200, "tokens": tokens - 1, "searched": tokens - 1},
        "bad": {"path": "/v1/completions", "status": 400},
    }.items():
        (line,) = lines.of(request_id)
        assert (line["logger"], line["event"], line["method"], line["level"]) == (ACCESS, "request", "POST", "INFO")
        assert 0 < line["seconds"] < 60
        assert {name: line[name] for name in expected} == expected
        assert line.get("model") == (LAW if request_id != "bad" else None)
    assert "zebra" not in "".join(lines.written)


def test_probes_and_scrapes_say_nothing(live_server: LiveServer, lines: Lines) -> None:
    for path in ("/health", "/ready", "/metrics", "/version"):
        live_server.http.get(path)
    wait_until(lambda: bool(lines.written))
    assert [line["path"] for line in lines.parsed] == ["/version"]


def test_what_the_engine_and_other_threads_log_carries_the_requests_id(
    own_root: Any, start_server: Start, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(datastores=own_root)
    with monkeypatch.context() as patch:

        def failing(*args: object) -> None:
            raise RuntimeError("an inside")

        patch.setattr(server.lm, "encode", failing)
        server.http.post("/v1/score", json={"input": [PROMPT]}, headers={"x-request-id": "scored"})
        patch.setattr(engine_module, "run_step", failing)
        server.http.post("/v1/completions", json={"prompt": PROMPT}, headers={"x-request-id": "broken"})
    server.http.put("/v1/datastores/law", json={}, headers={"x-request-id": "swapped"})
    wait_until(lambda: len(lines.of("swapped")) == 2 and len(lines.of("scored")) == 2)
    failed, access = lines.of("scored")
    assert (failed["event"], failed["level"], access["error"]) == ("pass failed", "ERROR", "engine_failure")
    assert "an inside" in failed["exception"]
    loaded, _ = lines.of("swapped")
    assert (loaded["event"], loaded["name"], loaded["generation"]) == ("datastore loaded", "law", 2)
    # A step belongs to many: it names its requests, and each of them is named after its own.
    (step,) = (line for line in lines.parsed if line["event"] == "step failed")
    assert step["requests"] == "cmpl-broken-0"


@pytest.mark.parametrize("sent", ["x" * 129, "two words", "é", "a\tb", ""])
def test_a_request_id_that_is_long_or_not_printable_is_replaced(live_server: LiveServer, sent: str) -> None:
    headers = [(b"x-request-id", sent.encode("latin-1"))]
    echoed = live_server.http.get("/version", headers=headers).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", echoed)


def test_every_line_of_a_server_that_logs_json_is_json(published: Published, tmp_path: Any) -> None:
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "knnlm_cli", "serve", "--port", "0", "--model", str(published.model),
        "--datastores", str(published.root), "--state", str(tmp_path / "state.json"), "--log-format", "json",
    ]  # fmt: skip
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        wait_until(lambda: "knnlm listens" in log.read_text(), within_s=60)
        url = next(json.loads(line)["url"] for line in log.read_text().splitlines() if "knnlm listens" in line)
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            wait_ready(client)
            body = {"prompt": PROMPT, "model": LAW, "max_tokens": 3}
            client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
            client.get("/v1/datastores/absent")
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "logger", "event"} <= line.keys() for line in lines)
    assert "uvicorn.error" in {line["logger"] for line in lines}
    (mine,) = (line for line in lines if line.get("request_id") == "mine")
    assert (mine["event"], mine["status"], mine["tokens"]) == ("request", 200, 3)
    assert "zebra" not in log.read_text()
