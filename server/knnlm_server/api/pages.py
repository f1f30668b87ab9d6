"""Pages for browsers that installed packages bring, each under a path of its own; the server knows none of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import entry_points

from fastapi import FastAPI

logger = logging.getLogger(__name__)

GROUP = "knnlm.pages"

# What a page keeps open while the server runs.
Page = AbstractAsyncContextManager[None]


def mount_pages(app: FastAPI, stopping: asyncio.Event) -> list[Page]:
    """Give the app the pages that are installed.

    An entry point of the group is a function of the app and of the event that says that the server is to stop, upon
    which a page ends its endless streams. It mounts what it has, and returns what is open while the server runs, or
    None if it mounts nothing. A page that does not load is logged, and the server does without.
    """
    pages = []
    for entry in entry_points(group=GROUP):
        try:
            page: Page | None = entry.load()(app, stopping)
        except Exception:  # whatever a package's import raises must not take the API down
            logger.exception("page not available name=%s", entry.name)
            continue
        if page is not None:
            pages.append(page)
    return pages


@asynccontextmanager
async def opened(pages: Sequence[Page]) -> AsyncIterator[None]:
    """Keep pages open."""
    async with AsyncExitStack() as stack:
        for page in pages:
            await stack.enter_async_context(page)
        yield
