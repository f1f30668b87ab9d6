"""Answers that are sent as they come about: server-sent events, and other streams that must be closed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

DONE = "data: [DONE]\n\n"


def to_json(payload: dict[str, Any]) -> bytes:
    """A whole answer."""
    return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def sse(payload: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"


class _ClosedStream(StreamingResponse):
    """Calls ``on_close`` however it ends, even where the client is gone before the first piece is asked for."""

    on_close: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_close()


def sse_response(events: AsyncIterator[str], on_close: Callable[[], None]) -> StreamingResponse:
    """A response that proxies pass on event by event; ``on_close`` is called once it is over."""
    return stream_response(events, "text/event-stream", on_close)


def stream_response(pieces: AsyncIterator[str], media_type: str, on_close: Callable[[], None]) -> StreamingResponse:
    """A response that proxies pass on piece by piece; ``on_close`` is called once it is over."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = _ClosedStream(pieces, media_type=media_type, headers=headers)
    response.on_close = on_close
    return response
