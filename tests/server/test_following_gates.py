"""Gates that follow what was found before, over HTTP: what they save, what they say, and that all paths agree."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, before_each_pass, parse_events, wait_until
from small_stores import Published, Start, recalibrate
from small_trees import THRESHOLD, small_trees

from knnlm_core.datastore.calibration import BucketedLambda, LambdaRules
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import DatastoreCorrupt
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_server.engine import scoring
from knnlm_server.settings import ServerSettings

LAW, BOTH = "tiny-lm@law", "tiny-lm@law+news"
PROMPT = "3. new: Der Käufer schuldet the goods. The café’s landlord must keep"
K = 5  # the trace reports as many neighbours
SEARCHED = BucketedLambda(edges=(40.0, 60.0), lambdas=(0.9, 0.6, 0.3))
FOLLOWED = BucketedLambda(edges=(40.0, 60.0), lambdas=(0.8, 0.5, 0.2))
GATES: list[dict[str, Any]] = [
    {"gate": "always"},
    {"gate": "every_n", "gate_threshold": 3},
    {"gate": "confidence", "gate_threshold": 0.14},
    {"gate": "automaton"},
    {"gate": "automaton", "gate_threshold": 2},
    {"gate": "learned"},
    {"gate": "learned", "gate_threshold": 0.05},
    {},  # as calibrated
]
FOLLOWING = GATES[3:]
# `news` has no learned gate.
WITH_MODELS = [
    *((gate, model) for model in (LAW, BOTH) for gate in GATES if model == LAW or gate.get("gate") != "learned"),
    ({"gate": "automaton", "mixture": "neighbors", "k": K, "temperature": 15.0, "lambda": 0.4}, BOTH),
]


def name_of(gate: dict[str, Any]) -> str:
    return "-".join(str(value) for value in gate.values()) or "calibrated"


@pytest.fixture(scope="module")
def root(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`law` with a learned gate and a rule for λ of its own where it follows; `news` searched at every third token."""
    root = Path(shutil.copytree(published.root, tmp_path_factory.mktemp("following") / "datastores"))
    recalibrate(
        root, "law", trees=small_trees(), k=K, knn_temperature=15.0, lmbda=0.4, lambda_mode="bucketed",
        lambda_rules=LambdaRules(bucketed=SEARCHED), follow_rule=FOLLOWED, gate="learned", gate_threshold=THRESHOLD,
        learned_threshold=THRESHOLD,
    )  # fmt: skip
    recalibrate(root, "news", k=K, knn_temperature=15.0, lmbda=0.4, gate="every_n", gate_threshold=3.0)
    return root


@pytest.fixture(scope="module")
def _server(published: Published, root: Path) -> Iterator[LiveServer]:
    settings = ServerSettings(
        model=str(published.model), datastores=root, max_sequences=9, step_tokens=32, drain_timeout_s=5
    )
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def server(_server: LiveServer) -> Iterator[LiveServer]:
    yield _server
    wait_until(_server.is_idle, within_s=5)


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Datastore]:
    with Datastore.open(root, "law") as store:
        yield store


def stored_ids(store: Datastore, lm: HuggingFaceLM, document_id: str) -> list[int]:
    """The tokens of a document as far as they are entries, which what was held out of its end is not."""
    first, stop = store.document_entries(document_id)
    return lm.tokenizer.encode(store.document(document_id).text)[: stop - first + 1]


