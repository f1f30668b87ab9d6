"""Run the app on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys

import uvicorn

from knnlm_core.errors import InvalidParameter, ServiceError
from knnlm_server.settings import ServerSettings
from knnlm_server.telemetry.logs import LogFormat, configure_logging

_MAX_HEAD_BYTES = 128 * 1024  # of a request's line and headers: a document's id is part of its path


def run_server(settings: ServerSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        InvalidParameter: the address cannot be listened on.
        ServiceError: the model or a datastore did not load.
    """
    configure_logging(settings.log_level, settings.log_format)
    if settings.threads is not None:
        # Read by FAISS and torch when they are first imported, below.
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    from knnlm_server.app import create_app

    sock = _listen(settings.host, settings.port)
    failed = False

    def stop() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    app = create_app(settings, on_failure=stop)
    config = uvicorn.Config(
        app,
        log_config=None,
        ws="none",
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain_timeout_s) + 1,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )
    server = _Server(config, app.state.stopping)
    host, port = sock.getsockname()[:2]
    _announce(f"http://{f'[{host}]' if ':' in host else host}:{port}", settings.log_format)
    # uvicorn drains, then raises the signal again for whoever handled it before: being told to stop is no failure.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[sock])
    if failed:
        raise ServiceError("the server could not start; the log says why")


class _Server(uvicorn.Server):
    """Says that it stops before it waits for answers to end: streams of pages end by nothing else."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)


def _announce(url: str, log_format: LogFormat) -> None:
    """Say where the server is reached, whatever is logged."""
    if log_format == "text":
        print(f"knnlm listens on {url}", file=sys.stderr, flush=True)
        return
    logger = logging.getLogger("knnlm_server.listen")
    logger.setLevel(logging.INFO)
    logger.info("knnlm listens url=%s", url)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidParameter(f"cannot listen on {host}:{port}: {error.strerror or error}", param="port") from error
