"""The server as it is, on a port of this machine alone, for as long as a block runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from knnlm_core.errors import NotReady
from knnlm_server.app import create_app
from knnlm_server.settings import ServerSettings

READY_S = 120.0
STOP_S = 30.0
POLL_S = 0.02


@contextmanager
def served(settings: ServerSettings) -> Iterator[httpx.Client]:
    """Serve in a thread of this process; the block starts when the server is ready.

    Raises: NotReady: it did not start, with its reason, or is not ready after `READY_S` seconds.
    """
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        # A proxy has no part in this.
        with httpx.Client(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=60, trust_env=False) as client:
            _wait_until_ready(client, thread)
            yield client
    finally:
        server.should_exit = True
        thread.join(STOP_S)


def _wait_until_ready(client: httpx.Client, thread: threading.Thread) -> None:
    deadline = time.monotonic() + READY_S
    reason = "it gives no reason"
    while time.monotonic() < deadline:
        if not thread.is_alive():
            raise NotReady("the server ended while it started")
        if (ready := client.get("/ready")).status_code == 200:
            return
        reason = ready.json()["error"]["message"]
        if client.get("/health").status_code != 200:
            raise NotReady(f"the server did not start: {reason}")
        time.sleep(POLL_S)
    raise NotReady(f"the server is not ready after {READY_S:.0f} s: {reason}")
