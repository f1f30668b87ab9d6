"""One prompt, completed twice at the same time: with datastores, and by the language model alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from knnlm_client import AsyncClient, KnnlmClientError, StreamCompletionOptions
from knnlm_playground.choice import Asked, Choice
from knnlm_playground.tokens import Generation

INTERVAL_S = 0.15  # between two looks at what has come


@dataclass(frozen=True, slots=True)
class Wish:
    """What a visitor wants completed."""

    prompt: str
    choice: Choice
    sampling: StreamCompletionOptions


@dataclass(frozen=True, slots=True)
class Pair:
    """Both completions; `mixed` stays empty where there is no datastore."""

    base: Generation = field(default_factory=Generation)
    mixed: Generation = field(default_factory=Generation)


async def complete(client: AsyncClient, wish: Wish, pair: Pair) -> AsyncGenerator[Pair, None]:
    """Yield the pair again and again as it grows, the last time when both have ended.

    An error ends its own completion and stands there. Leaving early stops the server.
    """
    running = {asyncio.create_task(_follow(client, wish, wish.choice.alone(trace=True), pair.base))}
    if wish.choice.datastores:
        running.add(asyncio.create_task(_follow(client, wish, wish.choice.mixed(trace=True), pair.mixed)))
    try:
        while running:
            done, running = await asyncio.wait(running, timeout=INTERVAL_S)
            for task in done:
                task.result()  # what nobody foresaw is not passed over
            yield pair
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _follow(client: AsyncClient, wish: Wish, asked: Asked, into: Generation) -> None:
    try:
        options = wish.sampling.copy()
        options["logprobs"], options["knn"] = 0, asked.knn
        async with client.stream_completions(wish.prompt, model=asked.model, **options) as stream:
            async for chunk in stream:
                for piece in chunk.choices:
                    into.add(piece)
    except (KnnlmClientError, ValueError) as error:
        into.error = error
