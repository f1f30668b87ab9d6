"""The page under /playground of the server that it shows.

Gradio takes seconds to import, so that is left to the first visit: a server is ready as early as without the page.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.util import find_spec

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import Receive, Scope, Send

from knnlm_playground.guard import Guard

logger = logging.getLogger(__name__)

PATH = "/playground"
_NEEDED = ("gradio", "knnlm_client")


def mount(app: Starlette, stopping: asyncio.Event) -> AbstractAsyncContextManager[None] | None:
    """Give a server the page, if what it needs is installed.

    Args:     stopping: set when the server is to stop.
    Returns:  what the server keeps open while it runs; None without a page.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        logger.info("no playground: not installed: %s", ", ".join(missing))
        return None
    page = LazySite(_build)
    app.mount(PATH, Guard(page, stopping))
    app.add_route(PATH, _with_slash, include_in_schema=False)
    return page.opened()


class LazySite:
    """An ASGI application that is built on the first visit, for the address that this visit came to.

    Args:     build: makes the application for a server's address; it may take long, and runs in a thread.
    """

    def __init__(self, build: Callable[[str], Starlette]) -> None:
        self._build = build
        self._loading: asyncio.Task[Starlette] | None = None
        self._stack = AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(_address(scope)))
        try:
            site = await asyncio.shield(self._loading)
        except Exception:
            logger.exception("the playground does not load")
            self._loading = None  # the next visit tries again
            await PlainTextResponse("the playground does not load; the server's log says why", 500)(
                scope, receive, send
            )
            return
        await site(scope, receive, send)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Keep open what visits have built."""
        async with self._stack:
            yield
            if self._loading is not None and not self._loading.done():
                self._loading.cancel()

    async def _load(self, url: str) -> Starlette:
        site = await asyncio.to_thread(self._build, url)
        await self._stack.enter_async_context(site.router.lifespan_context(site))
        logger.info("playground loaded url=%s", url)
        return site


def _build(url: str) -> Starlette:
    from knnlm_playground.server import Server
    from knnlm_playground.site import build_site

    return build_site(Server(url, is_local=True))


def _address(scope: Scope) -> str:
    """Where this server took the request: an address of its own, whatever the visitor calls it."""
    host, port = scope["server"]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def _with_slash(request: Request) -> RedirectResponse:
    # Relative, so that it holds behind a proxy too.
    return RedirectResponse(f"{PATH.rpartition('/')[2]}/", 307)
