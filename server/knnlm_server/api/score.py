"""``POST /v1/score``: how well the base LM and the mixture predict given texts, side by side."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from knnlm_core.errors import KnnlmError
from knnlm_server.api.attribution_rendering import check_attributed
from knnlm_server.api.checkpoint import Checkpoint
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.errors import error_body
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.score import RESPONSES, ScoreBody
from knnlm_server.api.score_inputs import check_inputs, read_texts
from knnlm_server.api.score_job import ScoredText, ScoreJob, ScorePlan
from knnlm_server.api.score_rendering import Reports, ScoreRenderer, progress_line, to_json
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import Selection, select
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.sse import stream_response
from knnlm_server.api.state import Backend, service

logger = logging.getLogger(__name__)
router = APIRouter(route_class=JsonRoute, dependencies=[KeyRequired])

PROGRESS_S = 0.2


@router.post("/v1/score", summary="Score texts", response_model=None, responses=RESPONSES)
async def score(body: ScoreBody, request: Request) -> Response:
    """Score each token of each text once, by rolling windows, with the base LM and with the mixture.

    A document of the datastore that is given by its id does not find itself; given as a text, it must be excluded. What
    goes on from a context is scored as a completion of that context would have been reported.
    """
    state = service(request)
    body.log_unknown()
    backend = state.require()
    selection = select(state, body.model, body.knn, body.exclude_documents)
    lease = SharedLease(selection)
    try:
        job = await _begin(request, body, backend, selection, lease)
    except BaseException:
        lease.drop()
        raise
    reports = Reports(body.per_token, body.overlap, body.wants_attribution)
    renderer = ScoreRenderer(backend.tokenizer, selection, reports)
    if body.stream:
        return stream_response(_lines(job, renderer), "application/x-ndjson", on_close=job.close)
    try:
        scored = await until_disconnect(request, _collect(job))
        # Thousands of texts take seconds: streams must not wait for them.
        content = await job.in_thread(lambda: _whole(job, renderer, scored))
        return Response(content, media_type="application/json")
    finally:
        job.close()


async def _begin(
    request: Request, body: ScoreBody, backend: Backend, selection: Selection, lease: SharedLease
) -> ScoreJob:
    windows = body.windows(backend.lm.max_length)
    check_inputs(body, selection.stores)
    # Documents come from a single one.
    datastore = selection.stores[0] if selection.stores else None
    checkpoint = Checkpoint()
    try:
        reading = lease.in_thread(read_texts, backend, body, datastore, checkpoint, executor=backend.threads.reading)
        texts = await until_disconnect(request, reading)
    finally:
        checkpoint.close()
    if body.wants_attribution:
        check_attributed(sum(text.num_scored for text in texts), selection.retrieval)
    plan = ScorePlan(texts, windows, body.overlap, body.wants_attribution, request.state.request_id)
    job = ScoreJob(backend, selection, lease, plan)
    request.state.record.work = job.report
    return job


async def _collect(job: ScoreJob) -> list[ScoredText]:
    """Every text, in the order of the input."""
    return sorted([scored async for scored in job.texts() if scored is not None], key=lambda scored: scored.position)


def _whole(job: ScoreJob, renderer: ScoreRenderer, scored: list[ScoredText]) -> bytes:
    content = io.BytesIO()
    for piece in _pieces(job, renderer, scored):
        content.write(piece.encode())
    return content.getvalue()


def _pieces(job: ScoreJob, renderer: ScoreRenderer, scored: list[ScoredText]) -> Iterator[str]:
    yield to_json({"object": "score", **renderer.header})[:-1] + ',"results":['
    for text in scored:
        yield "," if text.position else ""
        yield from renderer.result(job.plan.texts[text.position], text)
    yield f'],"total":{to_json(renderer.total())}}}'


async def _lines(job: ScoreJob, renderer: ScoreRenderer) -> AsyncIterator[str]:
    try:
        yield progress_line(job.progress)
        told_s = time.monotonic()
        async for scored in job.texts(tick_s=PROGRESS_S):
            if scored is not None:
                pieces = renderer.result(job.plan.texts[scored.position], scored, object="score.result")
                while (piece := await job.in_thread(lambda: next(pieces, None))) is not None:  # noqa: B023
                    yield piece
                yield "\n"
            if time.monotonic() - told_s >= PROGRESS_S:
                yield progress_line(job.progress)
                told_s = time.monotonic()
        yield progress_line(job.progress)
        yield to_json({"object": "score.total", **renderer.header, "total": renderer.total()}) + "\n"
    except KnnlmError as error:
        yield json.dumps(error_body(error)) + "\n"
    except Exception:
        logger.exception("stream failed request=%s", job.plan.request_id)
        yield json.dumps(error_body(KnnlmError("internal error"))) + "\n"
