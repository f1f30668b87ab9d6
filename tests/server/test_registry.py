"""Loading, swapping and unloading datastores while they are in use."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from live_server import Brake, LiveServer, parse_events, wait_until
from small_stores import Published, Start

from knnlm_core.datastore import layout
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import (
    DatastoreBusy,
    DatastoreCorrupt,
    DatastoreMismatch,
    DatastoreNotFound,
    InvalidParameter,
    KnnlmError,
)
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_server.registry.registry import Lease, Registry


@pytest.fixture
def registry(published: Published, lm: HuggingFaceLM) -> Iterator[Registry]:
    registry = Registry(published.root, lm.identity)
    yield registry
    registry.close()


def is_open(datastore: Datastore) -> bool:
    with suppress(AssertionError):  # "used after close"
        return len(datastore.search(torch.zeros(1, datastore.dim), 1).entry_ids) == 1
    return False


def held_from(root: Path) -> list[str]:
    """What this process holds open or mapped under a folder."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split(maxsplit=5)[5] for line in maps if str(root) in line]
    opened = [file.path for file in psutil.Process().open_files() if file.path.startswith(str(root))]
    return sorted([*mapped, *opened])


# -- leases and swaps ------------------------------------------------------------------------------------------------


def test_a_lease_pins_its_version_through_a_swap(registry: Registry, published: Published) -> None:
    first = registry.load("law", published.law_old)
    assert (first.created, first.status.generation, first.status.leases) == (True, 1, 0)
    lease = registry.lease("law")
    assert lease.label == f"law:{published.law_old}:1.0"
    second = registry.load("law")
    assert (second.created, second.status.generation, second.status.leases) == (False, 2, 1)
    assert second.status.datastore.version == published.law_new
    assert lease.datastore.version == published.law_old
    assert is_open(lease.datastore)
    assert lease.datastore.document_ids()[0].startswith("old-")
    other = registry.lease("law")
    assert other.label == f"law:{published.law_new}:2.0"
    other.release()
    assert is_open(second.status.datastore)
    lease.release()
    assert not is_open(first.status.datastore)


def test_the_old_version_closes_when_its_last_lease_ends(registry: Registry, published: Published) -> None:
    old = registry.load("law", published.law_old).status.datastore
    leases = [registry.lease("law") for _ in range(3)]
    registry.load("law", published.law_new)
    for lease in leases:
        assert is_open(old)
        lease.release()
    assert not is_open(old)


def test_a_version_without_leases_closes_at_the_swap(registry: Registry, published: Published) -> None:
    old = registry.load("law", published.law_old).status.datastore
    registry.load("law", published.law_new)
    assert not is_open(old)


