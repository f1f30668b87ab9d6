"""Keys that the running LM makes are compared with those stored before a version serves; too far apart, it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_stores import Published, Start

from knnlm_core import drift
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import MAX_DRIFT, MAX_TOKENS, Drift, measure_drift, require_small
from knnlm_core.errors import DatastoreMismatch, Overloaded
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.windows import WindowSizes
from knnlm_server.engine.learning import LearnRequest

Keys = list[NDArray[np.float32]]


class Encoder:
    """What the engine does for a load, and what it was asked for; ``change`` stands for other numerics."""

    def __init__(self, lm: HuggingFaceLM, change: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda k: k):
        self._lm, self._change = lm, change
        self.texts: list[NDArray[np.int32]] = []

    def __call__(self, texts: Sequence[NDArray[np.int32]], windows: WindowSizes) -> Keys:
        self.texts += texts
        request = LearnRequest("drift", texts, windows, lambda error: None)
        while not request.is_done:
            request.run(self._lm, 256)
        return [self._change(request.keys(i, self._lm.identity.key_dim)) for i in range(len(texts))]


@pytest.fixture
def snapshot(own_root: Path) -> Iterator[Snapshot]:
    with Datastore.open(own_root, "law") as datastore:
        living = LivingName(own_root, "law")
        yield living.snapshot(datastore)
        living.close()


def test_the_lm_that_built_a_version_has_hardly_drifted(snapshot: Snapshot, lm: HuggingFaceLM) -> None:
    """What is left is the rounding of stored keys to float16."""
    found = measure_drift(snapshot, lm.tokenizer, Encoder(lm))
    assert found is not None
    assert 0 < found.ratio < 1e-4
    assert found.keys == sum(MAX_TOKENS - 1 for _ in snapshot.document_ids())
    require_small("law", found)


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_drift_is_the_noise_of_keys_in_distances_to_a_neighbour(
    snapshot: Snapshot, lm: HuggingFaceLM, noise: float
) -> None:
    clean = measure_drift(snapshot, lm.tokenizer, Encoder(lm))
    assert clean is not None
    rng = np.random.default_rng(0)
    deviation = np.sqrt(noise * clean.nearest / snapshot.dim)
    noisy = Encoder(lm, lambda keys: (keys + rng.normal(0, deviation, keys.shape)).astype(np.float32))
    found = measure_drift(snapshot, lm.tokenizer, noisy)
    assert found is not None
    assert found.ratio == pytest.approx(noise, rel=0.1)
    assert found.nearest == clean.nearest


@pytest.mark.parametrize("ratio", [MAX_DRIFT * 1.01, float("nan"), float("inf")])
def test_too_much_drift_is_refused_with_ratio_and_limit(ratio: float) -> None:
    with pytest.raises(DatastoreMismatch, match=r"key_drift is (0\.101|nan|inf), .* needs 'at most 0\.1'") as caught:
        require_small("law", Drift(ratio, 1.0, 1.0, 100))
    assert caught.value.field == "key_drift"
    require_small("law", Drift(MAX_DRIFT, 1.0, 1.0, 100))


def test_deleted_documents_are_not_read(own_root: Path, lm: HuggingFaceLM) -> None:
    with Datastore.open(own_root, "law") as datastore:
        living = LivingName(own_root, "law")
        ids = living.snapshot(datastore).document_ids()
        living.delete(ids[1:])
        encoder = Encoder(lm)
        found = measure_drift(living.snapshot(datastore), lm.tokenizer, encoder)
        assert found is not None
        (text,) = encoder.texts
        assert lm.tokenizer.decode(text.tolist()) in datastore.document(ids[0]).text
        living.delete(ids[:1])
        assert measure_drift(living.snapshot(datastore), lm.tokenizer, encoder) is None
        living.close()


def test_of_a_version_without_canaries_nothing_is_said(
    snapshot: Snapshot, lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "canaries_of", lambda datastore: None)
    assert measure_drift(snapshot, lm.tokenizer, Encoder(lm)) is None


def test_a_text_that_is_cut_is_compared_up_to_the_cut(
    snapshot: Snapshot, lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "_CHARACTERS_PER_TOKEN", 1)
    encoder = Encoder(lm)
    found = measure_drift(snapshot, lm.tokenizer, encoder)
    assert found is not None
    assert found.ratio < 1e-4
    assert max(map(len, encoder.texts)) < MAX_TOKENS


def test_a_server_measures_and_says_it_at_the_start_and_at_a_swap(
    start_server: Start, own_root: Path, published: Published, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "knnlm_server"):
        server = start_server(datastores=own_root)
        cards = {card["name"]: card for card in server.http.get("/v1/datastores").json()["data"]}
        assert all(0 < card["key_drift"] < 1e-4 for card in cards.values())
        swapped = server.http.put("/v1/datastores/law", json={"version": published.law_old})
        assert swapped.json()["key_drift"] > 0
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("keys compared")]
    assert len(lines) == 3
    assert f"name=law version={published.law_old} drift=" in lines[-1]


def test_a_server_refuses_a_swap_to_a_version_whose_keys_have_drifted(
    start_server: Start, own_root: Path, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(datastores=own_root)
    monkeypatch.setattr(drift, "MAX_DRIFT", 1e-12)
    answer = server.http.put("/v1/datastores/law", json={"version": published.law_old})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "datastore_mismatch"
    assert "key_drift" in answer.json()["error"]["message"]
    assert server.http.get("/v1/datastores/law").json()["version"] == published.law_new


def test_a_server_starts_without_a_version_whose_keys_have_drifted(
    start_server: Start, own_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(drift, "MAX_DRIFT", 1e-12)
    server = start_server(datastores=own_root)
    assert server.http.get("/v1/datastores").json()["data"] == []
    assert "datastore skipped name=law code=datastore_mismatch" in caplog.text


def test_a_load_while_the_engine_takes_nothing_more_fails_as_any_request(
    start_server: Start, own_root: Path, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(datastores=own_root)

    def full(request: object) -> None:
        raise Overloaded("full")

    monkeypatch.setattr(server.backend.engine, "submit", full)
    answer = server.http.put("/v1/datastores/law", json={"version": published.law_old})
    assert answer.status_code == 503
    assert server.http.get("/v1/datastores/law").json()["version"] == published.law_new
