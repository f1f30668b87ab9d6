"""Attribution over HTTP: which documents a probability came from, and never the name of a deleted one."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from exact_reference import ExactReference, Knn, stored
from hypothesis import given
from hypothesis import strategies as st
from live_server import Brake, LiveServer, parse_events, wait_until
from small_stores import Start

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_server.api import attribution_rendering, neighbors, score
from knnlm_server.api.attribution_rendering import AnswerAttribution, merge_spans
from knnlm_server.api.schemas.chat_answers import ChatChunk, ChatCompletion
from knnlm_server.api.schemas.completions import Completion, CompletionChunk
from knnlm_server.api.schemas.score import Score
from knnlm_server.engine.attribution import Attributions

PROMPT = "3. new: The court may refuse the goods. A buyer"
KNN = Knn(k=8, temperature=12.0, lmbda=0.6)
SETTINGS = {"k": KNN.k, "temperature": KNN.temperature, "lambda": KNN.lmbda, "attribution": True}
WEIGHTS = {"law": 0.75, "news": 0.25}
TWO = {"datastore": [{"name": name, "weight": weight} for name, weight in WEIGHTS.items()], **SETTINGS}
NEAR_TIE = 1e-3
SOON_S = 5.0


class BruteForce:
    """Where the probability of a token comes from, entry by entry in float64."""

    def __init__(self, stores: dict[str, Datastore], reference: ExactReference) -> None:
        self._stores = {name: (store, *stored(store)) for name, store in stores.items()}
        self._reference = reference

    def sources(
        self, context: list[int], token: int, weights: dict[str, float]
    ) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], set[int]], float]:
        """Shares by (store, document), the model's as ("", ""); characters by document; and 0 for a tie."""
        last = self._reference.run(context)
        masses = {("", ""): (1 - KNN.lmbda) * math.exp(last.log_probs[-1][token])}
        characters: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
        margin = math.inf
        for name, weight in weights.items():
            store, keys, values = self._stores[name]
            distances = ((keys - last.keys[-1]) ** 2).sum(axis=1)
            order = np.argsort(distances, kind="stable")
            margin = min(margin, distances[order[KNN.k]] - distances[order[KNN.k - 1]])
            near = order[: KNN.k]
            shares = np.exp(-(distances[near] - distances[near[0]]) / KNN.temperature)
            for entry, share in zip(near.tolist(), (shares / shares.sum()).tolist(), strict=True):
                if values[entry] == token:
                    (place,) = store.locate([entry])
                    assert place is not None
                    document = (name, place.document_id)
                    masses[document] = masses.get(document, 0.0) + KNN.lmbda * weight * share
                    characters[document] |= set(range(place.char_start, place.char_end))
        p = math.fsum(masses.values())
        return {document: mass / p for document, mass in masses.items()}, characters, margin


@pytest.fixture(scope="session")
def brute_force(law: Datastore, news: Datastore, reference: ExactReference) -> BruteForce:
    return BruteForce({"law": law, "news": news}, reference)


def check_token(entry: dict[str, Any]) -> None:
    """Shares add up; sources and spans are in order, and no two spans touch."""
    shares = [source["share"] for source in entry["sources"]]
    assert entry["model"] + math.fsum(shares) == pytest.approx(1, abs=1e-6)
    assert shares == sorted(shares, reverse=True)
    for source in entry["sources"]:
        if source.get("deleted"):
            assert source.keys() == {"datastore", "document_id", "deleted", "share"}
            continue
        assert source["spans"]
        assert all(start < end for start, end in source["spans"])
        assert all(a[1] < b[0] for a, b in itertools.pairwise(source["spans"]))


