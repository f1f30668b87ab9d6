"""Engine requests that are awaited to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from knnlm_core.errors import KnnlmError
from knnlm_server.api.engine_call import EngineCall
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.engine.engine import Engine, Request


async def run_to_end(engine: Engine, lease: SharedLease, make: Callable[[EngineCall], Request]) -> None:
    """Submit a request that ends with the call's `end`, and wait until it has; the engine gives it up if nobody waits.

    Raises: as `Engine.submit`, and what made the request fail.
    """
    ended: asyncio.Future[KnnlmError | None] = asyncio.get_running_loop().create_future()
    call = EngineCall(engine, lease, lambda error: None if ended.done() else ended.set_result(error))
    call.submit(make(call))
    try:
        error = await ended
    finally:
        call.abort()
    if error is not None:
        raise error
