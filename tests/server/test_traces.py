"""Spans: who calls whom, from when to when, with which figures, and never a text; a lost collector disturbs nobody."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import live_server as live_server_module
import pytest
from live_server import Brake, LiveServer, wait_until
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from otlp_collector import Collector
from small_stores import Published

from knnlm_core import __version__
from knnlm_server.app import create_app
from knnlm_server.settings import ServerSettings
from knnlm_server.telemetry.logs import JsonFormatter
from knnlm_server.telemetry.otlp import MAX_TIMELINES, SpanTracing

LAW = "tiny-lm@law"
PROMPT = "The tenant shall return"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
PASSES = ["forward", "gate", "search", "mix"]


class Spans:
    """What a server has told so far, by the request's span."""

    def __init__(self, server: LiveServer, exporter: InMemorySpanExporter) -> None:
        self.server = server
        self._exporter = exporter

    def after(self, call: Callable[[], object], requests: int = 1) -> list[ReadableSpan]:
        """Those of the requests that a call makes, the last request's own last."""
        self._exporter.clear()
        call()
        wait_until(lambda: [span.kind for span in self._told()].count(SpanKind.SERVER) == requests)
        return list(self._told())

    def _told(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


@pytest.fixture(scope="module")
def spans(published: Published) -> Iterator[Spans]:
    exporter = InMemorySpanExporter()
    tracing = SpanTracing(SimpleSpanProcessor(exporter))
    settings = ServerSettings(
        model=str(published.model), datastores=published.root, max_sequences=4, drain_timeout_s=5, draft_tokens=0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_server_module, "create_app", partial(create_app, tracing=tracing))
        server = LiveServer(settings)
    with server:
        yield Spans(server, exporter)


def children(spans: list[ReadableSpan], of: ReadableSpan) -> list[ReadableSpan]:
    found = [span for span in spans if span.parent is not None and span.parent.span_id == of.context.span_id]
    return sorted(found, key=lambda span: span.start_time or 0)


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def check_nesting(spans: list[ReadableSpan], of: ReadableSpan) -> None:
    """Children lie within their parent, one after the other."""
    end = of.start_time
    for child in children(spans, of):
        assert child.start_time is not None
        assert child.end_time is not None
        assert end <= child.start_time <= child.end_time <= of.end_time, child.name
        assert child.context.trace_id == of.context.trace_id
        end = child.end_time
        check_nesting(spans, child)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_queue_prefill_and_decode_under_the_clients_span(spans: Spans, stream: bool) -> None:
    body = {"prompt": PROMPT, "model": LAW, "max_tokens": 5, "ignore_eos": True, "stream": stream}
    headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
    told = spans.after(lambda: spans.server.http.post("/v1/completions", json=body, headers=headers))
    root = told[-1]
    assert (root.name, root.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    queue, prefill, decode = children(told, root)
    assert names([queue, prefill, decode]) == ["queue", "prefill", "decode"]
    assert names(children(told, queue)) == []
    for phase, passes in ((prefill, 1), (decode, 4)):
        assert names(children(told, phase)) == PASSES
        assert phase.attributes is not None
        assert phase.attributes["knnlm.passes"] == passes
        for part in children(told, phase):
            assert part.attributes is not None
            assert part.attributes["knnlm.sum_of_passes"] == passes
            assert part.attributes["knnlm.seconds"] > 0
    check_nesting(told, root)
    assert len(told) == 1 + 3 + 2 * len(PASSES)
    status = spans.server.http.get("/v1/datastores/law").json()
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "knnlm.request_id": "mine",
        "knnlm.model": LAW,
        "knnlm.datastores": f"law:{status['version']}:{status['generation']}.0",
        "knnlm.requests": 1,
        "knnlm.prompt_tokens": len(spans.server.lm.tokenizer.encode(PROMPT)),
        "knnlm.tokens": 5,
        "knnlm.searched": 5,
        "knnlm.followed": 0,
        "knnlm.skipped": 0,
        "knnlm.drafted": 0,
        "knnlm.accepted": 0,
    }


def test_a_long_completion_has_as_many_spans_as_a_short_one(spans: Spans) -> None:
    counts = [
        len(spans.after(lambda n=n: spans.server.complete(PROMPT, model=LAW, max_tokens=n, ignore_eos=True)))
        for n in (3, 60)
    ]
    assert counts[0] == counts[1]


def test_of_many_prompts_the_first_ones_have_spans(spans: Spans) -> None:
    told = spans.after(lambda: spans.server.complete(["The tenant"] * (MAX_TIMELINES + 4), max_tokens=1))
    root = told[-1]
    assert root.attributes is not None
    assert root.attributes["knnlm.requests"] == MAX_TIMELINES + 4
    assert names(children(told, root)).count("prefill") == MAX_TIMELINES
    # Without a datastore nothing is gated, searched or mixed.
    assert {"gate", "search", "mix"}.isdisjoint(names(told))


@pytest.mark.parametrize("stream", [False, True])
def test_a_score_is_queue_and_score(spans: Spans, stream: bool) -> None:
    text = "The tenant pays the rent. The court may refuse."
    body = {"input": [text], "model": LAW, "stream": stream}
    told = spans.after(lambda: spans.server.post("/v1/score", body))
    root = told[-1]
    queue, score = children(told, root)
    assert names([root, queue, score]) == ["POST /v1/score", "queue", "score"]
    assert names(children(told, score)) == PASSES
    check_nesting(told, root)
    assert root.attributes is not None
    tokens = len(spans.server.lm.tokenizer.encode(text)) - 1
    assert [root.attributes[f"knnlm.{name}"] for name in ("tokens", "searched", "model")] == [tokens, tokens, LAW]


def test_time_in_the_queue_is_the_queues(spans: Spans) -> None:
    server = spans.server
    with Brake(server.lm) as brake:
        first = server.begin("/v1/completions", {"prompt": ["The tenant"] * 4, "max_tokens": 1})
        brake.wait_held()

        def wait_a_little() -> None:
            second = server.begin("/v1/completions", {"prompt": "A buyer", "max_tokens": 1})
            wait_until(lambda: len(server.backend.engine._accepted) == 5)
            time.sleep(0.2)
            brake.release()
            for connection in (first, second):
                assert connection.recv(12) == b"HTTP/1.1 200"
                connection.close()

        told = spans.after(wait_a_little, requests=2)
    waited = sorted((span.end_time or 0) - (span.start_time or 0) for span in told if span.name == "queue")
    assert len(waited) == 5
    assert waited[3] < 0.2e9 <= waited[4]
    wait_until(server.is_idle)


def test_log_lines_of_a_request_with_spans_carry_its_trace(spans: Spans) -> None:
    written: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.setFormatter(JsonFormatter())
    handler.emit = lambda record: written.append(json.loads(handler.format(record)))  # type: ignore[method-assign]
    access = logging.getLogger("knnlm_server.access")
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    try:
        for sampled in ("00", "01"):
            headers = {"traceparent": TRACEPARENT[:-2] + sampled, "x-request-id": sampled}
            spans.server.http.get("/version", headers=headers)
        wait_until(lambda: len(written) == 2)
    finally:
        access.removeHandler(handler)
        access.setLevel(logging.NOTSET)
    assert [(line["request_id"], line.get("trace_id")) for line in written] == [("00", None), ("01", TRACE_ID)]


def test_no_span_holds_a_word_of_a_prompt_or_an_answer(spans: Spans) -> None:
    answers = []
    body = {"prompt": f"{PROMPT} zebra", "model": LAW, "max_tokens": 8, "logprobs": 2}
    told = spans.after(lambda: answers.append(spans.server.post("/v1/completions", body).json()))
    written = " ".join(span.to_json() for span in told)
    assert "zebra" not in written
    assert PROMPT not in written
    assert answers[0]["choices"][0]["text"].strip()
    assert answers[0]["choices"][0]["text"].strip() not in written


def test_a_refusal_has_its_own_span_and_a_failure_is_marked(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    (refused,) = spans.after(lambda: spans.server.post("/v1/completions", {"prompt": ""}))
    assert refused.attributes is not None
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code is StatusCode.UNSET

    def failing(*args: object) -> None:
        raise RuntimeError("an inside that nobody may see")

    with monkeypatch.context() as patch:
        patch.setattr("knnlm_server.engine.engine.run_step", failing)
        told = spans.after(lambda: spans.server.post("/v1/completions", {"prompt": PROMPT, "stream": True}))
    assert told[-1].status.status_code is StatusCode.ERROR
    assert told[-1].attributes is not None
    assert told[-1].attributes["error.type"] == "engine_failure"
    assert "inside" not in " ".join(span.to_json() for span in told)


def test_probes_have_no_spans_and_what_the_client_does_not_sample_is_not_sampled(spans: Spans) -> None:
    spans._exporter.clear()
    for path in ("/health", "/ready", "/metrics"):
        spans.server.http.get(path)
    unsampled = {"traceparent": TRACEPARENT[:-2] + "00"}
    spans.server.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}, headers=unsampled)
    (only,) = spans.after(lambda: spans.server.http.get("/version", headers={"traceparent": "nonsense"}))
    assert only.name == "GET /version"
    assert only.parent is None


