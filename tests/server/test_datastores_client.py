"""The clients change datastores of a real server: aliases, default, rollback, progress."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from small_stores import Published, Start

import knnlm_client as kc


def test_a_load_with_progress_aliases_and_default(start_server: Start, own_root: Path, published: Published) -> None:
    server = start_server(datastores=own_root, load=("news",))
    with kc.Client(server.url) as client:
        with client.datastores.stream_load("law", published.law_old, aliases=["statutes"], default=True) as stream:
            *progress, law = stream
        assert isinstance(law, kc.Datastore)
        assert (law.version, law.aliases, law.follows_current) == (published.law_old, ["statutes"], False)
        assert law == client.datastores.get("statutes")
        assert all(isinstance(event, kc.DatastoreProgress) and event.done <= event.total for event in progress)
        listed = client.datastores.list()
        assert (listed.aliases, listed.default, listed.persistent) == ({"statutes": "law"}, "law", True)
        assert listed.bytes_used == sum(store.bytes for store in listed)
        answer = client.completions("The tenant", model="tiny-lm", max_tokens=1)
        assert f"-law:{published.law_old}:1.0" in str(answer.system_fingerprint)
        assert not law.model_extra
        assert law.self_test is not None
        assert law.self_test.recall_at_32 >= law.self_test.needed


def test_a_rollback_and_a_conflict(start_server: Start, own_root: Path, published: Published) -> None:
    server = start_server(datastores=own_root, load=("law",))
    with kc.Client(server.url) as client:
        with pytest.raises(kc.DatastoreConflict) as caught:
            client.datastores.rollback("law")
        assert (caught.value.status, caught.value.code) == (409, "datastore_conflict")
        client.datastores.load("law", published.law_old)
        assert client.datastores.rollback("law").version == published.law_new
        with pytest.raises(kc.DatastoreConflict, match="'news' cannot be an alias"):
            client.datastores.load("law", aliases=["news"])


def test_a_budget_that_is_exceeded_has_an_error_of_its_own(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root, load=("news",), datastore_bytes=1 << 20)
    used = server.backend.registry.budget.used
    tight = start_server(datastores=own_root, load=("news",), datastore_bytes=used)
    with kc.Client(tight.url) as client, pytest.raises(kc.DatastoreBudget, match=f"{used} bytes {used} are used"):
        client.datastores.load("law")


def test_an_error_ends_a_streamed_load_in_an_event_loop_too(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root, load=("law",))

    async def load(name: str, version: str) -> list[kc.LoadEvent]:
        async with kc.AsyncClient(server.url) as client, client.datastores.stream_load(name, version) as stream:
            return [event async for event in stream]

    with pytest.raises(kc.DatastoreNotFound, match="has no version"):
        asyncio.run(load("law", "f" * 16))
    *_, news = asyncio.run(load("news", "current"))
    assert isinstance(news, kc.Datastore)
    assert news.name == "news"
