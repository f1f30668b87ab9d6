"""POST /v1/score as newline-delimited JSON: the answer in pieces, one end, nothing left behind."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from live_server import LiveServer, before_each_pass, wait_until
from pydantic import TypeAdapter

from knnlm_core.datastore import overlap
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.types import EntryRange
from knnlm_server.api import score as score_route
from knnlm_server.api import score_job, score_rendering
from knnlm_server.api.schemas.errors import ErrorBody
from knnlm_server.api.schemas.score import ScoreProgressLine, ScoreResultLine, ScoreTotalLine
from knnlm_server.engine.scoring import ScoreRequest

LAW = "tiny-lm@law"
TEXTS = [
    "The tenant must keep every key 🙂. " * 6,
    "Q",
    "A buyer\u2028may refuse\x85",
    "Der Käufer schuldet the goods.",
]
BODY: dict[str, Any] = {"input": TEXTS, "model": LAW, "window": 32, "stride": 16, "stream": True}
LINE: TypeAdapter[Any] = TypeAdapter(ScoreProgressLine | ScoreResultLine | ScoreTotalLine | ErrorBody)
SOON_S = 5.0


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    # The strictest reader of all: it takes U+2028 and U+0085 for ends of lines too.
    lines = response.text.splitlines()
    assert response.text.endswith("\n")
    for line in lines:
        LINE.validate_json(line)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"per_token": True, "overlap": True}])
def test_a_stream_is_the_answer_in_lines(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    whole = live_server.score(TEXTS, **{**BODY, **options, "stream": False})
    # Tokens are rendered a few at a time; that must not show.
    monkeypatch.setattr(score_rendering, "_TOKENS_PER_PIECE", 7)
    lines = lines_of(live_server.post("/v1/score", {**BODY, **options}))
    *others, last = lines
    assert last == {"object": "score.total", **{name: whole[name] for name in ("model", "system_fingerprint", "total")}}
    results = {line["index"]: line for line in others if line["object"] == "score.result"}
    assert len(results) == len(TEXTS) == len([line for line in others if line["object"] == "score.result"])
    for result in whole["results"]:
        assert results[result["index"]] == {"object": "score.result", **result}
    assert live_server.score(TEXTS, **{**BODY, **options, "stream": False}) == whole


def test_progress_grows_up_to_everything(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_route, "PROGRESS_S", 0.02)
    with before_each_pass(live_server.lm, lambda: time.sleep(0.05)):
        lines = lines_of(live_server.post("/v1/score", {**BODY, "input": TEXTS * 9, "stride": 1}))
    progress = [line for line in lines if line["object"] == "score.progress"]
    assert len(progress) > 4
    for name in ("texts_done", "tokens_done"):
        counts = [line[name] for line in progress]
        assert counts == sorted(counts)
        assert counts[-1] == progress[0][name.removesuffix("_done")]
    assert progress[0]["tokens"] == lines[-1]["total"]["tokens"]
    # A long text's tokens count before it is done.
    assert any(line["tokens_done"] > 0 and line["texts_done"] < len(TEXTS * 9) for line in progress)


def test_progress_comes_no_more_often_than_it_should(live_server: LiveServer) -> None:
    began = time.monotonic()
    lines = lines_of(live_server.post("/v1/score", {**BODY, "input": TEXTS * 30}))
    progress = [line for line in lines if line["object"] == "score.progress"]
    assert len(progress) <= 3 + (time.monotonic() - began) / score_route.PROGRESS_S


def test_a_failure_is_the_last_line(live_server: LiveServer) -> None:
    passes = iter(range(100))

    def fail_at_the_second() -> None:
        if next(passes) == 1:
            raise RuntimeError("an inside that nobody may see")

    with before_each_pass(live_server.lm, fail_at_the_second):
        lines = lines_of(live_server.post("/v1/score", {**BODY, "input": TEXTS * 9, "stride": 1}))
    assert lines[-1]["error"]["code"] == "engine_failure"
    assert "inside" not in json.dumps(lines)
    assert not any(line.get("object") == "score.total" for line in lines)
    wait_until(live_server.is_idle, within_s=SOON_S)


def test_leaving_a_stream_frees_it(live_server: LiveServer) -> None:
    body = {**BODY, "input": TEXTS * 100, "stride": 1}
    slowed = before_each_pass(live_server.lm, lambda: time.sleep(0.1))  # over ten seconds to the end
    with slowed, httpx.Client(base_url=live_server.url, trust_env=False) as client:
        with client.stream("POST", "/v1/score", json=body) as response:
            assert json.loads(next(response.iter_lines()))["object"] == "score.progress"
            assert live_server.leases() == 1
        wait_until(live_server.is_idle, within_s=SOON_S)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_ends_the_search_for_overlaps_before_the_lease(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The real search over blocks of one entry, held at the third until the client is gone."""
    held, gone, blocks = threading.Event(), threading.Event(), []

    def slow_search(*args: Any, checkpoint: Callable[[], None], **kwargs: Any) -> Any:
        def hold() -> None:
            blocks.append(live_server.leases())
            if len(blocks) == 3:
                held.set()
                assert gone.wait(SOON_S)
            checkpoint()

        return overlap.longest_matches(*args, checkpoint=hold, **kwargs)

    monkeypatch.setattr(overlap, "_BLOCK_ENTRIES", 1)
    monkeypatch.setattr(score_job, "longest_matches", slow_search)
    entries = live_server.backend.registry.status("law").datastore.entries
    body = {**BODY, "overlap": True, "stream": stream}
    with httpx.Client(base_url=live_server.url, trust_env=False) as client:
        if stream:
            with client.stream("POST", "/v1/score", json=body):
                assert held.wait(SOON_S)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/score", json=body, timeout=0.5)
    assert held.wait(SOON_S)
    wait_until(lambda: not any(live_server.backend.engine.load()), within_s=SOON_S)
    time.sleep(0.1)
    assert live_server.leases() == 1  # the thread still reads
    gone.set()
    wait_until(live_server.is_idle, within_s=SOON_S)
    assert 3 <= len(blocks) < entries


def test_a_full_queue_is_said_before_the_stream(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(live_server.backend.engine), "max_requests", 0)
    for options in ({}, {"overlap": True}, {"stream": False}):
        response = live_server.post("/v1/score", {**BODY, **options})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        wait_until(live_server.is_idle, within_s=SOON_S)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_long_text_costs_little_more_than_its_scores(lm: HuggingFaceLM) -> None:
    """A million windows, which would take a hundred bytes each if they were all there at once."""
    count = 1_000_000
    text = np.ones(count, np.int32)
    tracemalloc.start()
    try:
        request = ScoreRequest("test", [text], None, 8, 1, lambda *_: None, lambda _: None, own=[EntryRange(0, 1)])
        for _ in range(3):
            request.run(lm, 256)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert request.tokens_done > 0
    assert peak < 20 * count  # of which 17 are the scores
