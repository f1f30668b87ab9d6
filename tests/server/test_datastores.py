"""`/v1/datastores`: loading, swapping, rolling back and unloading while requests run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import Brake, LiveServer, parse_events, wait_until
from small_stores import Published, Start

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.snapshot import Snapshot


def is_open(datastore: Snapshot) -> bool:
    with suppress(AssertionError):  # "used after close"
        return len(datastore.search(torch.zeros(1, datastore.dim), 1).entry_ids) == 1
    return False


# -- swaps while requests run --------------------------------------------------------------------------------------------


@pytest.fixture
def swapping_server(published: Published, start_server: Start, own_root: Path) -> LiveServer:
    """Serves the old version of `law`; the new one is published beside it."""
    set_current(own_root, "law", published.law_old, _calibration_of(own_root, published.law_old))
    return start_server(datastores=own_root, load=("law",))


def _calibration_of(root: Path, version: str) -> str:
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
