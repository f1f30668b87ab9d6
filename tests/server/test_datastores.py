"""`/v1/datastores`: loading, swapping, rolling back and unloading while requests run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import Brake, LiveServer, parse_events, wait_until
from small_stores import Published, Start
from test_metrics import read

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.publish import set_current
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import Drift


def is_open(datastore: Snapshot) -> bool:
    with suppress(AssertionError):  # "used after close"
        return len(datastore.search(torch.zeros(1, datastore.dim), 1).entry_ids) == 1
    return False


# -- swaps while requests run ------------------------------------------------------------------------------------------


@pytest.fixture
def swapping_server(published: Published, start_server: Start, own_root: Path) -> LiveServer:
    """Serves the old version of `law`; the new one is published beside it."""
    set_current(own_root, "law", published.law_old, _calibration_of(own_root, published.law_old))
    server = start_server(datastores=own_root, load=("law",))
    # A version's first load waits for the engine, to compare keys; tests hold the engine while they swap.
    manifest = Manifest.read(layout.version_folder(own_root, "law", published.law_new) / layout.MANIFEST)
    server.backend.registry._swaps._drifts[manifest.digest] = Drift(0.0, 0.0, 1.0, 100)
    return server


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


# -- rolling back ------------------------------------------------------------------------------------------------------


def test_a_rollback_goes_to_the_version_before_and_stays_there(
    swapping_server: LiveServer, published: Published
) -> None:
    server = swapping_server
    before = server.post("/v1/completions", BODY).json()["choices"]
    refused = server.http.post("/v1/datastores/law/rollback")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "datastore_conflict")
    assert f"no version but {published.law_old} has served" in refused.json()["error"]["message"]
    card = put(server, published.law_new)
    assert (card["previous"], card["follows_current"]) == (published.law_old, False)
    rolled = server.http.post("/v1/datastores/law/rollback").json()
    assert (rolled["version"], rolled["generation"], rolled["previous"]) == (
        published.law_old,
        3,
        published.law_new,
    )
    assert server.post("/v1/completions", BODY).json()["choices"] == before
    absent = server.http.post("/v1/datastores/absent/rollback")
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "datastore_not_found")


# -- aliases and default -----------------------------------------------------------------------------------------------


def test_an_alias_stands_in_models_bodies_and_routes(swapping_server: LiveServer, published: Published) -> None:
    server = swapping_server
    undisturbed = server.post("/v1/completions", BODY).json()
    card = server.http.put(
        "/v1/datastores/law", json={"version": published.law_old, "aliases": ["statutes", "acts"]}
    ).json()
    assert card["aliases"] == ["acts", "statutes"]
    for body in ({"model": "tiny-lm@statutes"}, {"model": "tiny-lm", "knn": {**KNN, "datastore": "acts"}}):
        answer = server.post("/v1/completions", {**BODY, **body}).json()
        assert answer["choices"] == undisturbed["choices"]
        assert f"-law:{published.law_old}:2.0" in answer["system_fingerprint"]
    agreeing = {**BODY, "model": "tiny-lm@statutes", "knn": {**KNN, "datastore": "law"}}
    assert server.post("/v1/completions", agreeing).status_code == 200
    assert server.http.get("/v1/datastores/statutes").json() == server.http.get("/v1/datastores/law").json()
    models = {card["id"]: card["datastore"] for card in server.http.get("/v1/models").json()["data"]}
    assert models == {"tiny-lm": None, "tiny-lm@acts": "law", "tiny-lm@law": "law", "tiny-lm@statutes": "law"}
    assert server.http.get("/v1/models/tiny-lm@acts").json()["id"] == "tiny-lm@acts"
    assert server.http.put("/v1/datastores/acts").json()["generation"] == 3
    assert server.http.delete("/v1/datastores/acts").json() == {
        "object": "datastore",
        "name": "law",
        "state": "unloaded",
    }
    refused = server.post("/v1/completions", {**BODY, "model": "tiny-lm@statutes"})
    assert refused.status_code == 404
    assert "'law', which 'statutes' means, is not loaded" in refused.json()["error"]["message"]
    assert server.http.get("/v1/datastores").json()["aliases"] == {"acts": "law", "statutes": "law"}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"aliases": ["news"]}, 409, "aliases"),
        ({"aliases": ["Law"]}, 400, "aliases"),
        ({"aliases": [""]}, 400, "aliases.0"),
        ({"aliases": "statutes"}, 400, "aliases"),
        ({"aliases": [f"a{i}" for i in range(33)]}, 400, "aliases"),
        ({"default": "yes"}, 400, "default"),
        ({"stream": 1}, 400, "stream"),
    ],
    ids=str,
)
def test_a_bad_label_is_refused_and_nothing_is_loaded(
    live_server: LiveServer, body: dict[str, Any], status: int, param: str
) -> None:
    before = live_server.http.get("/v1/datastores").json()
    response = live_server.http.put("/v1/datastores/law", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert live_server.http.get("/v1/datastores").json() == before


def test_the_default_is_what_requests_use_that_name_none(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root, alias=("today=news",), default_datastore="today")

    def used() -> str:
        return server.post("/v1/completions", {**BODY, "model": "tiny-lm"}).json()["model"]

    assert (used(), server.http.get("/v1/datastores").json()["default"]) == ("tiny-lm@news", "news")
    server.http.put("/v1/datastores/law", json={"default": True})
    assert used() == "tiny-lm@law"
    server.http.put("/v1/datastores/news", json={"aliases": ["today"], "default": False})
    assert used() == "tiny-lm@law"
    server.http.delete("/v1/datastores/law")
    refused = server.post("/v1/completions", {**BODY, "model": "tiny-lm"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "datastore_not_found")  # no silent downgrade
    server.http.put("/v1/datastores/law", json={"default": False})
    plain = server.post("/v1/completions", {"model": "tiny-lm", "prompt": "x", "max_tokens": 1}).json()
    assert (plain["model"], server.http.get("/v1/datastores").json()["default"]) == ("tiny-lm", None)


# -- budget ------------------------------------------------------------------------------------------------------------


def test_a_load_beyond_the_budget_is_a_conflict_with_its_figures(
    start_server: Start, own_root: Path, published: Published
) -> None:
    size = sum(file.stat().st_size for file in (own_root / "law" / published.law_new).rglob("*") if file.is_file())
    server = start_server(datastores=own_root, load=("law",), datastore_bytes=int(1.5 * size))
    listed = server.http.get("/v1/datastores").json()
    assert (listed["bytes_used"], listed["bytes_limit"]) == (listed["data"][0]["bytes"], int(1.5 * size))
    refused = server.http.put("/v1/datastores/law")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "datastore_budget")
    needed = listed["bytes_used"]
    assert (
        f"needs {needed} bytes, but of `datastore_bytes` = {int(1.5 * size)} bytes {needed} are used"
        in refused.json()["error"]["message"]
    )
    assert server.http.get("/v1/datastores").json() == listed
    assert server.post("/v1/completions", BODY).status_code == 200


# -- progress as events ------------------------------------------------------------------------------------------------


def stream_put(server: LiveServer, name: str = "law", **body: Any) -> list[dict[str, Any]]:
    response = server.http.put(f"/v1/datastores/{name}", json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return parse_events(response.text)


def test_a_streamed_load_tells_its_progress_and_ends_with_the_card(
    swapping_server: LiveServer, published: Published
) -> None:
    *progress, card = stream_put(swapping_server, version=published.law_new)
    assert card == swapping_server.http.get("/v1/datastores/law").json()
    assert (card["object"], card["version"]) == ("datastore", published.law_new)
    assert {event["object"] for event in progress} == {"datastore.progress"}
    assert list(dict.fromkeys(event["stage"] for event in progress)) == ["open", "verify", "warm", "test", "swap"]
    assert all(0 <= event["done"] <= event["total"] for event in progress)
    assert {event["stage"] for event in progress if event["done"] == event["total"]} >= {"open", "verify", "swap"}
    stages = [event["stage"] for event in stream_put(swapping_server, version=published.law_new)[:-1]]
    assert "verify" not in stages  # this machine has read that version in full


def test_a_streamed_load_that_fails_ends_with_the_error(swapping_server: LiveServer) -> None:
    (event,) = [event for event in stream_put(swapping_server, "absent") if "error" in event]
    assert event["error"]["code"] == "datastore_not_found"
    *_, last = stream_put(swapping_server, version="f" * 16)
    assert last["error"]["code"] == "datastore_not_found"
    early = swapping_server.http.put("/v1/datastores/Law", json={"stream": True})
    assert (early.status_code, early.json()["error"]["param"]) == (400, "name")


def test_a_load_goes_on_when_its_listener_leaves(swapping_server: LiveServer, published: Published) -> None:
    server = swapping_server
    inside, go = threading.Event(), threading.Event()
    loader = server.backend.registry._swaps._loader
    examine = loader._examine

    def examine_later(*args: Any) -> Any:
        inside.set()
        assert go.wait(30)
        return examine(*args)

    loader._examine = examine_later  # type: ignore[method-assign]
    body = {"stream": True, "version": published.law_new}
    with httpx.Client(base_url=server.url, trust_env=False) as other:
        request = other.build_request("PUT", "/v1/datastores/law", json=body)
        response = other.send(request, stream=True)
        next(response.iter_lines())
        assert inside.wait(10)
        busy = server.http.put("/v1/datastores/law")
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "datastore_busy")
        assert server.post("/v1/completions", BODY).status_code == 200  # the old version serves meanwhile
        response.close()
    go.set()
    wait_until(lambda: server.http.get("/v1/datastores/law").json()["version"] == published.law_new)


# -- what the cards say ------------------------------------------------------------------------------------------------


def test_a_card_says_where_a_name_stands(live_server: LiveServer) -> None:
    card = live_server.http.get("/v1/datastores/law").json()
    assert (card["revision"], card["learned_documents"], card["deleted_documents"]) == (0, 0, 0)
    assert (card["aliases"], card["follows_current"], card["previous"]) == ([], True, None)
    assert card["self_test"]["queries"] >= 8
    assert card["self_test"]["recall_at_32"] >= card["self_test"]["needed"] > 0.9
    listed = live_server.http.get("/v1/datastores").json()
    assert (listed["aliases"], listed["default"], listed["persistent"]) == ({}, None, True)
    assert listed["bytes_used"] == sum(card["bytes"] for card in listed["data"])
    assert listed["bytes_limit"] is None


def test_metrics_count_loads_swaps_and_refusals(swapping_server: LiveServer, published: Published) -> None:
    server = swapping_server

    def figures() -> dict[str, float]:
        return read(server)

    assert figures()["knnlm_datastore_swaps_total{datastore=law}"] == 0
    put(server, published.law_new)
    put(server, published.law_old)
    assert server.http.put("/v1/datastores/law", json={"version": "f" * 16}).status_code == 404
    after = figures()
    assert after["knnlm_datastore_swaps_total{datastore=law}"] == 2
    assert after["knnlm_datastore_load_seconds_count{datastore=law}"] == 3
    assert after["knnlm_datastore_refused_loads_total{code=datastore_not_found}{datastore=law}"] == 1
    assert after["knnlm_datastore_generation{datastore=law}"] == 3
    assert after["knnlm_datastore_revision{datastore=law}"] == 0
    assert after["knnlm_datastore_learned_documents{datastore=law}"] == 0
    assert after["knnlm_datastore_deleted_documents{datastore=law}"] == 0
    assert after["knnlm_datastores_used_bytes"] == server.http.get("/v1/datastores").json()["bytes_used"]


def test_a_share_of_searches_is_repeated_exactly(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root, load=("law",), shadow_exact=1.0)
    plain = start_server(datastores=own_root, load=("law",))
    answers = [each.post("/v1/completions", BODY).json()["choices"] for each in (server, plain)]
    assert answers[0] == answers[1]
    wait_until(lambda: read(server)["knnlm_shadow_recall_count"] == 12)
    assert read(server)["knnlm_shadow_recall_sum"] == 12  # the index here looks at every entry
    assert read(plain)["knnlm_shadow_recall_count"] == 0
    wait_until(server.is_idle)
    assert server.http.delete("/v1/datastores/law").status_code == 200


# -- starting again ----------------------------------------------------------------------------------------------------


def test_a_restarted_server_serves_what_it_served(start_server: Start, own_root: Path, published: Published) -> None:
    state = own_root / "serving.json"

    def start(**settings: Any) -> LiveServer:
        return start_server(datastores=own_root, state=state, **settings)

    with_labels = {"version": published.law_old, "aliases": ["statutes"], "default": True}
    first = start()
    first.http.put("/v1/datastores/law", json=with_labels)
    first.http.delete("/v1/datastores/news")
    before = first.http.get("/v1/datastores").json()
    first.__exit__(None, None, None)

    second = start()
    after = second.http.get("/v1/datastores").json()
    (old,), (new,) = before.pop("data"), after.pop("data")
    assert after == before
    assert (old.pop("generation"), new.pop("generation")) == (2, 3)
    assert old.pop("self_test") is not None
    assert new.pop("self_test") is not None
    assert new == old
    second.__exit__(None, None, None)

    third = start(load=("news",))
    assert [card["name"] for card in third.http.get("/v1/datastores").json()["data"]] == ["news"]


def test_a_state_that_is_damaged_ends_the_start(start_server: Start, own_root: Path) -> None:
    state = own_root / "serving.json"
    state.write_text("{")
    server = start_server(datastores=own_root, state=state, wait=False)
    wait_until(lambda: bool(server.failures))
    assert "serving.json is not a server's state" in (server.service.failure or "")
    assert state.read_text() == "{"


def test_a_server_that_cannot_remember_says_so(start_server: Start, own_root: Path) -> None:
    server = start_server(datastores=own_root, state=own_root / "absent" / "serving.json")
    assert server.http.get("/v1/datastores").json()["persistent"] is False


# -- watching ----------------------------------------------------------------------------------------------------------


def test_a_watching_server_follows_what_is_published(start_server: Start, own_root: Path, published: Published) -> None:
    set_current(own_root, "law", published.law_old, _calibration_of(own_root, published.law_old))
    server = start_server(datastores=own_root, load=("law",), watch=0.05)
    assert server.http.get("/v1/datastores/law").json()["version"] == published.law_old
    set_current(own_root, "law", published.law_new, _calibration_of(own_root, published.law_new))
    wait_until(lambda: server.http.get("/v1/datastores/law").json()["version"] == published.law_new)
    card = server.http.get("/v1/datastores/law").json()
    assert (card["generation"], card["previous"], card["follows_current"]) == (2, published.law_old, True)
    assert documents(server.post("/v1/completions", BODY).json()["choices"][0]) == {"new"}
