"""Run the page on a socket of its own until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
import sys
from importlib.util import find_spec

import typer
import uvicorn

NEEDED = {"gradio": "pip install 'knnlm[playground]'", "knnlm_client": "it lies in clients/python"}
_GRACE_S = 5


def run_page(url: str, api_key: str | None, host: str, port: int, *, allows_changes: bool) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Raises: typer.BadParameter: an address cannot be used, or something is not installed.
    """
    for name, where in NEEDED.items():
        if find_spec(name) is None:
            raise typer.BadParameter(f"the page needs {name}, which is not installed ({where})")

    from knnlm_playground.guard import LOOPBACK
    from knnlm_playground.server import Keys, Server

    server = Server(url, api_key=api_key, allows_changes=allows_changes)
    try:
        asyncio.run(server.connect(Keys()).aclose())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if api_key is not None and "," in api_key:
        raise typer.BadParameter("--api-key must be one key, and this one holds a comma: a server's list of keys?")
    if api_key is not None and host not in LOOPBACK:
        print(f"whoever reaches {host} uses the API key that was given", file=sys.stderr)
    sock = _listen(host, port)

    from knnlm_playground.guard import Guard
    from knnlm_playground.site import build_site  # gradio takes seconds

    stopping = asyncio.Event()
    config = uvicorn.Config(
        Guard(build_site(server), stopping), log_level="warning", access_log=False, lifespan="on", ws="none",
        timeout_graceful_shutdown=_GRACE_S,
    )  # fmt: skip
    host, port = sock.getsockname()[:2]
    shown = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"knnlm playground of {url} on {shown}", file=sys.stderr, flush=True)
    _Stoppable(config, stopping).run(sockets=[sock])


class _Stoppable(uvicorn.Server):
    """Ends the page's endless streams before it waits for all answers to end."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's own, which comes next."""
        self._stopping.set()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise typer.BadParameter(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