def generate(server: LiveServer, prompt: Any = PROMPT, *, stream: bool = False, **options: Any) -> dict[str, Any]:
    """A traced completion, by choice: reported log-probabilities and traces; and its usage."""
    body = {
        "prompt": prompt, "model": LAW, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "logprobs": 0,
        **options, "knn": {"trace": True, **options.get("knn", {})},
    }  # fmt: skip
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    events = parse_events(answer.text) if stream else [answer.json()]
    choices: dict[int, dict[str, list[Any]]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        told = choices.setdefault(choice["index"], {"trace": [], "log_probs": []})
        told["trace"] += choice.get("knn") or []
        told["log_probs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
    return {"choices": [choices[i] for i in sorted(choices)], "usage": events[-1]["usage"]["knn"]}


def ids_of(trace: list[dict[str, Any]]) -> list[int]:
    return [entry["token_id"] for entry in trace]


def score_after(server: LiveServer, context: list[int], text: list[int], **options: Any) -> dict[str, Any]:
    inputs = [{"context": context, "text": text}]
    return server.score(inputs, **{"model": LAW, "per_token": True, **options})["results"][0]


def outcomes(entries: list[dict[str, Any]]) -> Counter[str]:
    for entry in entries:
        assert not (entry["searched"] and entry["followed"])
    return Counter("searched" if e["searched"] else "followed" if e["followed"] else "skipped" for e in entries)


DECISIONS = ("searched", "followed", "skipped")


def usage_of(entries: list[dict[str, Any]]) -> dict[str, int]:
    counts = outcomes(entries)
    return {name: counts[name] for name in DECISIONS}


def decisions_of(answer: dict[str, Any]) -> dict[str, int]:
    """What is the same whatever was drafted."""
    return {name: answer["usage"][name] for name in DECISIONS}


# -- one document, replayed --------------------------------------------------------------------------------------------


def test_a_stored_document_is_replayed_with_hardly_a_search(
    server: LiveServer, store: Datastore, lm: HuggingFaceLM
) -> None:
    for document_id in ("new-1", "new-4"):
        ids = stored_ids(store, lm, document_id)
        knn = {"gate": "automaton", "k": K, "temperature": 15.0}
        result = score_after(server, ids[:1], ids[1:], knn=knn)
        assert result["searched"] + result["followed"] == result["tokens"] == len(ids) - 1
        assert result["searched"] < 0.05 * result["tokens"]
        assert outcomes(result["per_token"])["followed"] == result["followed"]
        searching = score_after(server, ids[:1], ids[1:], knn={**knn, "gate": "always"})
        assert (searching["searched"], searching["followed"]) == (searching["tokens"], 0)
        # It finds itself either way.
        assert result["mixed"]["nll"] < 1.05 * searching["mixed"]["nll"]
        assert result["mixed"]["nll"] < 0.5 * result["base"]["nll"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_that_repeats_a_document_follows_it(
    server: LiveServer, store: Datastore, lm: HuggingFaceLM, stream: bool
) -> None:
    ids = stored_ids(store, lm, "new-2")
    knn = {"gate": "automaton", "k": 1, "temperature": 1.0, "lambda": 1.0}
    answer = generate(server, ids[:30], max_tokens=100, knn=knn, stream=stream)
    (choice,) = answer["choices"]
    trace = choice["trace"]
    assert ids_of(trace) == ids[30:130]
    assert decisions_of(answer) == usage_of(trace)
    assert (answer["usage"]["searched"], answer["usage"]["followed"]) == (1, 99)
    places = [entry["neighbors"][0] for entry in trace]
    assert {place["document_id"] for place in places} == {"new-2"}
    assert [place["entry_id"] - places[0]["entry_id"] for place in places] == list(range(100))


# -- generation and scoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("gate", "model"), WITH_MODELS, ids=lambda given: given if given in (LAW, BOTH) else name_of(given)
)
def test_what_was_generated_is_scored_as_it_was_generated(
    server: LiveServer, lm: HuggingFaceLM, gate: dict[str, Any], stream: bool, model: str
) -> None:
    options = {"model": model, "knn": gate, "n": 3, "temperature": 0.7, "seed": 5}
    answer = generate(server, stream=stream, **options)
    assert len({tuple(ids_of(choice["trace"])) for choice in answer["choices"]}) == 3
    for choice in answer["choices"]:
        trace = choice["trace"]
        result = score_after(server, lm.tokenizer.encode(PROMPT), ids_of(trace), model=model, knn=gate)
        assert [entry["mixed"] for entry in result["per_token"]] == pytest.approx(choice["log_probs"], abs=1e-4)
        for told, entry in zip(trace, result["per_token"], strict=True):
            for name in ("searched", "followed", "decision"):
                assert entry[name] == told[name]
            assert entry["lambda"] == pytest.approx(told["lambda"], abs=1e-9)
        assert (result["searched"], result["followed"]) == tuple(outcomes(trace)[n] for n in ("searched", "followed"))
    together = [entry for choice in answer["choices"] for entry in choice["trace"]]
    assert decisions_of(answer) == usage_of(together)
    if (gate in FOLLOWING and model == LAW) or gate.get("mixture"):  # where one store is searched, the token is
        assert outcomes(together)["searched"] >= 3
        assert outcomes(together)["followed"] >= 3


def test_requests_do_not_disturb_each_others_walks(server: LiveServer, store: Datastore, lm: HuggingFaceLM) -> None:
    prompts = [PROMPT, store.document("new-1").text[:90], store.document("new-3").text[40:90]]
    jobs = [(gate, prompt) for gate in GATES for prompt in prompts]

    def run(job: tuple[dict[str, Any], str]) -> dict[str, Any]:
        gate, prompt = job
        return generate(server, prompt, knn=gate, n=2, temperature=0.5, seed=11)

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        scores = [threads.submit(server.score, [PROMPT], model=LAW, knn=gate) for gate in GATES]
        together = list(threads.map(run, jobs))
        for gate, score in zip(GATES, scores, strict=True):
            need, have = server.score([PROMPT], model=LAW, knn=gate)["total"], score.result()["total"]
            assert (have["searched"], have["followed"]) == (need["searched"], need["followed"])
            assert have["mixed"]["nll"] == pytest.approx(need["mixed"]["nll"], abs=1e-3)
    for (gate, prompt), need, have in zip(jobs, alone, together, strict=True):
        assert decisions_of(have) == decisions_of(need)
        for choice, other in zip(have["choices"], need["choices"], strict=True):
            assert ids_of(choice["trace"]) == ids_of(other["trace"])
            assert outcomes(choice["trace"]) == outcomes(other["trace"])
            result = score_after(server, lm.tokenizer.encode(prompt), ids_of(choice["trace"]), knn=gate)
            assert [entry["mixed"] for entry in result["per_token"]] == pytest.approx(choice["log_probs"], abs=1e-4)


@pytest.mark.parametrize("rows", [1, 50])
def test_it_does_not_matter_how_many_rows_are_replayed_at_once(
    server: LiveServer, store: Datastore, lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """A walk goes on from window to window and from search to search, beside those of other texts."""
    ids = [stored_ids(store, lm, document_id) for document_id in ("new-1", "new-5")]
    inputs = [{"context": ids[0][:20], "text": ids[0][20:] + ids[1]}, {"context": ids[1][:3], "text": ids[1][3:90]}]
    options = {"model": LAW, "per_token": True, "window": 64, "stride": 32}
    for gate in FOLLOWING:
        need = server.score(inputs * 3, knn=gate, **options)["results"]
        assert all(result["searched"] and result["followed"] for result in need)
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "ROWS_AT_ONCE", rows)
            patch.setattr(scoring, "NEIGHBORS_AT_ONCE", K * rows)
            have = server.score(inputs * 3, knn=gate, **options)["results"]
        for some, others in zip(need, have, strict=True):
            for told, entry in zip(some["per_token"], others["per_token"], strict=True):
                assert (entry["searched"], entry["followed"]) == (told["searched"], told["followed"])
                assert entry["mixed"] == pytest.approx(told["mixed"], abs=1e-4)


# -- echo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES, ids=name_of)
def test_an_echo_changes_nothing_and_is_scored_as_a_text_is(server: LiveServer, gate: dict[str, Any]) -> None:
    plain = generate(server, knn=gate)
    echoed = generate(server, knn=gate, echo=True)
    (need,), (have,) = plain["choices"], echoed["choices"]
    assert ids_of(have["trace"]) == ids_of(need["trace"])
    assert outcomes(have["trace"]) == outcomes(need["trace"])
    generated = len(need["log_probs"])
    assert have["log_probs"][-generated:] == pytest.approx(need["log_probs"], abs=1e-4)
    assert have["log_probs"][0] is None
    result = server.score([PROMPT], model=LAW, per_token=True, knn=gate)["results"][0]
    scored = [entry["mixed"] for entry in result["per_token"]]
    assert have["log_probs"][1:-generated] == pytest.approx(scored, abs=1e-4)
    # The prompt's tokens count as the score's do.
    for name in ("searched", "followed"):
        assert echoed["usage"][name] - plain["usage"][name] == result[name]


# -- the trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", FOLLOWING, ids=name_of)
def test_the_trace_explains_each_decision(server: LiveServer, store: Datastore, gate: dict[str, Any]) -> None:
    seen: Counter[str] = Counter()
    for prompt in (PROMPT, store.document("new-1").text[:120]):
        (choice,) = generate(server, prompt, max_tokens=60, knn=gate)["choices"]
        seen += outcomes(choice["trace"])
        mode = gate.get("gate", "learned")
        threshold = gate.get("gate_threshold", 1 if mode == "automaton" else THRESHOLD)
        before: dict[str, Any] | None = None
        for entry in choice["trace"]:
            assert (entry["decision"], entry["gate_threshold"]) == (mode, threshold)
            check_decision(entry)
            check_walk(entry, before)
            check_lambda(entry)
            before = entry
    assert seen["searched"] > 3
    assert seen["followed"] > 3
    # The automaton searches wherever it cannot follow; what is learned may do neither.
    assert (seen["skipped"] > 0) is (mode == "learned" and threshold == THRESHOLD)


def check_decision(entry: dict[str, Any]) -> None:
    """By the gate's own numbers alone."""
    if entry["decision"] == "automaton":
        assert entry["gate_score"] == entry["pointers"]
        assert entry["searched"] is (entry["gate_score"] < entry["gate_threshold"])
    else:
        assert entry["searched"] is (entry["gate_score"] > entry["gate_threshold"])
    assert entry["followed"] is (not entry["searched"] and entry["pointers"] > 0)
    assert bool(entry["neighbors"]) is (entry["searched"] or entry["followed"])
    if entry["followed"]:
        assert len(entry["neighbors"]) == min(entry["pointers"], K)
    if not entry["neighbors"]:
        assert entry["p"] == pytest.approx(entry["p_lm"], abs=1e-6)


def check_walk(entry: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Pointers are the entries after those neighbours of the token before that held it."""
    came = [] if before is None else [n for n in before["neighbors"] if n["token"] == before["token"]]
    assert entry["pointers"] <= len(came)
    if entry["followed"]:
        assert {n["entry_id"] for n in entry["neighbors"]} <= {n["entry_id"] + 1 for n in came}
        distances = [n["distance"] for n in entry["neighbors"]]
        assert distances == sorted(distances)


def check_lambda(entry: dict[str, Any]) -> None:
    """Each outcome has a rule of its own."""
    assert entry["p"] == pytest.approx(
        entry["lambda"] * entry["p_knn"] + (1 - entry["lambda"]) * entry["p_lm"], abs=1e-6
    )
    if not entry["neighbors"]:
        assert entry["lambda"] == 0
        return
    rule = FOLLOWED if entry["followed"] else SEARCHED
    nearest = entry["neighbors"][0]["distance"]
    assert entry["lambda"] == rule.lambdas[sum(edge < nearest for edge in rule.edges)]


def test_another_k_or_tau_gives_up_the_calibrated_gate(server: LiveServer) -> None:
    card = server.http.get("/v1/datastores/law").json()["calibration"]
    assert (card["gate"], card["gate_threshold"], card["k"]) == ("learned", THRESHOLD, K)
    for knn in ({"k": K + 1}, {"temperature": 14.0}):
        (choice,) = generate(server, knn=knn)["choices"]
        assert {entry["decision"] for entry in choice["trace"]} == {"always"}
        answer = server.post("/v1/completions", {"prompt": PROMPT, "model": LAW, "knn": {**knn, "gate": "learned"}})
        assert answer.status_code == 400
        assert "`knn.gate` learned holds for the calibrated k and τ alone" in answer.json()["error"]["message"]
    (choice,) = generate(server, knn={"k": K + 1, "gate": "automaton"})["choices"]
    assert {entry["decision"] for entry in choice["trace"]} == {"automaton"}
    for threshold in (-1, 101):
        knn = {"gate": "learned", "gate_threshold": threshold}
        answer = server.post("/v1/completions", {"prompt": PROMPT, "model": LAW, "knn": knn})
        assert answer.status_code == 400
        assert "must be in 0 … 100 nats" in answer.json()["error"]["message"]


# -- several datastores ------------------------------------------------------------------------------------------------


def test_of_two_datastores_each_has_its_gate(server: LiveServer, lm: HuggingFaceLM) -> None:
    """`law` follows what it can; `news` is searched at every third position, and then the token counts as searched."""
    answer = generate(server, model=BOTH, max_tokens=60)
    (choice,) = answer["choices"]
    trace = choice["trace"]
    first = len(lm.tokenizer.encode(PROMPT))
    of_law: dict[str, list[dict[str, Any]]] = {"followed": [], "beside": []}
    for position, entry in enumerate(trace, first):
        stores = {neighbor["datastore"] for neighbor in entry["neighbors"]}
        assert (entry["decision"], entry["gate_threshold"]) == ("learned+every_n", None)
        assert (entry["datastores"][1]["lambda"] > 0) is (position % 3 == 0)
        if position % 3 == 0:
            assert entry["searched"]
            assert not entry["followed"]
            if entry["pointers"] and entry["datastores"][0]["lambda"] in FOLLOWED.lambdas:
                of_law["beside"].append(entry)
        elif entry["followed"]:
            assert stores == {"law"}
            assert entry["pointers"] >= 1
            of_law["followed"].append(entry)
    assert all(of_law.values())
    assert decisions_of(answer) == usage_of(trace)


# -- deleted and excluded ----------------------------------------------------------------------------------------------


def test_a_document_that_is_deleted_meanwhile_is_not_followed_any_more(
    start_server: Start, root: Path, tmp_path: Path, store: Datastore, lm: HuggingFaceLM
) -> None:
    own = Path(shutil.copytree(root, tmp_path / "datastores"))
    server = start_server(datastores=own, load=("law",))
    ids = stored_ids(store, lm, "new-2")
    body = {
        "prompt": ids[:20], "model": LAW, "max_tokens": 80, "temperature": 0, "ignore_eos": True, "stream": True,
        "knn": {"gate": "automaton", "k": 1, "temperature": 1.0, "lambda": 1.0, "trace": True},
    }  # fmt: skip
    trace: list[dict[str, Any]] = []
    told = 0
    with (
        before_each_pass(server.lm, lambda: time.sleep(0.01), path="forward"),
        server.http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        for line in filter(lambda line: line.startswith("data: {"), answer.iter_lines()):
            trace += [entry for choice in json.loads(line[6:])["choices"] for entry in choice.get("knn") or ()]
            if len(trace) >= 10 and not told:
                assert server.http.delete("/v1/datastores/law/documents/new-2").status_code == 200
                told = len(trace)
    assert len(trace) == 80
    assert ids_of(trace[:told]) == ids[20 : 20 + told]
    assert [entry["followed"] for entry in trace[:told]] == [False] + [True] * (told - 1)
    # Tokens that were on their way when the deletion was answered may still name it.
    later = trace[told + 10 :]
    assert not [n for entry in later for n in entry["neighbors"] if n["document_id"] == "new-2"]
    assert ids_of(later) != ids[20 + told + 10 : 100]
    assert outcomes(trace[told:])["searched"] >= 1, "the walk has to begin anew"
    wait_until(server.is_idle, within_s=5)


@pytest.mark.parametrize("gate", FOLLOWING, ids=name_of)
def test_an_excluded_document_is_never_followed(
    server: LiveServer, store: Datastore, lm: HuggingFaceLM, gate: dict[str, Any]
) -> None:
    """Not where a request excludes it, and not where it is scored as itself; attribution tells of every entry used."""
    ids = stored_ids(store, lm, "new-2")
    knn = {**gate, "attribution": True}
    itself = score_after(server, ids[:1], ids[1:], knn=knn)
    assert "new-2" in documents_behind(itself)
    by_id = server.score([{"document_id": "new-2"}], model=LAW, knn=knn, per_token=True)["results"][0]
    by_text = score_after(server, ids[:1], ids[1:], knn=knn, exclude_documents=["new-2"])
    for result in (by_id, by_text):
        assert result["followed"] > 10
        assert "new-2" not in documents_behind(result)
        assert result["mixed"]["nll"] > 1.1 * itself["mixed"]["nll"]


def documents_behind(result: dict[str, Any]) -> set[str]:
    """Of the tokens that were followed; their shares add up."""
    found: set[str] = set()
    for entry in result["per_token"]:
        sources = entry["attribution"]["sources"]
        assert sum(source["share"] for source in sources) + entry["attribution"]["model"] == pytest.approx(1, abs=1e-4)
        if entry["followed"]:
            found |= {source["document_id"] for source in sources}
        elif not entry["searched"]:
            assert not sources
    return found


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["search", "lookup", "next_entry"])
def test_a_datastore_that_cannot_be_read_fails_its_own_requests_alone(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def damaged(*args: Any, **kwargs: Any) -> Any:
        raise DatastoreCorrupt("values.arrow holds token 999999")

    body = {"prompt": PROMPT, "model": LAW, "n": 3, "temperature": 0.7, "max_tokens": 40, "ignore_eos": True}
    plain = {**body, "model": "tiny-lm", "max_tokens": 60}
    never = {**plain, "model": LAW, "knn": {"gate": "never"}}
    with ThreadPoolExecutor(4) as threads, before_each_pass(server.lm, lambda: time.sleep(0.005), path="forward"):
        others = [threads.submit(server.post, "/v1/completions", other) for other in (plain, never)]
        following = threads.submit(server.post, "/v1/completions", {**body, "knn": {"gate": "learned"}})
        wait_until(lambda: server.backend.engine.load().running == 3)
        time.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(Snapshot, method, damaged)
            failed = following.result()
        assert [other.result().status_code for other in others] == [200, 200]
    assert failed.status_code == 409, failed.text
    assert failed.json()["error"]["code"] == "datastore_corrupt"
    wait_until(server.is_idle, within_s=5)
    monkeypatch.setattr(Snapshot, method, damaged)
    answer = server.post("/v1/score", {"input": [PROMPT], "model": LAW, "knn": {"gate": "automaton"}})
    assert answer.json()["error"]["code"] == "datastore_corrupt"
    echo = server.post("/v1/completions", {**body, "echo": True, "logprobs": 0, "knn": {"gate": "automaton"}})
    assert echo.json()["error"]["code"] == "datastore_corrupt"
    wait_until(server.is_idle, within_s=5)


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_count_what_usage_tells(server: LiveServer) -> None:
    def counts() -> dict[str, float]:
        lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith("knnlm_retrievals")]
        return {line.split('"')[1]: float(line.split()[1]) for line in lines if "_total{" in line}

    before = counts()
    usage = generate(server, knn={"gate": "learned"})["usage"]
    total = server.score([PROMPT], model=LAW, knn={"gate": "automaton"})["total"]
    told = {
        "searched": usage["searched"] + total["searched"], "followed": usage["followed"] + total["followed"],
        "skipped": usage["skipped"],
    }  # fmt: skip
    wait_until(lambda: {name: counts()[name] - before[name] for name in told} == told)
