"""Compacting and purging a datastore that serves: the same answers from a new version, nothing left on the disk."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, wait_until
from small_stores import Start

from knnlm_core.datastore import layout
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.reader import Datastore

FACT = "Note 17: the ZX-81 valve's limit is 4.7 bar, said the engineer at the harbour."
PROMPT = "Note 17: the ZX-81 valve's limit is"
# λ below one and few neighbours: what else is near counts too.
KNN = {"k": 6, "temperature": 5.0, "lambda": 0.6}


@pytest.fixture
def server(start_server: Start, own_root: Path) -> Iterator[LiveServer]:
    server = start_server(datastores=own_root)
    yield server
    wait_until(server.is_idle, within_s=5)


def post(server: LiveServer, path: str, body: dict[str, Any] | None = None, status: int = 200) -> dict[str, Any]:
    answer = server.http.post(f"/v1/datastores/law{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def learn(server: LiveServer, *ids: str) -> None:
    post(server, "/documents", {"documents": [{"id": i, "text": f"{i} {FACT}", "licence": "CC0"} for i in ids]}, 201)


def forget(server: LiveServer, document_id: str) -> None:
    assert server.http.delete(f"/v1/datastores/law/documents/{document_id}").status_code == 200


def complete(server: LiveServer) -> dict[str, Any]:
    body = {
        "model": "tiny-lm@law", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 0, "ignore_eos": True,
        "knn": {**KNN, "attribution": True},
    }  # fmt: skip
    return server.http.post("/v1/completions", json=body).json()


def told(answer: dict[str, Any]) -> tuple[list[str], list[float], dict[str, float]]:
    """What must not depend on where entries lie: tokens, probabilities, and the sources of all of them."""
    choice = answer["choices"][0]
    sources = {d["document_id"]: d["share"] for d in choice["attribution"]["documents"]}
    return choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], sources


def test_compaction_changes_no_answer(server: LiveServer, own_root: Path) -> None:
    learn(server, "a", "b", "c")
    forget(server, "b")
    forget(server, "new-2")
    before = complete(server)
    old = server.http.get("/v1/datastores/law").json()
    card = post(server, "/compact")
    assert card["version"] != old["version"]
    assert card["generation"] == 2
    assert card["previous"] == old["version"]
    assert card["learned_documents"] == 0
    assert card["documents"] == old["documents"]
    assert layout.read_current(own_root, "law").version == card["version"]
    after = complete(server)
    assert told(after)[0] == told(before)[0]
    assert told(after)[1] == pytest.approx(told(before)[1], abs=1e-4)
    assert told(after)[2] == pytest.approx(told(before)[2], abs=1e-4)
    assert post(server, "/compact")["version"] == card["version"], "there is nothing left to fold"
    # Deleted stays deleted and learned stays learned, also where the version knows neither.
    back = post(server, "/rollback")
    assert back["version"] == old["version"]
    assert told(complete(server))[1] == told(before)[1]


def test_requests_go_on_while_a_version_is_compacted(server: LiveServer) -> None:
    learn(server, "a")
    answers, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(complete(server))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for i in range(3):
            learn(server, f"more-{i}")
            post(server, "/compact")
    finally:
        stop.set()
        asking.join()
    assert all("choices" in answer for answer in answers)
    assert len({answer["system_fingerprint"].rsplit(":", 2)[1] for answer in answers}) > 1


def test_a_purge_leaves_nothing_in_any_file(server: LiveServer, own_root: Path) -> None:
    learn(server, "keep")
    post(server, "/compact")  # one version with `keep`, one without
    learn(server, "secret")
    forget(server, "new-2")
    text = "Note 17: secret recipe of the house"
    post(server, "/documents", {"documents": [{"id": "recipe", "text": text}]}, 201)
    with Datastore.open(own_root, "law") as store:
        purged_text = store.document("new-2").text
    report = post(server, "/purge", {"documents": ["new-2", "recipe"]})
    assert report["documents"] == ["new-2", "recipe"]
    assert report["files_searched"] > 5
    assert len(report["replaced_versions"]) == 2
    assert report["datastore"]["version"] == layout.read_current(own_root, "law").version
    for version in layout.published_versions(own_root, "law"):
        with Datastore.open(own_root, "law", version) as store:
            assert "new-2" not in store.document_ids()
            assert all(purged_text not in store.document(other).text for other in store.document_ids())
    raw = b"".join(path.read_bytes() for path in (own_root / "law").rglob("*") if path.is_file())
    assert b"secret recipe" not in raw
    snapshot = server.backend.registry.status("law").datastore
    assert "secret" in snapshot.document_ids()
    assert "recipe" not in snapshot.document_ids()
    answer = server.http.post("/v1/datastores/law/purge", json={"documents": ["never-was"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "document_not_found")


def test_only_what_is_current_is_written_anew(server: LiveServer, own_root: Path) -> None:
    versions = layout.published_versions(own_root, "law")
    other = next(v for v in versions if v != layout.read_current(own_root, "law").version)
    assert server.http.put("/v1/datastores/law", json={"version": other}).status_code == 200
    answer = server.http.post("/v1/datastores/law/compact")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "datastore_conflict")


def test_a_purge_does_not_change_which_version_is_served(server: LiveServer, own_root: Path) -> None:
    learn(server, "a")
    compacted = post(server, "/compact")
    rolled_back = post(server, "/rollback")
    assert not rolled_back["follows_current"]
    report = post(server, "/purge", {"documents": ["new-2"]})
    card = report["datastore"]
    assert card["version"] == report["replaced_versions"][rolled_back["version"]]
    assert not card["follows_current"]
    assert layout.read_current(own_root, "law").version == report["replaced_versions"][compacted["version"]]
    assert "new-2" not in server.backend.registry.status("law").datastore.document_ids()


def test_a_purge_holds_for_requests_before_it_touches_the_disk(server: LiveServer, own_root: Path) -> None:
    """Another process has the versions locked: nothing can be rewritten, and the documents are gone all the same."""
    with lock_versions(own_root, "law"):
        answer = server.http.post("/v1/datastores/law/purge", json={"documents": ["new-2"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "datastore_busy")
    assert "new-2" not in server.backend.registry.status("law").datastore.document_ids()
    assert post(server, "/purge", {"documents": ["new-2"]})["documents"] == ["new-2"]


def test_other_documents_of_a_purged_segment_can_still_be_read(server: LiveServer) -> None:
    learn(server, "a", "b")
    post(server, "/purge", {"documents": ["a"]})
    snapshot = server.backend.registry.status("law").datastore
    assert snapshot.document("b").text == f"b {FACT}"
    assert not snapshot.has_document("a")


def test_the_audit_log_says_who_asked(server: LiveServer, own_root: Path) -> None:
    learn(server, "a")
    forget(server, "a")
    lines = [json.loads(line) for line in (own_root / "law" / "audit.jsonl").read_text().splitlines()]
    assert [line["operation"] for line in lines] == ["add", "delete"]
    assert all(line["actor"].startswith("http 127.0.0.1 request ") for line in lines)


def test_a_damaged_version_is_not_compacted_and_goes_on_serving(server: LiveServer, own_root: Path) -> None:
    learn(server, "a")
    before = complete(server)
    (segment,) = (own_root / "law" / "tail").iterdir()
    shutil.rmtree(segment)
    answer = server.http.post("/v1/datastores/law/compact")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "datastore_corrupt")
    assert told(complete(server)) == told(before)


def test_versions_are_listed_verified_and_compared(server: LiveServer, own_root: Path) -> None:
    learn(server, "a")
    forget(server, "new-2")
    compacted = post(server, "/compact")["version"]
    listed = server.http.get("/v1/datastores/law/versions").json()["data"]
    assert {row["version"] for row in listed} == set(layout.published_versions(own_root, "law"))
    (row,) = (row for row in listed if row["serving"])
    assert (row["version"], row["current"], row["revision"]) == (compacted, True, 2)
    parent = row["parent_version"]

    verified = post(server, "/verify")
    assert {check["version"] for check in verified["versions"]} == {row["version"] for row in listed}
    assert all(check["canary_queries"] > 0 for check in verified["versions"])
    assert [check["version"] for check in post(server, "/verify", {"version": parent})["versions"]] == [parent]

    compared = server.http.get("/v1/datastores/law/diff", params={"a": parent, "b": compacted}).json()
    assert (compared["added"], compared["removed"], compared["changed"]) == (["a"], ["new-2"], [])
    assert compared["num_unchanged"] > 0

    damaged = own_root / "law" / parent / "shard-00000" / "keys.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    answer = server.http.post("/v1/datastores/law/verify")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "datastore_corrupt")
    assert "keys.arrow" in answer.json()["error"]["message"]
    for bad, status in (("..", 400), ("0" * 16, 404)):
        answer = server.http.get("/v1/datastores/law/diff", params={"a": parent, "b": bad})
        assert answer.status_code == status


def test_an_export_can_be_built_again(server: LiveServer, own_root: Path) -> None:
    learn(server, "a")
    forget(server, "new-2")
    answer = server.http.get("/v1/datastores/law/export")
    assert answer.headers["content-type"] == "application/x-ndjson"
    rows = [json.loads(line) for line in answer.text.splitlines()]
    snapshot = server.backend.registry.status("law").datastore
    assert [row["id"] for row in rows] == snapshot.document_ids()
    assert "a" in snapshot.document_ids()
    for row in rows:
        assert row["text"] == snapshot.document(row["id"]).text
    assert rows[-1] == {"id": "a", "text": f"a {FACT}", "licence": "CC0"}