# -- a real collector --------------------------------------------------------------------------------------------------


def server_of(published: Published, **settings: object) -> LiveServer:
    given = {"model": str(published.model), "max_sequences": 2, "drain_timeout_s": 5, **settings}
    return LiveServer(ServerSettings(**given))  # type: ignore[arg-type]


def test_a_collector_gets_every_span_by_the_time_the_server_has_stopped(published: Published) -> None:
    with Collector() as collector:
        with server_of(published, otlp_endpoint=collector.url) as server:
            headers = {"traceparent": TRACEPARENT}
            server.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3}, headers=headers)
        assert set(collector.paths) == {"/v1/traces"}
        assert sorted(span.name for span in collector.spans) == sorted(
            ["POST /v1/completions", "queue", "prefill", "decode", "forward", "forward"]
        )
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
        assert collector.resource["service.name"] == "knnlm"
        assert collector.resource["service.version"] == __version__


def test_a_ratio_of_zero_leaves_the_choice_to_clients(published: Published) -> None:
    with Collector() as collector:
        endpoint = f"{collector.url}/own/path"
        with server_of(published, otlp_endpoint=endpoint, otlp_sample_ratio=0.0) as server:
            server.http.get("/version")
            server.http.get("/version", headers={"traceparent": TRACEPARENT})
        assert collector.paths == ["/own/path"]
        assert [span.trace_id.hex() for span in collector.spans] == [TRACE_ID]


