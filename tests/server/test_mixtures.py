"""Several datastores in one request, over HTTP: two real stores against float64 recomputations, and what it leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from exact_reference import ExactReference, Floats, Knn, stored
from live_server import Brake, LiveServer, before_each_pass, wait_until
from small_stores import Published, Start

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreCorrupt, Overloaded
from knnlm_core.knn.fusion import Fusion
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.api.schemas.chat_answers import ChatCompletion
from knnlm_server.api.schemas.completions import Completion
from knnlm_server.api.schemas.neighbors import NeighborsAnswer
from knnlm_server.api.schemas.score import Score
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.prompt_weights import prompt_weights

PROMPT = "3. new: The court may refuse the goods. A buyer"
NEAR_TIE = 1e-3
SETTINGS = {"k": 8, "temperature": 12.0, "lambda": 0.6}
BOTH = [{"name": "law", "weight": 3}, {"name": "news", "weight": 1}]
TWO = {"datastore": [{"name": "law"}, {"name": "news"}]}
SOON_S = 5.0


class Mixed(NamedTuple):
    """The next token after some context, from two stores, in float64."""

    p: Floats  # (V,)
    p_knn: list[Floats]  # of each store
    weights: list[float]  # what each one counts for, where Σ w λ p_knn is mixed in
    margin: float  # 0 would be a tie


class Pair:
    """Both stores, and the slow reference over them."""

    def __init__(self, stores: Sequence[Datastore], reference: ExactReference) -> None:
        self.stores, self.reference = stores, reference

    def mixed(self, context: list[int], knn: Knn, weights: Sequence[float], fusion: Fusion) -> Mixed:
        last = self.reference.run(context)
        p_lm, key = np.exp(last.log_probs[-1]), last.keys[-1]
        found = [self.reference.knn_probs(store, key, knn, len(p_lm)) for store in self.stores]
        if fusion is Fusion.NEIGHBORS:
            masses = [self._mass(store, key, knn) for store in self.stores]
            largest = max(masses)
            weights = [np.exp(mass - largest) for mass in masses]
        weights = [weight / sum(weights) for weight in weights]
        p_knn = sum(weight * p for weight, (p, _) in zip(weights, found, strict=True))
        p = (1 - knn.lmbda) * p_lm + knn.lmbda * p_knn
        return Mixed(p, [p for p, _ in found], list(weights), min(margin for _, margin in found))

    @staticmethod
    def _mass(store: Datastore, key: Floats, knn: Knn) -> float:
        """log Σ exp(−d / τ) of the nearest."""
        keys = stored(store)[0]
        nearest = np.sort(((keys - key) ** 2).sum(axis=1))[: knn.k]
        return float(-nearest[0] / knn.temperature + np.log(np.exp(-(nearest - nearest[0]) / knn.temperature).sum()))


@pytest.fixture(scope="session")
def pair(law: Datastore, news: Datastore, reference: ExactReference) -> Pair:
    return Pair((law, news), reference)


def knn(**fields: Any) -> dict[str, Any]:
    return {"datastore": BOTH, **SETTINGS, "trace": True, **fields}


def complete(server: LiveServer, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.content)
    return response.json()


# -- completions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", Fusion)
def test_a_mixture_of_two_stores_equals_a_float64_recomputation(
    live_server: LiveServer, pair: Pair, lm: HuggingFaceLM, fusion: Fusion
) -> None:
    given = knn(
        mixture=fusion, datastore=BOTH if fusion is Fusion.DISTRIBUTIONS else [{"name": "law"}, {"name": "news"}]
    )
    (choice,) = complete(live_server, knn=given, max_tokens=16, logprobs=0, seed=3, temperature=1)["choices"]
    context = lm.tokenizer.encode(PROMPT)
    compared = 0
    settings = Knn(SETTINGS["k"], SETTINGS["temperature"], SETTINGS["lambda"])
    for entry, log_prob in zip(choice["knn"], choice["logprobs"]["token_logprobs"], strict=True):
        need, token = pair.mixed(context, settings, (3, 1), fusion), entry["token_id"]
        context = [*context, token]
        if need.margin < NEAR_TIE:
            continue
        compared += 1
        assert np.exp(log_prob) == pytest.approx(need.p[token], abs=1e-4)
        assert entry["lambda"] == SETTINGS["lambda"]
        assert [store["name"] for store in entry["datastores"]] == ["law", "news"]
        assert [store["weight"] for store in entry["datastores"]] == pytest.approx(need.weights, abs=1e-3)
        assert [store["lambda"] for store in entry["datastores"]] == [SETTINGS["lambda"]] * 2
        assert [store["p_knn"] for store in entry["datastores"]] == pytest.approx(
            [p[token] for p in need.p_knn], abs=1e-3
        )
        assert {near["datastore"] for near in entry["neighbors"]} <= {"law", "news"}
        for near in entry["neighbors"]:
            (place,) = pair.stores[("law", "news").index(near["datastore"])].locate([near["entry_id"]])
            assert place is not None
            assert (place.document_id, place.char_start) == (near["document_id"], near["char_start"])
    assert compared >= 12


def test_each_store_keeps_its_own_calibration(live_server: LiveServer, law: Datastore, news: Datastore) -> None:
    (choice,) = complete(live_server, knn={"datastore": BOTH, "trace": True}, max_tokens=2)["choices"]
    calibrations = [store.calibration for store in (law, news)]
    for entry in choice["knn"]:
        assert [s["lambda"] for s in entry["datastores"]] == [c.lmbda for c in calibrations if c is not None]
        assert [s["weight"] for s in entry["datastores"]] == [0.75, 0.25]


def test_an_answer_names_every_store(live_server: LiveServer, published: Published) -> None:
    answer = complete(live_server, knn=knn(), max_tokens=2)
    assert answer["model"] == "tiny-lm@law+news"
    fingerprint = live_server.lm.identity.model_fingerprint
    labels = f"law:{published.law_new}:1.0+news:{published.news}:1.0"
    assert answer["system_fingerprint"] == f"{fingerprint}-{labels}"
    assert answer["usage"]["knn"]["searched"] == 2
    single = complete(live_server, knn={"datastore": [{"name": "law"}]}, max_tokens=2)
    assert single["model"] == "tiny-lm@law"
    assert single["system_fingerprint"] == f"{fingerprint}-law:{published.law_new}:1.0"


def test_one_store_in_a_list_is_that_store(live_server: LiveServer) -> None:
    need = complete(live_server, knn={**SETTINGS, "datastore": "law", "trace": True}, max_tokens=6)["choices"]
    for fields in (
        {"datastore": [{"name": "law"}]},
        {"datastore": [{"name": "law", "weight": 0.2}], "mixture": "distributions", "weights": "given"},
        {"datastore": [{"name": "law"}], "mixture": "neighbors"},
        {"datastore": [{"name": "law"}], "weights": "prompt"},
    ):
        assert complete(live_server, knn={**SETTINGS, "trace": True, **fields}, max_tokens=6)["choices"] == need


def test_the_model_of_an_answer_can_be_asked_for(live_server: LiveServer) -> None:
    stores = TWO["datastore"]
    need = complete(live_server, knn={"datastore": stores}, max_tokens=6)
    for fields in (
        {"model": need["model"]},
        {"model": need["model"], "knn": {"datastore": stores}},
        {"model": "tiny-lm@news+law", "knn": {"datastore": stores}},
    ):
        have = complete(live_server, max_tokens=6, **fields)
        assert (have["choices"], have["model"]) == (need["choices"], need["model"])
    assert live_server.post("/tokenize", {"prompt": "x", "model": need["model"]}).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"weights": "prompt", "datastore": [{"name": "law"}, {"name": "news"}]}])
def test_what_streams_is_what_comes_whole(live_server: LiveServer, fields: dict[str, Any]) -> None:
    body = {"knn": knn(**fields), "max_tokens": 8, "logprobs": 1, "n": 2, "seed": 5, "temperature": 1}
    whole = complete(live_server, **body)
    chunks = live_server.stream(PROMPT, ignore_eos=True, **body)
    for choice in whole["choices"]:
        pieces = [p for chunk in chunks for p in chunk["choices"] if p["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [entry for piece in pieces for entry in piece["knn"]] == choice["knn"]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {whole["system_fingerprint"]}


# -- weights by the prompt ---------------------------------------------------------------------------------------------


def test_the_prompt_decides_the_weights_of_each_of_several_prompts(
    live_server: LiveServer, lm: HuggingFaceLM, law: Datastore, news: Datastore
) -> None:
    texts = [law.document("new-1").text[:80], news.document("news-1").text[:80], "x"]
    stores = TWO["datastore"]
    answer = complete(live_server, prompt=texts, knn=knn(datastore=stores, weights="prompt"), max_tokens=3)
    sources = [Source(store, SETTINGS["k"], SETTINGS["temperature"], 0.6, weight=0.5) for store in (law, news)]
    for text, choice in zip(texts, answer["choices"], strict=True):
        need = prompt_weights(lm, lm.tokenizer.encode(text), Retrieval(tuple(sources)))
        for entry in choice["knn"]:
            have = [store["weight"] for store in entry["datastores"]]
            assert have == pytest.approx(need, abs=1e-5)
            assert sum(have) == pytest.approx(1, abs=1e-12)

    def weights(answer: dict[str, Any]) -> list[list[float]]:
        return [[store["weight"] for store in choice["knn"][0]["datastores"]] for choice in answer["choices"]]

    first, second, third = weights(answer)
    assert first[0] > 0.6 > 0.4 > second[0]
    assert third == [0.5, 0.5]
    again = complete(live_server, prompt=texts, knn=knn(datastore=stores, weights="prompt"), max_tokens=3)
    assert weights(again) == weights(answer)


def test_a_conversation_is_mixed_and_weighed_too(chat_server: LiveServer) -> None:
    stores = TWO["datastore"]
    body = {"messages": [{"role": "user", "content": "May the tenant refuse the goods?"}], "max_tokens": 4, "seed": 3}
    weights = {}
    for mode in ("given", "prompt"):
        given = {**body, "knn": knn(datastore=stores, weights=mode)}
        response = chat_server.post("/v1/chat/completions", given)
        assert response.status_code == 200, response.text
        ChatCompletion.model_validate_json(response.content)
        answer = response.json()
        assert answer["model"].endswith("@law+news")
        weights[mode] = [store["weight"] for store in answer["choices"][0]["knn"][0]["datastores"]]
    assert weights["given"] == [0.5, 0.5]
    assert weights["prompt"] != weights["given"]
    assert sum(weights["prompt"]) == pytest.approx(1)


# -- scores and neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", Fusion)
def test_scores_of_a_mixture_equal_a_float64_recomputation(
    live_server: LiveServer, pair: Pair, lm: HuggingFaceLM, fusion: Fusion
) -> None:
    stores = TWO["datastore"]
    body = {"input": [PROMPT, "A buyer must keep"], "per_token": True, "knn": {"datastore": stores, **SETTINGS}}
    body["knn"]["mixture"] = fusion
    response = live_server.post("/v1/score", body)
    assert response.status_code == 200, response.text
    Score.model_validate_json(response.content)
    compared = 0
    for text, result in zip(body["input"], response.json()["results"], strict=True):
        ids = lm.tokenizer.encode(text)
        assert result["searched"] == result["tokens"] == len(ids) - 1
        for position, entry in enumerate(result["per_token"], start=1):
            need = pair.mixed(ids[:position], Knn(8, 12.0, 0.6), (1, 1), fusion)
            assert entry["lambda"] == 0.6
            if need.margin > NEAR_TIE:
                compared += 1
                assert np.exp(entry["mixed"]) == pytest.approx(need.p[ids[position]], abs=1e-4)
    assert compared > 20


def test_a_score_of_several_stores_has_no_overlap_and_no_documents(live_server: LiveServer) -> None:
    two = {"model": "tiny-lm@law+news"}
    for fields, param in (
        ({"input": ["x"], "overlap": True}, "overlap"),
        ({"input": [{"document_id": "new-1"}]}, "input"),
        ({"input": ["x"], "knn": {"weights": "prompt"}}, "knn.weights"),
    ):
        response = live_server.post("/v1/score", {**two, **fields})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
    assert "exactly one datastore" in live_server.post("/v1/score", {**two, "input": ["x"], "overlap": True}).text


def test_a_document_is_excluded_wherever_it_is(live_server: LiveServer, law: Datastore, news: Datastore) -> None:
    text = law.document("new-1").text[:100]
    body = {"model": "tiny-lm@law+news", "knn": {**SETTINGS, "k": 1}}

    def mixed(*excluded: str) -> float:
        return live_server.score([text], exclude_documents=excluded, **body)["total"]["mixed"]["nll"]

    free, without = mixed(), mixed("new-1")
    assert without > free + 1
    assert mixed("news-1") != free
    everything = mixed(*law.document_ids(), *news.document_ids())
    assert everything == live_server.score([text])["total"]["base"]["nll"]
    response = live_server.post("/v1/score", {**body, "input": [text], "exclude_documents": ["new-1", "absent"]})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "document_not_found"


@pytest.mark.parametrize("fusion", Fusion)
def test_neighbours_of_several_stores_come_in_one_list(
    live_server: LiveServer, pair: Pair, lm: HuggingFaceLM, fusion: Fusion
) -> None:
    stores = TWO["datastore"]
    body = {"input": PROMPT, "limit": 100, "knn": {"datastore": stores, **SETTINGS, "mixture": fusion}}
    response = live_server.post("/v1/neighbors", body)
    assert response.status_code == 200, response.text
    NeighborsAnswer.model_validate_json(response.content)
    (result,) = response.json()["results"]
    near = result["neighbors"]
    assert [sum(n["datastore"] == name for n in near) for name in ("law", "news")] == [SETTINGS["k"]] * 2
    assert sum(n["weight"] for n in near) == pytest.approx(1, abs=1e-5)
    order = [-n["weight"] if fusion is Fusion.DISTRIBUTIONS else n["distance"] for n in near]
    assert order == sorted(order)
    for n in near:
        document = pair.stores[("law", "news").index(n["datastore"])].document(n["document_id"])
        assert document.text[n["char_start"] : n["char_end"]] == n["text"]
    need = pair.mixed(lm.tokenizer.encode(PROMPT), Knn(8, 12.0, 0.6), (1, 1), fusion)
    assert need.margin > NEAR_TIE
    for token in result["next_tokens"]:
        assert token["p"] == pytest.approx(need.p[token["token_id"]], abs=1e-4)
    for field, value in (("weights", "prompt"), ("attribution", True)):
        refused = live_server.post("/v1/neighbors", {"input": PROMPT, "knn": {"datastore": stores, field: value}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, f"knn.{field}")


# -- aliases -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def aliased(start_server: Start, own_root: Path) -> Iterator[LiveServer]:
    server = start_server(datastores=own_root)
    response = server.http.put("/v1/datastores/law", json={"aliases": ["rules"]})
    assert response.status_code == 200, response.text
    yield server
    wait_until(server.is_idle, within_s=SOON_S)


def test_an_alias_is_its_name_and_not_a_second_store(aliased: LiveServer) -> None:
    answer = complete(aliased, knn=knn(datastore=[{"name": "rules"}, {"name": "news"}]), max_tokens=2)
    assert answer["model"] == "tiny-lm@law+news"
    assert [store["name"] for store in answer["choices"][0]["knn"][0]["datastores"]] == ["law", "news"]
    assert complete(aliased, model="tiny-lm@law", knn={"datastore": "rules"}, max_tokens=2)["model"] == "tiny-lm@law"
    body = {"prompt": PROMPT, "knn": {"datastore": [{"name": "law"}, {"name": "news"}, {"name": "rules"}]}}
    refused = aliased.post("/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "knn.datastore")
    assert "'law' as 'law' and as 'rules'" in refused.json()["error"]["message"]


# -- leases ------------------------------------------------------------------------------------------------------------


class Leases:
    """Counts what a server leases and gets back; a lease given back twice is a failure at once."""

    def __init__(self, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given = self.returned = 0
        registry = server.backend.registry
        lease = registry.lease

        def counted(name: str, param: str | None = None) -> Any:
            taken = lease(name, param=param)
            self.given += 1
            release, released = taken.release, []

            def release_once() -> None:
                assert not released, "given back twice"
                released.append(True)
                self.returned += 1
                release()

            monkeypatch.setattr(taken, "release", release_once)
            return taken

        monkeypatch.setattr(registry, "lease", counted)


@pytest.fixture
def leases(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Leases:
    return Leases(live_server, monkeypatch)


PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 2},
    "/v1/score": {"input": [PROMPT]},
    "/v1/neighbors": {"input": PROMPT},
}


def check_returned(server: LiveServer, leases: Leases, given: int) -> None:
    wait_until(server.is_idle, within_s=SOON_S)
    wait_until(lambda: leases.returned == leases.given, within_s=SOON_S)
    assert leases.given == given


@pytest.mark.parametrize("path", PATHS)
def test_both_leases_are_given_back_once(live_server: LiveServer, leases: Leases, path: str) -> None:
    assert live_server.post(path, {**PATHS[path], "knn": TWO}).status_code == 200
    check_returned(live_server, leases, given=2)
    given = 2
    for knn, status, more in (
        ({"datastore": [{"name": "law"}, {"name": "nope"}]}, 404, 1),
        ({"datastore": [{"name": "law"}, {"name": "news"}, {"name": "law"}]}, 400, 3),
        ({**TWO, "k": 5000}, 400, 2),
    ):
        assert live_server.post(path, {**PATHS[path], "knn": knn}).status_code == status
        given += more
        check_returned(live_server, leases, given=given)
    bad = {"prompt": [[600]], "input": [[600]]} if path != "/v1/neighbors" else {"input": [600]}
    assert live_server.post(path, {**PATHS[path], **bad, "knn": TWO}).status_code == 400
    wait_until(live_server.is_idle, within_s=SOON_S)
    assert leases.returned == leases.given


@pytest.mark.parametrize("weights", ["given", "prompt"])
@pytest.mark.parametrize("stream", [False, True])
def test_leases_come_back_when_a_search_fails(
    live_server: LiveServer, leases: Leases, monkeypatch: pytest.MonkeyPatch, weights: str, stream: bool
) -> None:
    generation = live_server.backend.registry.status("news").datastore

    def damaged(*args: Any, **kwargs: Any) -> Any:
        raise DatastoreCorrupt("values.arrow holds token 999999")

    monkeypatch.setattr(generation, "search", damaged)
    # A context of its own: what was searched for before need not be searched again.
    prompt = [7, 100 + 2 * stream + (weights == "prompt"), 9, 11]
    body = {**PATHS["/v1/completions"], "prompt": prompt, "knn": {**TWO, "weights": weights}, "stream": stream}
    response = live_server.post("/v1/completions", body)
    assert "datastore_corrupt" in response.text
    # By the prompt it fails before the answer begins.
    assert response.status_code == (200 if stream and weights == "given" else 409)
    for path in ("/v1/score", "/v1/neighbors"):
        assert live_server.post(path, {**PATHS[path], "knn": TWO}).status_code == 409
    check_returned(live_server, leases, given=6)


def test_leases_come_back_when_the_engine_takes_no_more(
    live_server: LiveServer, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, left = Engine.submit, [1]

    def refusing(engine: Engine, request: Any) -> None:
        if not left:
            raise Overloaded("at most 0 requests are handled at once")
        left.pop()
        submit(engine, request)

    monkeypatch.setattr(Engine, "submit", refusing)
    body = {"prompt": PROMPT, "max_tokens": 2, "knn": {**TWO, "weights": "prompt"}}
    for _ in range(2):  # at the generation, then at the weights
        assert live_server.post("/v1/completions", body).status_code == 503
    check_returned(live_server, leases, given=4)


def test_leaving_while_the_prompt_is_weighed_frees_engine_and_leases(live_server: LiveServer, leases: Leases) -> None:
    gone = threading.Event()
    body = {"prompt": [PROMPT] * 4, "max_tokens": 2, "knn": {**TWO, "weights": "prompt"}}
    with before_each_pass(live_server.lm, lambda: gone.wait(SOON_S)):
        with httpx.Client(base_url=live_server.url, trust_env=False) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=0.3)
        assert live_server.backend.engine.load().scoring == 1
        gone.set()
        check_returned(live_server, leases, given=2)


def test_leaving_a_stream_frees_engine_and_leases(live_server: LiveServer, leases: Leases) -> None:
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True, "knn": TWO}
    with Brake(live_server.lm, allowed=3) as brake:
        with live_server.http.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines())
        brake.release()
        check_returned(live_server, leases, given=2)