def check_answer(answer: dict[str, Any], tokens: Sequence[dict[str, Any]]) -> None:
    """What is said of the whole is the mean of what is said of its tokens."""
    shares: defaultdict[tuple[str, str | None], float] = defaultdict(float)
    licences: defaultdict[str, float] = defaultdict(float)
    for token in tokens:
        for source in token["sources"]:
            shares[source["datastore"], source["document_id"]] += source["share"] / len(tokens)
            licences[source.get("licence") or "unknown"] += source["share"] / len(tokens)
    assert answer["model"] == pytest.approx(sum(token["model"] for token in tokens) / len(tokens), abs=1e-9)
    have = {(d["datastore"], d["document_id"]): d["share"] for d in answer["documents"]}
    assert len(have) == len(answer["documents"])
    assert have == pytest.approx(dict(shares), abs=1e-9)
    assert answer["licences"] == pytest.approx(dict(licences), abs=1e-9)
    listed = [d["share"] for d in answer["documents"]]
    assert listed == sorted(listed, reverse=True)
    assert answer["model"] + math.fsum(listed) == pytest.approx(1, abs=1e-6)


def check_against(
    brute_force: BruteForce, context: list[int], token: int, entry: dict[str, Any], weights: dict[str, float]
) -> bool:
    """Compare a token with brute force; False where a tie makes it a matter of rounding."""
    check_token(entry)
    need, characters, margin = brute_force.sources(context, token, weights)
    if margin < NEAR_TIE:
        return False
    have = {(s["datastore"], s["document_id"]): s["share"] for s in entry["sources"]} | {("", ""): entry["model"]}
    assert have == pytest.approx(need, abs=1e-3)
    for source in entry["sources"]:
        spans = {i for start, end in source["spans"] for i in range(start, end)}
        assert spans == characters[source["datastore"], source["document_id"]]
    return True


def complete(server: LiveServer, knn: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "temperature": 1, "seed": 3, "max_tokens": 16, "ignore_eos": True, "knn": knn, **fields}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.content)
    return response.json()


# -- completions and chat ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stores", [("law",), ("law", "news")])
def test_shares_of_generated_tokens_equal_brute_force(
    live_server: LiveServer, brute_force: BruteForce, lm: HuggingFaceLM, stores: tuple[str, ...]
) -> None:
    knn = TWO if len(stores) == 2 else {**SETTINGS, "datastore": "law"}
    weights = WEIGHTS if len(stores) == 2 else {"law": 1.0}
    (choice,) = complete(live_server, knn)["choices"]
    context, compared = lm.tokenizer.encode(PROMPT), 0
    for entry in choice["knn"]:
        compared += check_against(brute_force, context, entry["token_id"], entry["attribution"], weights)
        context = [*context, entry["token_id"]]
    assert compared >= 12
    assert any(len(entry["attribution"]["sources"]) > 1 for entry in choice["knn"])
    check_answer(choice["attribution"], [entry["attribution"] for entry in choice["knn"]])
    assert {d["datastore"] for d in choice["attribution"]["documents"]} == set(stores)
    assert choice["attribution"]["licences"].keys() == {"unknown"}


def test_attribution_streams_as_it_comes_whole(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"n": 2, "max_tokens": 6}
    whole = complete(live_server, TWO, **body)
    for much in (512, 0):  # on the event loop, and on a thread
        monkeypatch.setattr("knnlm_server.api.trace_rendering.TraceRenderer._MUCH", much)
        given = {"prompt": PROMPT, "temperature": 1, "seed": 3, "ignore_eos": True, "knn": TWO, "stream": True, **body}
        chunks = parse_events(live_server.post("/v1/completions", given).text)
        for chunk in chunks:
            CompletionChunk.model_validate_json(json.dumps(chunk))
        for choice in whole["choices"]:
            pieces = [p for chunk in chunks for p in chunk["choices"] if p["index"] == choice["index"]]
            assert [entry for piece in pieces for entry in piece["knn"]] == choice["knn"]
            assert ["attribution" in piece for piece in pieces] == [False] * 5 + [True]
            assert pieces[-1]["attribution"] == choice["attribution"]


def test_a_conversation_is_attributed_whole_and_in_chunks(chat_server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "May the tenant refuse?"}], "max_tokens": 5, "seed": 3, "knn": TWO}
    response = chat_server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate_json(response.content)
    (choice,) = response.json()["choices"]
    for entry in choice["knn"]:
        check_token(entry["attribution"])
    check_answer(choice["attribution"], [entry["attribution"] for entry in choice["knn"]])
    chunks = parse_events(chat_server.post("/v1/chat/completions", {**body, "stream": True}).text)
    for chunk in chunks:
        ChatChunk.model_validate_json(json.dumps(chunk))
    pieces = [piece for chunk in chunks for piece in chunk["choices"]]
    assert [entry for piece in pieces for entry in piece.get("knn", ())] == choice["knn"]
    assert [piece["attribution"] for piece in pieces if "attribution" in piece] == [choice["attribution"]]
    assert "attribution" in pieces[-1]