def test_a_lost_collector_disturbs_no_request_and_is_mentioned_once(
    published: Published, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with Collector() as collector:
        gone = collector.url
    with caplog.at_level(logging.WARNING, "opentelemetry"), server_of(published, otlp_endpoint=gone) as server:
        for _ in range(20):
            assert server.complete(PROMPT, max_tokens=1)["choices"]
            time.sleep(0.02)
        wait_until(lambda: any("opentelemetry" in record.name for record in caplog.records))
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 15
    assert len([record for record in caplog.records if record.name.startswith("opentelemetry")]) == 1


WITHOUT = """
import sys
for name in ("sdk", "exporter"):  # as where the extra is not installed
    sys.modules["opentelemetry." + name] = None
from knnlm_cli.main import main
from knnlm_server.app import create_app
from knnlm_server.settings import ServerSettings
create_app(ServerSettings(model="any"))
print("an app without spans")
main()
"""


def test_without_the_extra_the_flag_says_what_to_install_and_nothing_else_needs_it(published: Published) -> None:
    command = [sys.executable, "-c", WITHOUT, "serve", "--model", str(published.model), "--port", "0"]
    asked = subprocess.run(
        [*command, "--otlp-endpoint", "http://127.0.0.1:4318"], capture_output=True, text=True, timeout=120
    )
    assert asked.stdout == "an app without spans\n"
    assert asked.returncode == 1
    assert "pip install 'knnlm[otel]'" in asked.stderr
    assert "Traceback" not in asked.stderr
