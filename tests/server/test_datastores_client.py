"""The clients change datastores of a real server, and look into them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, wait_until
from small_stores import Published, Start
from test_client_end_to_end import undeclared
from test_client_new_routes import AsyncStreamingCaller, StreamingCaller, SyncStreamingCaller

import knnlm_client as kc
from knnlm_core.datastore import layout
from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.maintenance.export import document_line
from knnlm_core.errors import DatastoreCorrupt
from knnlm_server.api.versions import DOCUMENTS_AT_ONCE

FACT = "Note 17: the ZX-81 valve's limit is 4.7 bar, said the engineer at the harbour."


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


# -- documents and versions ------------------------------------------------------------------------------------------


@pytest.fixture
def server(start_server: Start, own_root: Path) -> Iterator[LiveServer]:
    server = start_server(datastores=own_root, load=("law",))
    yield server
    wait_until(server.is_idle, within_s=5)


@pytest.fixture(params=[SyncStreamingCaller, AsyncStreamingCaller], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest, server: LiveServer) -> Iterator[StreamingCaller]:
    kind: Callable[[str], StreamingCaller] = request.param
    caller = kind(server.url)
    yield caller
    caller.close()


def exported(caller: StreamingCaller, name: str = "law") -> dict[str, kc.ExportedDocument]:
    documents = caller.events(lambda c: c.datastores.export(name))
    assert set().union(*map(undeclared, documents)) == set()
    return {document.id: document for document in documents}


def test_a_document_is_learned_replaced_forgotten_and_purged(caller: StreamingCaller, server: LiveServer) -> None:
    valve = kc.NewDocument(id="valve", text=FACT, title="Valves", licence="CC0", tags=["zx"])
    before = exported(caller)
    learned = caller.call(lambda c: c.datastores.learn("law", [valve, {"id": "note", "text": "Keep the goods."}]))
    tokens = len(server.backend.tokenizer.encode(FACT))
    assert (learned.name, learned.revision) == ("law", 1)
    assert learned.documents[0] == kc.LearnedDocument(id="valve", tokens=tokens, entries=tokens - 1)
    assert undeclared(learned) == set()
    after = exported(caller)
    assert after.keys() - before.keys() == {"valve", "note"}
    assert after["valve"].model_dump(exclude_none=True) == valve.model_dump(exclude_none=True)

    with pytest.raises(kc.DocumentExists):
        caller.call(lambda c: c.datastores.learn("law", [valve]))
    shorter = after["valve"].model_copy(update={"text": FACT[:40]})
    assert caller.call(lambda c: c.datastores.learn("law", [shorter], update=True)).revision == 2
    assert exported(caller)["valve"] == shorter

    forgotten = caller.call(lambda c: c.datastores.forget("law", "valve"))
    assert (forgotten.document_id, forgotten.revision, undeclared(forgotten)) == ("valve", 3, set())
    assert "valve" not in exported(caller)
    with pytest.raises(kc.DocumentNotFound):
        caller.call(lambda c: c.datastores.forget("law", "valve"))

    compacted = caller.call(lambda c: c.datastores.compact("law"))
    assert (compacted.learned_documents, compacted.generation, undeclared(compacted)) == (0, 2, set())
    assert exported(caller) == before | {"note": after["note"]}

    purged = caller.call(lambda c: c.datastores.purge("law", ["valve", "note"]))
    assert (sorted(purged.documents), undeclared(purged)) == (["note", "valve"], set())
    assert purged.replaced_versions[compacted.version] == purged.datastore.version
    assert purged.files_searched > 0
    assert exported(caller) == before


def test_versions_are_listed_compared_and_verified(
    caller: StreamingCaller, own_root: Path, published: Published
) -> None:
    versions = caller.call(lambda c: c.datastores.versions("law"))
    assert isinstance(versions, tuple)
    assert {v.version: (v.current, v.serving) for v in versions} == {
        published.law_old: (False, False),
        published.law_new: (True, True),
    }
    diff = caller.call(lambda c: c.datastores.diff("law", published.law_old, published.law_new))
    assert (diff.a, diff.b) == (published.law_old, published.law_new)
    assert {name.partition("-")[0] for name in diff.added} == {"new"}
    assert {name.partition("-")[0] for name in diff.removed} == {"old"}
    assert (diff.num_added, diff.num_removed) == (len(diff.added), len(diff.removed))
    entries = {v.version: v.entries for v in versions}
    assert (diff.entries.a, diff.entries.b) == (entries[diff.a], entries[diff.b])
    every = caller.call(lambda c: c.datastores.verify("law"))
    assert {version.version for version in every.versions} == set(entries)
    one = caller.call(lambda c: c.datastores.verify("law", published.law_old))
    assert [version.version for version in one.versions] == [published.law_old]
    for answer in (*versions, diff, *diff.settings.values(), every, one):
        assert undeclared(answer) == set()

    with pytest.raises(kc.DatastoreNotFound):
        caller.call(lambda c: c.datastores.verify("law", "f" * 16))
    with pytest.raises(kc.InvalidParameter):
        caller.call(lambda c: c.datastores.diff("law", "../news", published.law_new))
    with pytest.raises(kc.DatastoreNotFound):
        caller.events(lambda c: c.datastores.export("nothing"))

    keys = next(layout.version_folder(own_root, "law", published.law_old).rglob(layout.KEYS))
    damaged = bytearray(keys.read_bytes())
    damaged[-1] ^= 1
    keys.chmod(0o644)
    keys.write_bytes(damaged)
    with pytest.raises(kc.DatastoreCorrupt, match=keys.name):
        caller.call(lambda c: c.datastores.verify("law", published.law_old))


def test_an_export_is_learned_elsewhere_as_it_is(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root)
    with kc.Client(server.url) as client:
        with client.datastores.export("news") as stream:
            documents = list(stream)
        learned = client.datastores.learn("law", documents)
        assert [document.id for document in learned.documents] == [document.id for document in documents]
        with client.datastores.export("law") as stream:
            assert {document.id: document for document in stream}[documents[0].id] == documents[0]
        with client.datastores.export("law") as stream:
            next(stream)
        wait_until(lambda: client.datastores.get("law").leases == 0, within_s=5)


def test_an_export_that_the_server_cannot_finish_has_failed(
    caller: StreamingCaller, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [{"id": f"note {i}", "text": "Keep the goods."} for i in range(2 * DOCUMENTS_AT_ONCE)]
    caller.call(lambda c: c.datastores.learn("law", many))
    whole = len(exported(caller))
    sent = 0

    def document_line_that_fails(document: Document) -> str:
        nonlocal sent
        sent += 1
        if sent == whole:
            raise DatastoreCorrupt("the last document cannot be read")
        return document_line(document)

    monkeypatch.setattr("knnlm_server.api.versions.document_line", document_line_that_fails)
    with pytest.raises(kc.DatastoreCorrupt, match="the last document cannot be read"):
        exported(caller)
    assert sent == whole


AWKWARD = [
    "a/b c#?%2F é", "a", "a\n", "a\nb", "\n", "\r\n", "\u2028", " ", "\t", "\x00", ".", "..", "../a", "a/..", "./a",
    "a/", "/", "//a", "%2e%2E", "%", "?", "#", "a?b=c&d", ";x", "\\", '"', "🙂", "e\u0301", "compact",
    "documents/a", "🙂" * 4096,
]  # fmt: skip


def test_a_document_is_forgotten_by_its_id_whatever_the_id_is(server: LiveServer) -> None:
    with kc.Client(server.url) as client:
        with client.datastores.export("law") as stream:
            before = [document.id for document in stream]
        client.datastores.learn("law", [kc.NewDocument(id=awkward, text="A note.") for awkward in AWKWARD])
        left = list(AWKWARD)
        # The shortest last: an id that were cut on its way would name another document that is still there.
        for awkward in sorted(AWKWARD, key=len, reverse=True):
            assert client.datastores.forget("law", awkward).document_id == awkward
            left.remove(awkward)
            with client.datastores.export("law") as stream:
                assert sorted(document.id for document in stream) == sorted(before + left)


def test_changes_without_the_admin_key_are_forbidden(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root, load=("law",), api_key=("user-key",), admin_key="admin-key")
    with kc.Client(server.url, api_key="user-key") as user:
        with pytest.raises(kc.Forbidden):
            user.datastores.learn("law", [{"id": "a", "text": FACT}])
        with pytest.raises(kc.Forbidden), user.datastores.export("law") as stream:
            next(stream)
    with kc.Client(server.url, api_key="user-key", admin_key="admin-key") as admin:
        assert admin.datastores.learn("law", [{"id": "a", "text": FACT}]).revision == 1
        with admin.datastores.export("law") as stream:
            assert "a" in {document.id for document in stream}