def test_without_neighbours_everything_is_the_models(live_server: LiveServer) -> None:
    nothing = {"model": 1.0, "documents": [], "licences": {}}
    for knn in ({"attribution": True}, {**TWO, "gate": "never"}, {**TWO, "lambda": 0}):
        (choice,) = complete(live_server, knn, max_tokens=3)["choices"]
        assert [entry["attribution"] for entry in choice["knn"]] == [{"model": 1.0, "sources": []}] * 3
        assert choice["attribution"] == nothing
    (choice,) = complete(live_server, TWO, max_tokens=0, echo=True)["choices"]
    assert choice["attribution"] == nothing
    (choice,) = complete(live_server, {**TWO, "attribution": False}, max_tokens=1)["choices"]
    assert "attribution" not in choice
    assert "knn" not in choice


# -- score -------------------------------------------------------------------------------------------------------------


def scored(server: LiveServer, inputs: Any, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/score", {"input": inputs, "knn": TWO, **fields})
    assert response.status_code == 200, response.text
    Score.model_validate_json(response.content)
    return response.json()


def test_shares_of_scored_tokens_equal_brute_force(
    live_server: LiveServer, brute_force: BruteForce, lm: HuggingFaceLM, law: Datastore
) -> None:
    texts = [PROMPT, law.document("new-2").text[:60], "x", ""]
    inputs = [lm.tokenizer.encode(text) for text in texts]
    results = scored(live_server, inputs, per_token=True)["results"]
    compared = 0
    for ids, result in zip(inputs, results, strict=True):
        tokens = [entry["attribution"] for entry in result["per_token"]]
        for position, entry in enumerate(tokens, start=1):
            compared += check_against(brute_force, ids[:position], ids[position], entry, WEIGHTS)
        if tokens:
            check_answer(result["attribution"], tokens)
        else:
            assert result["attribution"] == {"model": 1.0, "documents": [], "licences": {}}
    assert compared > 20
    assert results[1]["attribution"]["documents"][0]["document_id"] == "new-2"


def test_a_score_attributes_whole_texts_the_same_without_its_tokens(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution_rendering, "_LOOKED_UP_AT_ONCE", 3)
    texts = [PROMPT, "The tenant may refuse the goods.", "A buyer"]
    need = scored(live_server, texts, per_token=True)
    have = scored(live_server, texts)
    for result, other in zip(have["results"], need["results"], strict=True):
        mine, others = result["attribution"], other["attribution"]
        assert mine["model"] == others["model"]
        by_document = [{d["document_id"]: d["share"] for d in a["documents"]} for a in (mine, others)]
        assert by_document[0] == pytest.approx(by_document[1], abs=1e-9)
    assert "attribution" not in have["total"]
    lines = live_server.post("/v1/score", {"input": texts, "knn": TWO, "per_token": True, "stream": True}).text
    streamed = [line for line in map(json.loads, lines.splitlines()) if line["object"] == "score.result"]
    for line in streamed:
        del line["object"]
    assert sorted(streamed, key=lambda line: line["index"]) == need["results"]


def test_a_document_that_is_scored_is_not_attributed_to_itself(live_server: LiveServer) -> None:
    body = {"model": "tiny-lm@law", "knn": SETTINGS}
    (result,) = scored(live_server, [{"document_id": "new-2"}], **body)["results"]
    assert result["attribution"]["documents"]
    assert "new-2" not in {d["document_id"] for d in result["attribution"]["documents"]}


def test_more_than_can_be_held_is_refused(live_server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution_rendering, "MAX_ATTRIBUTED_NEIGHBORS", 10 * 16)
    complete(live_server, TWO, max_tokens=10)
    ids = list(range(5, 16))
    scored(live_server, [ids])
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 11}),
        ("/v1/completions", {"prompt": [PROMPT, PROMPT], "max_tokens": 6}),
        ("/v1/completions", {"prompt": PROMPT, "n": 2, "max_tokens": 6}),
        ("/v1/score", {"input": [ids, [5, 6]]}),
    ):
        response = live_server.post(path, {**body, "knn": TWO})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "knn.attribution"
        assert "at most 160 neighbours" in response.json()["error"]["message"]
        assert live_server.post(path, {**body, "knn": {**TWO, "attribution": False}}).status_code == 200


