"""A load as server-sent events: progress, then the card."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any

from fastapi.responses import Response

from knnlm_core.errors import KnnlmError
from knnlm_server.api.datastore_card import render_card
from knnlm_server.api.errors import error_event
from knnlm_server.api.sse import DONE, sse, sse_response
from knnlm_server.registry.registry import Loaded

logger = logging.getLogger(__name__)

TELL_EVERY_S = 0.1  # at most, within a stage


def stream_load(load: Callable[..., Loaded], executor: Executor) -> Response:
    """Begin the load, which goes on whether or not anybody listens to the end.

    Args:   load: takes the ``report`` that it tells its progress to.
    """
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def tell(event: dict[str, Any] | None) -> None:
        try:
            loop.call_soon_threadsafe(told.put_nowait, event)
        except RuntimeError:  # the server is shutting down
            return

    loading = loop.run_in_executor(executor, lambda: load(report=_Teller(tell)))
    loading.add_done_callback(partial(_ended, told))
    return sse_response(_events(told, loading), on_close=lambda: None)


def _ended(told: asyncio.Queue[dict[str, Any] | None], loading: asyncio.Future[Loaded]) -> None:
    if not loading.cancelled():
        loading.exception()  # seen, whether or not somebody still listens
    told.put_nowait(None)


class _Teller:
    """Passes on the beginning and the end of every stage, and what happens between as often as anybody can read it."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._told_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if 0 < done < total and now - self._told_s < TELL_EVERY_S:
            return
        self._told_s = now
        self._tell({"object": "datastore.progress", "stage": stage, "done": done, "total": total})


async def _events(told: asyncio.Queue[dict[str, Any] | None], loading: asyncio.Future[Loaded]) -> AsyncIterator[str]:
    try:
        while (event := await told.get()) is not None:
            yield sse(event)
        yield sse(render_card((await loading).status))
    except KnnlmError as error:
        yield error_event(error)
    except Exception:
        logger.exception("load failed")
        yield error_event(KnnlmError("internal error"))
    yield DONE