def test_releasing_twice_is_harmless(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    kept, lease = registry.lease("law"), registry.lease("law")
    for _ in range(3):
        lease.release()
    assert registry.status("law").leases == 1
    assert is_open(store)
    kept.release()
    assert registry.status("law").leases == 0


def test_fifty_swaps_under_leases_give_everything_back(own_root: Path, published: Published, lm: HuggingFaceLM) -> None:
    process, registry = psutil.Process(), Registry(own_root, lm.identity)
    versions = (published.law_old, published.law_new)
    for version in versions:  # what the first loads leave in caches is no leak
        registry.load("law", version)
    num_fds, held = process.num_fds(), held_from(own_root)
    assert held, "an open datastore should show"
    leases: list[Lease] = []
    for i in range(50):
        leases.append(registry.lease("law"))
        registry.load("law", versions[i % 2])
        if len(leases) == 3:
            leases.pop(0).release()
    assert len(held_from(own_root)) > len(held)
    for lease in leases:
        lease.release()
    assert registry.status("law").generation == 52
    assert held_from(own_root) == held
    assert process.num_fds() <= num_fds
    registry.close()
    assert held_from(own_root) == []


def test_generation_numbers_never_repeat(registry: Registry) -> None:
    numbers = []
    for _ in range(3):
        numbers += [registry.load("law").status.generation for _ in range(2)]
        registry.unload("law", timeout_s=1)
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert registry.load("news").status.generation == 1  # each name counts for itself


def test_leases_and_swaps_from_many_threads_add_up(registry: Registry, published: Published) -> None:
    registry.load("law", published.law_old)
    done = threading.Event()
    wrong: list[str] = []

    def use() -> None:
        while not done.is_set():
            lease = registry.lease("law")
            if not is_open(lease.datastore):
                wrong.append(lease.label)
            lease.release()

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        for i in range(20):
            registry.load("law", (published.law_new, published.law_old)[i % 2])
        done.set()
        for user in users:
            user.result()
    assert wrong == []
    assert registry.status("law").leases == 0
    assert len(registry._open) == 1


# -- loads that fail -------------------------------------------------------------------------------------------------


def damage(manifest: Path, change: dict[str, Any]) -> None:
    content = json.loads(manifest.read_text())
    del content["sha256"]
    content["lm"] |= change
    manifest.write_text(json.dumps(content))


def test_a_failed_load_leaves_the_old_version_serving(
    published: Published, lm: HuggingFaceLM, own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(own_root, lm.identity)
    old = registry.load("law", published.law_old).status
    new = own_root / "law" / published.law_new
    manifest = (new / layout.MANIFEST).read_text()
    held = held_from(own_root)

    def fails(kind: type[KnnlmError], version: str = published.law_new) -> None:
        with pytest.raises(kind):
            registry.load("law", version)
        assert registry.status("law") == old
        assert is_open(old.datastore)
        assert held_from(own_root) == held

    damage(new / layout.MANIFEST, {"tokenizer_fingerprint": "0" * 32})
    fails(DatastoreMismatch)
    (new / layout.MANIFEST).write_text("no JSON")
    fails(DatastoreCorrupt)
    (new / layout.MANIFEST).write_text(manifest)
    with monkeypatch.context() as patch:
        patch.setattr(Datastore, "prefetch", lambda self: (_ for _ in ()).throw(DatastoreCorrupt("unreadable")))
        fails(DatastoreCorrupt)
    (new / "shard-00001" / layout.VALUES).unlink()
    fails(DatastoreCorrupt)
    fails(DatastoreNotFound, "f" * 16)
    fails(InvalidParameter, "../" + published.law_new)
    assert registry.load("law", published.law_old).status.generation == 2
    registry.close()


@pytest.mark.parametrize("name", ["../law", "law/..", "/etc", "", ".", "..", "LAW", "law\0"])
def test_a_name_that_is_none_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidParameter):
        registry.load(name)
    with pytest.raises(DatastoreNotFound):
        registry.lease(name)


def test_what_is_not_loaded_is_not_found(registry: Registry) -> None:
    assert registry.published() == ["law", "news"]
    for ask in (registry.status, registry.lease, registry.load, lambda name: registry.unload(name, 0)):
        with pytest.raises(DatastoreNotFound, match="'absent'"):
            ask("absent")
    registry.load("news")
    with pytest.raises(DatastoreNotFound, match="'law' is not loaded; loaded: news"):
        registry.lease("law")


# -- unload ----------------------------------------------------------------------------------------------------------


def test_unload_waits_for_leases(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    lease = registry.lease("law")
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(registry.unload, "law", 30)
        wait_until(lambda: registry.status("law").state == "draining")
        with pytest.raises(DatastoreNotFound, match="being unloaded"):
            registry.lease("law")
        with pytest.raises(DatastoreBusy):
            registry.load("law")
        assert is_open(store)
        assert not unloading.done()
        lease.release()
        unloading.result(10)
    assert not is_open(store)
    assert registry.names() == []


def test_unload_waits_for_leases_of_replaced_versions_too(registry: Registry, published: Published) -> None:
    registry.load("law", published.law_old)
    lease = registry.lease("law")
    registry.load("law", published.law_new)
    with pytest.raises(DatastoreBusy, match="still has 1 leases"):
        registry.unload("law", timeout_s=0)
    lease.release()
    registry.unload("law", timeout_s=0)


def test_unload_that_times_out_serves_again(registry: Registry) -> None:
    store = registry.load("law").status.datastore
    lease = registry.lease("law")
    with pytest.raises(DatastoreBusy, match=r"still has 1 leases after 0\.05 s; it stays loaded"):
        registry.unload("law", timeout_s=0.05)
    assert registry.status("law").state == "ready"
    second = registry.lease("law")
    assert (second.generation, is_open(store)) == (1, True)
    for held in (lease, second):
        held.release()
    registry.unload("law", timeout_s=0.05)


def test_close_leaves_leased_versions_to_their_last_lease(registry: Registry) -> None:
    law, news = registry.load("law").status.datastore, registry.load("news").status.datastore
    lease = registry.lease("law")
    registry.close()
    assert (is_open(law), is_open(news), registry.names()) == (True, False, [])
    lease.release()
    assert not is_open(law)


# -- changes at the same time ----------------------------------------------------------------------------------------


def test_of_concurrent_changes_of_a_name_one_wins_and_others_are_busy(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go, prefetch = threading.Event(), threading.Event(), Datastore.prefetch

    def prefetch_later(self: Datastore) -> None:
        inside.set()
        assert go.wait(30)
        prefetch(self)

    registry.load("news")
    monkeypatch.setattr(Datastore, "prefetch", prefetch_later)
    with ThreadPoolExecutor(1) as pool:
        winner = pool.submit(registry.load, "law")
        assert inside.wait(10)
        for change in (registry.load, lambda name: registry.unload(name, 0)):
            with pytest.raises(DatastoreBusy, match="'law' is being changed"):
                change("law")
        registry.unload("news", 0)  # another name is free
        go.set()
        assert winner.result().status.generation == 1
    assert registry.load("law").status.generation == 2


# -- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def swapping_server(published: Published, start_server: Start, own_root: Path) -> LiveServer:
    """Serves the old version of `law`; the new one is published beside it."""
    set_current(own_root, "law", published.law_old, _calibration_of(own_root, published.law_old))
    return start_server(datastores=own_root, load=("law",))


def _calibration_of(root: Path, version: str) -> str:
    from knnlm_core.datastore.calibration import read_calibration

    ids = layout.calibration_ids(root, "law")
    return next(i for i in ids if read_calibration(root, "law", i).datastore_version == version)


def put(server: LiveServer, version: str) -> dict[str, Any]:
    response = server.http.put("/v1/datastores/law", json={"version": version})
    assert response.status_code == 200, response.text
    return response.json()


def documents(choice: dict[str, Any]) -> set[str]:
    """Which version's documents a traced choice retrieved from."""
    return {n["document_id"].split("-")[0] for entry in choice["knn"] for n in entry["neighbors"]}


KNN = {"k": 8, "temperature": 10.0, "lambda": 0.5, "trace": True}
BODY = {"model": "tiny-lm@law", "prompt": "The tenant", "temperature": 0, "max_tokens": 12, "knn": KNN}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_across_a_swap_answers_wholly_from_its_own_version(
    swapping_server: LiveServer, published: Published, stream: bool
) -> None:
    server = swapping_server
    undisturbed = server.post("/v1/completions", BODY).json()
    (store,) = (status.datastore for status in server.backend.registry.statuses())
    assert documents(undisturbed["choices"][0]) == {"old"}
    with Brake(server.lm, allowed=4) as brake, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", {**BODY, "stream": stream})
        brake.wait_held()
        swapped = put(server, published.law_new)
        assert (swapped["version"], swapped["generation"], swapped["leases"]) == (published.law_new, 2, 1)
        assert is_open(store)
        brake.release()
        response = running.result()
    assert response.status_code == 200, response.text
    if stream:
        chunks = parse_events(response.text)
        assert {chunk["system_fingerprint"] for chunk in chunks} == {undisturbed["system_fingerprint"]}
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        trace = [entry for chunk in chunks for entry in chunk["choices"][0]["knn"]]
    else:
        assert response.json()["system_fingerprint"] == undisturbed["system_fingerprint"]
        text, trace = response.json()["choices"][0]["text"], response.json()["choices"][0]["knn"]
    assert text == undisturbed["choices"][0]["text"]
    assert documents({"knn": trace}) == {"old"}
    assert len(trace) == 12
    wait_until(lambda: not is_open(store), within_s=5)

    after = server.post("/v1/completions", BODY).json()
    assert f"law:{published.law_new}:2.0" in after["system_fingerprint"]
    assert documents(after["choices"][0]) == {"new"}
    assert put(server, published.law_old)["generation"] == 3
    assert server.post("/v1/completions", BODY).json()["choices"] == undisturbed["choices"]


def test_requests_under_steady_swaps_never_mix_versions(swapping_server: LiveServer, published: Published) -> None:
    server = swapping_server
    versions = (published.law_old, published.law_new)
    expected = {}
    for version in versions:
        put(server, version)
        expected[version] = server.post("/v1/completions", BODY).json()["choices"]
    assert expected[published.law_old] != expected[published.law_new]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, "/v1/completions", BODY) for _ in range(24)]
        generations = [put(server, versions[i % 2])["generation"] for i in range(8)]
        assert generations == sorted(set(generations))
        for future in answers:
            answer = future.result().json()
            version = answer["system_fingerprint"].split(":")[1]
            have, need = answer["choices"][0], expected[version][0]
            assert have["text"] == need["text"]
            assert documents(have) == documents(need) == {"old" if version == published.law_old else "new"}
    wait_until(server.is_idle, within_s=5)


def test_scores_across_a_swap_come_from_their_own_version(swapping_server: LiveServer, published: Published) -> None:
    server = swapping_server
    body = {"model": "tiny-lm@law", "input": ["The tenant must keep every key."] * 3, "knn": {**KNN, "trace": False}}
    undisturbed = server.post("/v1/score", body).json()
    held, go, encode = threading.Event(), threading.Event(), server.lm.encode

    def encode_later(*args: Any) -> Any:
        held.set()
        assert go.wait(30)
        return encode(*args)

    server.lm.encode = encode_later  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/score", body)
        assert held.wait(10)
        put(server, published.law_new)
        go.set()
        assert running.result().json() == undisturbed
    del server.lm.encode
    assert server.post("/v1/score", body).json()["total"] != undisturbed["total"]


def test_delete_drains_and_a_later_load_has_a_new_generation(swapping_server: LiveServer, published: Published) -> None:
    server = swapping_server
    with Brake(server.lm, allowed=2) as brake, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, "/v1/completions", BODY)
        brake.wait_held()
        deleting = pool.submit(server.http.delete, "/v1/datastores/law")
        wait_until(lambda: server.http.get("/v1/datastores/law").json()["state"] == "draining")
        refused = server.post("/v1/completions", BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "datastore_not_found")
        busy = server.http.put("/v1/datastores/law", json={})
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "datastore_busy")
        brake.release()
        assert running.result().status_code == 200
        assert deleting.result().json() == {"object": "datastore", "name": "law", "state": "unloaded"}
    assert server.http.get("/v1/datastores").json()["published"] == ["law", "news"]
    assert server.http.get("/v1/datastores/law").status_code == 404
    loaded = server.http.put("/v1/datastores/law")
    assert (loaded.status_code, loaded.json()["generation"]) == (201, 2)
    assert [card["id"] for card in server.http.get("/v1/models").json()["data"]] == ["tiny-lm", "tiny-lm@law"]


def test_delete_that_takes_too_long_is_busy_and_serves_again(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, load=("law",), drain_timeout_s=0.1)
    with Brake(server.lm, allowed=2) as brake, ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", BODY)
        brake.wait_held()
        response = server.http.delete("/v1/datastores/law")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "datastore_busy")
        assert server.http.get("/v1/datastores/law").json()["state"] == "ready"
        brake.release()
        assert running.result().status_code == 200
    assert server.post("/v1/completions", BODY).status_code == 200
    wait_until(server.is_idle)
