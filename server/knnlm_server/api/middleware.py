"""Pure ASGI middleware: it must not hide a client's disconnect from the routes."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knnlm_core.errors import KnnlmError, PayloadTooLarge, RateLimited
from knnlm_server.api.errors import error_response
from knnlm_server.api.security import authorization_of, key_number
from knnlm_server.settings import ServerSettings
from knnlm_server.telemetry.http_metrics import HttpMetrics
from knnlm_server.telemetry.logs import logged_for
from knnlm_server.telemetry.record import OTHER, RequestRecord, WorkReport
from knnlm_server.telemetry.traces import NO_SPAN, RequestSpan, Tracing

logger = logging.getLogger("knnlm_server.access")
REQUEST_ID = r"^[\w.:-]{1,128}$"
_REQUEST_ID = re.compile(REQUEST_ID, re.ASCII)
_MAX_PATH = 256  # characters of a path that is logged: it may hold a document's id
PROBES = ("/health", "/ready", "/metrics")


class RequestLog:
    """Gives every request an id (the client's own, if it sent a sane one), echoes it, and says once what became of it:
    in one line of the log, in metrics and in a span.

    Being outermost, it also answers what nobody foresaw, without saying what that was.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(request_id, scope["method"])
        scope.setdefault("state", {}).update(request_id=request_id, record=record)
        span = NO_SPAN if scope["path"] in PROBES else self._tracing.begin(headers, record)
        with logged_for(request_id=request_id, **({"trace_id": span.trace_id} if span.trace_id else {})):
            try:
                await self._answer(record, scope, receive, send)
            finally:
                self._say(record, span, scope)

    def _say(self, record: RequestRecord, span: RequestSpan, scope: Scope) -> None:
        """What became of a request that is over."""
        record.ended_s = time.monotonic()
        # Of an app that is mounted, where it is; its own routes are its own business.
        record.route = str(scope.get("root_path") or getattr(scope.get("route"), "path", OTHER))
        report = record.work() if record.work is not None else None
        self._metrics.count(record)
        span.end(record, report)
        # Probes come every few seconds and say nothing.
        level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
        if logger.isEnabledFor(level):
            _log(level, record, scope["path"], report)

    async def _answer(self, record: RequestRecord, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error path=%r", scope["path"][:_MAX_PATH])
            if record.status:  # the answer has begun: closing the connection is all that is left to say
                raise
            await error_response(KnnlmError("internal error"))(scope, receive, send_with_id)


def _log(level: int, record: RequestRecord, path: str, report: WorkReport | None) -> None:
    fields: dict[str, object] = {}
    if report is not None:
        fields = {"model": report.model, "prompt_tokens": report.prompt_tokens, "tokens": report.tokens}
        fields |= {"searched": report.retrievals.get("searched", 0)}
        fields |= {"error": report.error} if report.error is not None else {}
    logger.log(
        level,
        "request method=%s path=%r status=%d seconds=%.3f" + "".join(f" {name}=%s" for name in fields),
        record.method, path[:_MAX_PATH], record.status, record.seconds, *fields.values(),
    )  # fmt: skip


class KeyLimit:
    """Refuses requests of an API key that has as many under way as it may, streams included."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._running: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        most, key = self._settings.max_requests_per_key, None
        if scope["type"] == "http" and most is not None:
            key = key_number(authorization_of(scope), self._settings)
        if key is None or most is None:
            await self._app(scope, receive, send)
            return
        if self._running[key] >= most:
            error = RateLimited(f"this API key may have at most {most} requests under way; try again later")
            await error_response(error)(scope, receive, send)
            return
        self._running[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[key] -= 1


class BodyLimit:
    """Refuses request bodies over a limit, announced or not, before they are held in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(int(announced), scope, receive, send)
            return
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_bytes:
                    raise PayloadTooLarge(f"the request body must be at most {self._max_bytes} bytes, got more")
            return message

        await self._app(scope, receive_counted, send)

    async def _refuse(self, size: int, scope: Scope, receive: Receive, send: Send) -> None:
        error = PayloadTooLarge(f"the request body must be at most {self._max_bytes} bytes, got {size}")
        await error_response(error)(scope, receive, send)
