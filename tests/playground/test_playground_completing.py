"""Both completions of a prompt, and the sources of their tokens, against a real server without a page."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import pytest
from live_server import LiveServer, slowed, wait_until
from playground_stores import CONTINUED, PROMPT

from knnlm_client import AsyncClient, DatastoreNotFound, InvalidKnnParams, KnnOptions
from knnlm_playground.choice import Choice
from knnlm_playground.completing import Pair, Wish, complete
from knnlm_playground.rendering.completion import render_generation
from knnlm_playground.server import Keys, Server
from knnlm_playground.sources import Excerpt, read_excerpts

T = TypeVar("T")


def wish(*datastores: str, default: str | None = None, max_tokens: int = 24, **knn: Any) -> Wish:
    choice = Choice("tiny-lm", datastores, default, KnnOptions(**knn))
    return Wish(PROMPT, choice, {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True})


def use(server: LiveServer, act: Callable[[AsyncClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with Server(server.url, is_local=True).connect(Keys()) as client:
            return await act(client)

    return asyncio.run(run())


async def to_the_end(client: AsyncClient, wanted: Wish) -> Pair:
    return [pair async for pair in complete(client, wanted, Pair())][-1]


def test_the_datastore_changes_one_completion_and_not_the_other(live_server: LiveServer) -> None:
    pair = use(live_server, lambda client: to_the_end(client, wish("manuals")))
    assert pair.mixed.text.startswith(CONTINUED[:12])
    alone = live_server.complete(PROMPT, model="tiny-lm", max_tokens=24, ignore_eos=True)["choices"][0]["text"]
    assert pair.base.text == alone != pair.mixed.text
    assert "".join(token.text for token in pair.mixed.tokens()) == pair.mixed.text
    assert {trace.searched for trace in pair.mixed.traces} == {True}
    assert {(trace.searched, trace.lmbda) for trace in pair.base.traces} == {(False, 0.0)}


def test_without_a_datastore_the_model_alone_completes_even_where_there_is_a_default(live_server: LiveServer) -> None:
    alone = live_server.complete(PROMPT, model="tiny-lm", max_tokens=24, ignore_eos=True)["choices"][0]["text"]

    async def act(client: AsyncClient) -> Pair:
        await client.datastores.load("manuals", default=True)
        return await to_the_end(client, wish(default="manuals"))

    pair = use(live_server, act)
    assert pair.base.text == alone
    assert pair.mixed.text == ""


def test_an_error_ends_its_own_completion_alone(live_server: LiveServer) -> None:
    pair = use(live_server, lambda client: to_the_end(client, wish("manuals", gate_threshold=1.0)))
    assert isinstance(pair.mixed.error, InvalidKnnParams)
    assert pair.base.error is None
    assert pair.base.finish_reason == "length"
    assert "`knn.gate_threshold` needs `knn.gate`" in render_generation(pair.mixed, PROMPT)
    pair = use(live_server, lambda client: to_the_end(client, wish("absent")))
    assert isinstance(pair.mixed.error, DatastoreNotFound)


def test_leaving_early_stops_the_server(live_server: LiveServer) -> None:
    async def leave(client: AsyncClient) -> int:
        async with aclosing(complete(client, wish("manuals", max_tokens=1000), Pair())) as growing:
            async for pair in growing:
                if pair.mixed.traces and pair.base.traces:
                    return len(pair.mixed.traces)
        raise AssertionError("it ended by itself")

    with slowed(live_server.lm, 0.05):
        assert use(live_server, leave) < 1000
        wait_until(live_server.is_idle)


@pytest.mark.parametrize("gate", ["always", "automaton"])
def test_every_neighbor_is_shown_in_its_own_document(live_server: LiveServer, gate: str) -> None:
    """Also where neighbours are followed, which no search after the same context need find."""
    wanted = wish("manuals", gate=gate)

    async def act(client: AsyncClient) -> list[tuple[str, Excerpt | None]]:
        tokens = (await to_the_end(client, wanted)).mixed.tokens()
        followed = [i for i, token in enumerate(tokens) if token.trace.followed]
        assert bool(followed) == (gate == "automaton")
        index = followed[0] if followed else 3
        excerpts = await read_excerpts(client, wanted, tokens, index)
        names = [neighbor.token for neighbor in tokens[index].trace.neighbors]
        return list(zip(names, excerpts, strict=True))

    found = use(live_server, act)
    assert found
    for name, one in found:
        assert one is not None
        # A token that is a part of a character is shown with the whole of it.
        assert one.token == name or "\ufffd" in name


def test_no_proxy_stands_before_the_own_server(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert use(live_server, lambda client: client.health())