# -- deleted documents -------------------------------------------------------------------------------------------------


@pytest.fixture
def living(start_server: Start, own_root: Path) -> Iterator[LiveServer]:
    """A server whose documents a test may delete."""
    server = start_server(datastores=own_root)
    yield server
    wait_until(server.is_idle, within_s=SOON_S)


def forget(server: LiveServer) -> None:
    """Delete a document, in a connection of its own."""
    response = httpx.delete(f"{server.url}/v1/datastores/law/documents/new-3", trust_env=False)
    assert response.status_code == 200, response.text


def before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], None]) -> None:
    """Do something on the thread that is about to call a function, once."""
    function, pending = getattr(module, name), [act]

    def act_and_call(*args: Any, **kwargs: Any) -> Any:
        if pending:
            pending.pop()()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, act_and_call)


def assert_untold(text: str) -> None:
    """Neither id nor uri nor title of the deleted document is there."""
    for told in ("new-3", "file:new/3", "№ 3", json.dumps("№ 3")[1:-1]):
        assert told not in text


# The context of a document is its own nearest neighbour, so nearly everything comes from that document.
OWN = {"model": "tiny-lm@law", "knn": {"k": 4, "temperature": 12.0, "lambda": 0.9, "attribution": True}}


@pytest.mark.parametrize("per_token", [False, True])
def test_a_score_does_not_name_what_was_deleted_meanwhile(
    living: LiveServer, law: Datastore, monkeypatch: pytest.MonkeyPatch, per_token: bool
) -> None:
    text = law.document("new-3").text[3:90]
    before(monkeypatch, score, "_whole", lambda: forget(living))
    response = living.post("/v1/score", {"input": [text], **OWN, "per_token": per_token})
    assert response.status_code == 200, response.text
    Score.model_validate_json(response.content)
    assert_untold(response.text)
    (result,) = response.json()["results"]
    attribution = result["attribution"]
    (deleted,) = [d for d in attribution["documents"] if d["document_id"] is None]
    assert deleted.keys() == {"datastore", "document_id", "deleted", "share"}
    assert (deleted["datastore"], deleted["deleted"]) == ("law", True)
    assert deleted["share"] > 0.5
    shares = [d["share"] for d in attribution["documents"]]
    assert attribution["model"] + sum(shares) == pytest.approx(1, abs=1e-6)
    assert sum(attribution["licences"].values()) == pytest.approx(sum(shares))
    if per_token:
        check_answer(attribution, [entry["attribution"] for entry in result["per_token"]])


def test_neither_trace_nor_attribution_names_what_was_deleted_while_it_generated(
    living: LiveServer, law: Datastore
) -> None:
    body = {"prompt": law.document("new-3").text[:60], "temperature": 0, "max_tokens": 6, "ignore_eos": True, **OWN}
    told = living.post("/v1/completions", body).json()["choices"][0]
    assert told["attribution"]["documents"][0]["document_id"] == "new-3"
    with Brake(living.lm, allowed=4) as brake:
        connection = living.begin("/v1/completions", body)
        brake.wait_held()
        forget(living)
        brake.release()
        text = b""
        while b'"usage"' not in text:
            text += connection.recv(1 << 16)
        connection.close()
    choice = json.loads(text.partition(b"\r\n\r\n")[2])["choices"][0]
    assert_untold(text.decode())
    entries = choice["knn"]
    assert len(entries) == 6
    first = entries[0]["attribution"]
    check_token(first)
    assert first["sources"][0].get("deleted")
    assert entries[0]["p_knn"] > 0
    # The traces of the first tokens have lost the document's neighbours; the later ones never had them.
    assert len(entries[0]["neighbors"]) < len(told["knn"][0]["neighbors"])
    assert len(entries[-1]["neighbors"]) == 4
    assert not any(source.get("deleted") for source in entries[-1]["attribution"]["sources"])
    check_answer(choice["attribution"], [entry["attribution"] for entry in entries])


