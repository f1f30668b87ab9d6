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

logger = logging.getLogger("knnlm_server.access")
REQUEST_ID = r"^[\w.:-]{1,128}$"
_REQUEST_ID = re.compile(REQUEST_ID)


class RequestLog:
    """Gives every request an id (the client's own, if it sent a sane one), echoes it, and logs one line.

    Being outermost, it also answers what nobody foresaw, without saying what that was.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("latin-1"))]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error path=%r id=%s", scope["path"], request_id)
            if status:  # the answer has begun: closing the connection is all that is left to say
                raise
            await error_response(KnnlmError("internal error"))(scope, receive, send_with_id)
        finally:
            # Probes come every few seconds and say nothing.
            level = logging.DEBUG if scope["path"] in ("/health", "/ready") else logging.INFO
            logger.log(
                level, "request method=%s path=%r status=%d seconds=%.3f id=%s",
                scope["method"], scope["path"], status, time.monotonic() - started, request_id,
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