def test_a_stream_ends_without_the_name_of_what_was_deleted_since_its_beginning(
    living: LiveServer, law: Datastore
) -> None:
    body = {"prompt": law.document("new-3").text[:60], "temperature": 0, "max_tokens": 6, "ignore_eos": True, **OWN}
    chunks = []
    with (
        Brake(living.lm, allowed=3) as brake,
        living.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line.removeprefix("data: "))["choices"][0])
            if len(chunks) == 3 and line:
                forget(living)
                brake.release()
    assert len(chunks) == 6
    assert chunks[0]["knn"][0]["attribution"]["sources"][0]["document_id"] == "new-3"
    assert_untold(json.dumps(chunks[3:]))
    last = chunks[-1]["attribution"]
    assert_untold(json.dumps(last))
    (deleted,) = [d for d in last["documents"] if d["document_id"] is None]
    need = sum(s["share"] for c in chunks for s in c["knn"][0]["attribution"]["sources"] if s["document_id"] == "new-3")
    gone = sum(s["share"] for c in chunks for s in c["knn"][0]["attribution"]["sources"] if s.get("deleted"))
    assert deleted["share"] == pytest.approx((need + gone) / 6, abs=1e-9)
    assert last["model"] + sum(d["share"] for d in last["documents"]) == pytest.approx(1, abs=1e-6)


def test_neighbours_of_a_document_deleted_meanwhile_are_left_out(
    living: LiveServer, law: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"input": law.document("new-3").text[:60], "model": "tiny-lm@law+news", "knn": {"k": 4}}
    (full,) = living.post("/v1/neighbors", body).json()["results"]
    assert "new-3" in {near["document_id"] for near in full["neighbors"]}
    before(monkeypatch, neighbors, "_render", lambda: forget(living))
    response = living.post("/v1/neighbors", body)
    assert response.status_code == 200, response.text
    assert '"new-3"' not in response.text
    assert '"file:new/3"' not in response.text
    (rest,) = response.json()["results"]
    assert rest["neighbors"] == [near for near in full["neighbors"] if near["document_id"] != "new-3"]


# -- parts -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)).map(lambda s: (s[0], s[0] + s[1]))))
def test_merged_spans_cover_the_same_characters_in_order_and_never_touch(spans: list[tuple[int, int]]) -> None:
    merged = merge_spans(spans)
    assert {i for start, end in merged for i in range(start, end)} == {i for s, e in spans for i in range(s, e)}
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))


def test_attributions_of_many_tokens_are_added_up_by_document(law: Datastore, news: Datastore) -> None:
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 30, 50)
    total = int(counts.sum())
    sources = draw.integers(0, 2, total).astype(np.int8)
    attributions = Attributions(
        model=draw.random(50),
        counts=counts,
        sources=sources,
        entry_ids=np.where(sources == 0, draw.integers(0, law.entries, total), draw.integers(0, news.entries, total)),
        shares=draw.random(total).astype(np.float32),
    )
    answers = [AnswerAttribution((law, news)) for _ in range(3)]
    answers[0].add(attributions)
    list(answers[1].tokens(attributions))
    for start in range(0, 50, 7):
        answers[2].add(attributions.part(start, start + 7))
    need: defaultdict[str, float] = defaultdict(float)
    for source, entry_id, share in zip(sources, attributions.entry_ids.tolist(), attributions.shares, strict=True):
        (place,) = (law, news)[source].locate([entry_id])
        assert place is not None
        need[place.document_id] += float(share) / 50
    for answer in answers:
        whole = answer.whole()
        assert {d["document_id"]: d["share"] for d in whole["documents"]} == pytest.approx(dict(need), abs=1e-6)
        assert whole["model"] == pytest.approx(attributions.model.mean())
