"""`knnlm score`, here and over HTTP: against slow float64 recomputations, and one against the other."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from exact_reference import ExactReference, Knn
from live_server import LiveServer
from small_stores import Published, Start, recalibrate
from small_trees import THRESHOLD, small_trees
from typer.testing import CliRunner

from knnlm_builder.corpus import read_documents
from knnlm_cli import score_http, score_offline
from knnlm_cli.main import make_app
from knnlm_cli.score_connection import Connection
from knnlm_cli.score_http import http_scorer
from knnlm_cli.score_offline import offline_scorer
from knnlm_cli.score_settings import read_settings
from knnlm_core.datastore.calibration import BucketedLambda, LambdaRules
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreNotFound, ServiceError
from knnlm_core.lm.huggingface import HuggingFaceLM
from tiny import save_tiny

KNN = Knn(k=12, temperature=15.0, lmbda=0.4)
SETTINGS = ("--k", "12", "--temperature", "15", "--lambda", "0.4", "--window", "128", "--stride", "64")
FRESH = "3. new: Der Käufer schuldet the goods. The café’s landlord must keep its value 🙂. " * 3
NEAR_TIE = 1e-3
STORED, OTHER, LONG, SHORT, LONE = "new-2", "new-4", "fresh/long", "fresh/short", "one token"
LM = "tiny-lm"


class Outcome(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def knnlm(*arguments: str | Path) -> Outcome:
    """Run the command in this process, errors as the console script prints them."""
    result = CliRunner(env={"COLUMNS": "140", "NO_COLOR": "1"}).invoke(make_app(), [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def scored(*arguments: str | Path) -> dict[str, Any]:
    """What ``knnlm score … --json`` prints."""
    outcome = knnlm("score", *arguments, "--json")
    assert outcome.exit_code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def refused(*arguments: str | Path) -> str:
    """The one line that a refused command prints."""
    outcome = knnlm("score", *arguments)
    assert (outcome.exit_code, outcome.stdout) == (1, ""), outcome.stdout
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def tokens_by_document(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        token = json.loads(line)
        found.setdefault(token.pop("document_id"), []).append(token)
    return found


class Files(NamedTuple):
    texts: Path
    store: Path
    offline_tokens: Path
    http_tokens: Path


@pytest.fixture(scope="module")
def files(law: Datastore, lm: HuggingFaceLM, published: Published, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Documents that the store holds and others, among them one without a token that has a context."""
    folder = tmp_path_factory.mktemp("score")
    words = (lm.tokenizer.token_text(i).strip() for i in range(len(lm.tokenizer)))
    lone = next(word for word in words if len(word) > 1 and len(lm.tokenizer.encode(word)) == 1)
    texts = {
        STORED: law.document(STORED).text,
        LONG: FRESH * 2,
        SHORT: "The court must keep every key.",
        LONE: lone,
        OTHER: law.document(OTHER).text[:90],
    }
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items()), encoding="utf-8")
    return Files(path, published.root / "law", folder / "offline.jsonl", folder / "http.jsonl")


@pytest.fixture(scope="module")
def offline(files: Files, published: Published) -> dict[str, Any]:
    given = ("--model", published.model, "--datastore", files.store, "--per-token", files.offline_tokens)
    return scored(files.texts, *given, *SETTINGS)


@pytest.fixture
def http(files: Files, live_server: LiveServer) -> dict[str, Any]:
    given = ("--url", live_server.url, "--datastore", "law", "--per-token", files.http_tokens)
    return scored(files.texts, *given, *SETTINGS)


# -- against the reference -------------------------------------------------------------------------------------------


def test_offline_equals_a_float64_recomputation_with_exact_search(
    offline: dict[str, Any], files: Files, reference: ExactReference, law: Datastore, lm: HuggingFaceLM
) -> None:
    tokens = tokens_by_document(files.offline_tokens)
    for document in read_documents([files.texts]):
        ids = lm.tokenizer.encode(document.text)
        if len(ids) < 2:
            assert document.id not in tokens
            continue
        stored = document.id in law.document_ids()
        own = law.document_entries(document.id) if stored else None
        base = reference.base_scores(ids, 128, 64)
        mixed, margins = reference.mixed_scores(law, ids, KNN, 128, 64, exclude=own)
        clear = margins > NEAR_TIE  # elsewhere it is a matter of rounding which neighbour is the k-th
        assert clear.mean() > 0.9
        found = tokens[document.id]
        assert [token["id"] for token in found] == ids[1:]
        assert [token["base"] for token in found] == pytest.approx(base.tolist(), abs=1e-3)
        assert np.array([token["mixed"] for token in found])[clear] == pytest.approx(mixed[clear], abs=1e-3)


def test_measures_are_those_of_the_tokens(offline: dict[str, Any], files: Files) -> None:
    tokens = tokens_by_document(files.offline_tokens)
    texts = {document.id: document.text for document in read_documents([files.texts])}
    assert [document["document_id"] for document in offline["documents"]] == list(texts)
    everything = [token for found in tokens.values() for token in found]
    measured = [(document, tokens.get(document["document_id"], [])) for document in offline["documents"]]
    for measures, found in [*measured, (offline["total"], everything)]:
        assert measures["tokens"] == measures["searched"] == len(found)
        for which in ("base", "mixed"):
            nll = -math.fsum(token[which] for token in found)
            assert measures[which]["nll"] == pytest.approx(nll, rel=1e-9)
            if found:
                assert measures[which]["perplexity"] == pytest.approx(math.exp(nll / len(found)), rel=1e-9)
                assert measures[which]["bits_per_byte"] == pytest.approx(nll / math.log(2) / measures["bytes"])
    for measures, found in measured:
        text = texts[measures["document_id"]]
        assert measures["bytes"] == (len(text[found[0]["offset"] :].encode()) if found else 0)
    total = offline["total"]
    assert total["bytes"] == sum(document["bytes"] for document in offline["documents"])
    assert total["change"] == pytest.approx(total["mixed"]["perplexity"] / total["base"]["perplexity"] - 1)
    assert total["better_share"] == np.mean([token["mixed"] > token["base"] for token in everything])
    assert total["worse_share"] == np.mean([token["mixed"] < token["base"] for token in everything])
    assert total["searched_share"] == 1.0


def test_overlap_counts_each_token_in_the_bucket_of_its_longest_match(offline: dict[str, Any], files: Files) -> None:
    everything = [token for found in tokens_by_document(files.offline_tokens).values() for token in found]
    overlap = offline["total"]["overlap"]
    assert [bucket["longest_match"] for bucket in overlap] == [
        [0, 0], [1, 1], [2, 3], [4, 7], [8, 15], [16, 31], [32, None],
    ]  # fmt: skip
    for bucket in overlap:
        low, high = bucket["longest_match"]
        inside = [t for t in everything if low <= t["longest_match"] and (high is None or t["longest_match"] <= high)]
        assert bucket["tokens"] == len(inside)
        for which in ("base", "mixed"):
            assert bucket[which]["nll"] == pytest.approx(-math.fsum(t[which] for t in inside), abs=1e-6)
    assert sum(bucket["tokens"] > 0 for bucket in overlap) >= 3


def test_what_was_used_is_said_with_who_chose_it(
    files: Files, published: Published, law: Datastore, offline: dict[str, Any]
) -> None:
    assert offline["model"] == "tiny-lm@law"
    assert offline["datastore"] == {"name": "law", "version": published.law_new}
    assert offline["knn"]["k"] == {"value": 12, "source": "command line"}
    assert (offline["window"], offline["stride"]) == (
        {"value": 128, "source": "command line"},
        {"value": 64, "source": "command line"},
    )
    versioned = f"{files.store}@{published.law_old}"
    old = scored(files.texts, "--model", published.model, "--datastore", versioned, "--k", "3", "--no-overlap")
    with Datastore.open(published.root, "law", published.law_old) as store:
        calibration = store.calibration
    assert calibration is not None
    assert calibration.id == old["calibration"] != offline["calibration"]
    by_calibration = f"calibration {calibration.id}"
    assert old["knn"] == {
        "k": {"value": 3, "source": "command line"},
        "temperature": {"value": calibration.knn_temperature, "source": by_calibration},
        "lambda": {"value": calibration.lmbda, "source": by_calibration},
        "lambda_mode": {"value": "fixed", "source": "default"},
        "gate": {"value": "always", "source": "default"},  # of a calibration for another k
    }
    assert (old["window"]["value"], old["stride"]["value"], old["window"]["source"]) == (256, 128, "default")
    assert old["total"]["overlap"] is None


# -- exclusion -------------------------------------------------------------------------------------------------------


def by_id(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {document["document_id"]: document for document in report["documents"]}


@pytest.mark.parametrize("where", ["offline", "http"])
def test_a_stored_document_does_not_find_itself_unless_it_may(
    where: str, offline: dict[str, Any], files: Files, published: Published, live_server: LiveServer
) -> None:
    place = ("--model", published.model, "--datastore", files.store)
    if where == "http":
        place = ("--url", live_server.url, "--datastore", "law")
    itself = by_id(scored(files.texts, *place, *SETTINGS, "--no-exclude-self"))
    without = by_id(offline)
    assert [i for i, document in without.items() if document["excluded_itself"]] == [STORED, OTHER]
    assert not any(document["excluded_itself"] for document in itself.values())
    for stored in (STORED, OTHER):
        assert itself[stored]["mixed"]["nll"] < without[stored]["mixed"]["nll"] - 1
    for other in (LONG, SHORT):
        assert itself[other]["mixed"]["nll"] == pytest.approx(without[other]["mixed"]["nll"], rel=1e-5)
    named = by_id(scored(files.texts, *place, *SETTINGS, "--no-exclude-self", "--exclude-document", STORED))
    assert named[STORED]["mixed"]["nll"] == pytest.approx(without[STORED]["mixed"]["nll"], rel=1e-5)
    assert named[OTHER]["mixed"]["nll"] < without[OTHER]["mixed"]["nll"] - 1


# -- over HTTP -------------------------------------------------------------------------------------------------------


def test_http_equals_offline(offline: dict[str, Any], http: dict[str, Any], files: Files) -> None:
    for name in ("model", "model_fingerprint", "datastore", "calibration", "knn", "window", "stride"):
        assert http[name] == offline[name]
    assert_same_scores(http, offline)
    tokens, need = tokens_by_document(files.http_tokens), tokens_by_document(files.offline_tokens)
    assert tokens.keys() == need.keys()
    for document, entries in need.items():
        for have, want in zip(tokens[document], entries, strict=True):
            assert have.keys() == want.keys()
            assert have == want | {which: pytest.approx(want[which], abs=1e-3) for which in ("base", "mixed")}


@pytest.fixture
def gated_root(own_root: Path) -> Path:
    """`law` with a learned gate as its default, and rules for λ."""
    searched, followed = (BucketedLambda(edges=(50.0,), lambdas=lambdas) for lambdas in ((0.9, 0.3), (0.7, 0.2)))
    recalibrate(
        own_root, "law", trees=small_trees(), k=5, knn_temperature=15.0, lmbda=0.4, gate="learned",
        gate_threshold=THRESHOLD, learned_threshold=THRESHOLD, lambda_mode="bucketed",
        lambda_rules=LambdaRules(bucketed=searched), follow_rule=followed,
    )  # fmt: skip
    return own_root


@pytest.mark.parametrize(
    ("options", "gate", "source"),
    [
        ((), {"gate": "learned", "gate_threshold": THRESHOLD}, "calibration"),
        (("--lambda", "0.3"), {"gate": "learned", "gate_threshold": THRESHOLD}, "calibration"),
        (
            ("--gate", "learned", "--gate-threshold", "0.05"),
            {"gate": "learned", "gate_threshold": 0.05},
            "command line",
        ),
        (("--gate", "learned"), {"gate": "learned"}, "command line"),
        (("--gate", "automaton"), {"gate": "automaton"}, "command line"),
        (
            ("--gate", "automaton", "--gate-threshold", "2"),
            {"gate": "automaton", "gate_threshold": 2.0},
            "command line",
        ),
        (("--k", "6"), {"gate": "always"}, "default"),
        (("--temperature", "14"), {"gate": "always"}, "default"),
        (("--k", "6", "--gate", "automaton"), {"gate": "automaton"}, "command line"),
    ],
)
def test_gates_that_follow_do_the_same_here_and_over_http(
    files: Files,
    published: Published,
    gated_root: Path,
    start_server: Start,
    tmp_path: Path,
    options: tuple[str, ...],
    gate: dict[str, Any],
    source: str,
) -> None:
    server = start_server(datastores=gated_root, load=("law",))
    places = [
        ("--model", published.model, "--datastore", gated_root / "law"),
        ("--url", server.url, "--datastore", "law"),
    ]
    paths = [tmp_path / "here.jsonl", tmp_path / "there.jsonl"]
    here, there = (
        scored(files.texts, *place, *options, "--no-exclude-self", "--per-token", path)
        for place, path in zip(places, paths, strict=True)
    )
    assert here["knn"] == there["knn"]
    used = {name: here["knn"][name] for name in ("gate", "gate_threshold") if name in here["knn"]}
    assert {name: setting["value"] for name, setting in used.items()} == gate
    assert {setting["source"].split()[0] for setting in used.values()} == {source.split()[0]}
    assert_same_scores(here, there)
    tokens, need = (tokens_by_document(path) for path in paths)
    for document, entries in need.items():
        for told, entry in zip(tokens[document], entries, strict=True):
            for name in ("id", "searched", "followed", "decision", "lambda"):
                assert entry[name] == told[name]
        assert {entry["decision"] for entry in entries} == {gate["gate"]}
    lambdas = {round(entry["lambda"], 6) for entries in tokens.values() for entry in entries if entry["lambda"]}
    if "--lambda" in options:
        assert lambdas == {0.3}
    elif here["knn"]["lambda_mode"]["value"] == "fixed":
        assert lambdas == {0.4}
    else:
        assert lambdas == {0.9, 0.3, 0.7, 0.2}
    total, follows = here["total"], gate["gate"] != "always"
    assert total["followed"] == sum(entry["followed"] for entries in tokens.values() for entry in entries)
    assert (total["followed"] > 0) is follows is (total["searched"] < total["tokens"])


def test_the_report_tells_people_how_much_was_followed(files: Files, published: Published, gated_root: Path) -> None:
    outcome = knnlm("score", files.texts, "--model", published.model, "--datastore", gated_root / "law")
    assert outcome.exit_code == 0, outcome.stderr
    assert re.search(r"Searched for \d+\.\d% of the tokens, pointers followed for \d+\.\d%;", outcome.stdout)
    assert "gate learned, gate_threshold 0.25" in outcome.stdout


def assert_same_scores(have: dict[str, Any], need: dict[str, Any]) -> None:
    """Up to rounding: batches of other shapes are summed in another order."""
    for a, b in zip([*have["documents"], have["total"]], [*need["documents"], need["total"]], strict=True):
        assert a.keys() == b.keys()
        for name in ("tokens", "bytes", "searched", "followed", "document_id", "excluded_itself"):
            assert a.get(name) == b.get(name)
        for which in ("base", "mixed"):
            assert a[which] == nearly(b[which])
        assert a["change"] == (None if b["change"] is None else pytest.approx(b["change"], abs=1e-4))
    for a, b in zip(have["total"]["overlap"], need["total"]["overlap"], strict=True):
        assert (a["longest_match"], a["tokens"]) == (b["longest_match"], b["tokens"])
        assert a["mixed"] == nearly(b["mixed"])


def nearly(measures: dict[str, float | None]) -> dict[str, Any]:
    return {name: None if value is None else pytest.approx(value, rel=1e-4) for name, value in measures.items()}


def test_batches_do_not_change_the_scores(
    offline: dict[str, Any],
    files: Files,
    published: Published,
    live_server: LiveServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_http, "BATCH_DOCUMENTS", 1)
    monkeypatch.setattr(score_offline, "BATCH_TOKENS", 50)
    monkeypatch.setattr(score_offline, "PASS_TOKENS", 1)
    for place in (
        ("--model", published.model, "--datastore", files.store),
        ("--url", live_server.url, "--datastore", "law"),
    ):
        assert_same_scores(scored(files.texts, *place, *SETTINGS), offline)


def test_documents_that_the_store_does_not_hold_share_requests_across_those_that_it_does(
    offline: dict[str, Any], files: Files, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, tuple[str, ...]]] = []
    stream = Connection.stream

    def record(connection: Connection, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        sent.append((len(body["input"]), tuple(body.get("exclude_documents", ()))))
        return stream(connection, path, body)

    monkeypatch.setattr(Connection, "stream", record)
    place = ("--url", live_server.url, "--datastore", "law")
    assert_same_scores(scored(files.texts, *place, *SETTINGS), offline)
    assert sent == [(1, (STORED,)), (3, ()), (1, (OTHER,))]
    sent.clear()
    both = ("--exclude-document", STORED, "--exclude-document", OTHER)
    excluded = scored(files.texts, *place, *SETTINGS, *both)
    assert sent == [(5, (STORED, OTHER))]
    assert [i for i, document in by_id(excluded).items() if document["excluded_itself"]] == [STORED, OTHER]
    sent.clear()
    monkeypatch.setattr(score_http, "STRETCH_DOCUMENTS", 2)
    assert_same_scores(scored(files.texts, *place, *SETTINGS), offline)
    assert sent == [(1, (STORED,)), (1, ()), (2, ()), (1, (OTHER,))]


def test_the_model_may_be_left_to_the_server_or_name_the_datastore(files: Files, live_server: LiveServer) -> None:
    first = scored(files.texts, "--url", live_server.url)
    assert (first["model"], first["datastore"], first["knn"], first["calibration"]) == (LM, None, None, None)
    total = first["total"]
    assert total["base"] == total["mixed"]
    assert (total["change"], total["overlap"], total["searched"]) == (None, None, 0)
    named = scored(files.texts, "--url", f"{live_server.url}/v1/", "--model", f"{LM}@news", "--no-overlap")
    assert named["datastore"]["name"] == "news"
    assert not any(document["excluded_itself"] for document in named["documents"])


def test_a_servers_default_datastore_is_reported(files: Files, published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, load=("news",), default_datastore="news")
    report = scored(files.texts, "--url", server.url)
    assert report["datastore"]["name"] == "news"
    assert report["total"]["change"] is not None


@pytest.mark.parametrize("where", ["offline", "http"])
def test_progress_reaches_the_whole_text(
    where: str, files: Files, published: Published, live_server: LiveServer
) -> None:
    place = {"model": str(published.model), "datastore": str(files.store)}
    if where == "http":
        place = {"url": live_server.url, "datastore": "law"}
    settings = read_settings(files=(files.texts,), window=64, stride=32, **place)
    steps: list[tuple[int, float]] = []
    with (http_scorer if where == "http" else offline_scorer)(settings) as scorer:
        documents = list(scorer.score(read_documents(settings.files), lambda *step: steps.append(step)))
    assert sum(tokens for tokens, _ in steps) == sum(len(document.base) for document in documents)
    characters = sum(len(document.text) for document in read_documents(settings.files))
    assert sum(part for _, part in steps) == pytest.approx(characters)
    assert all(tokens > 0 and part > 0 for tokens, part in steps)


def test_scores_of_two_versions_are_never_added_up(
    files: Files, own_root: Path, published: Published, start_server: Start
) -> None:
    server = start_server(datastores=own_root, load=("law",))
    settings = read_settings(files=(files.texts,), url=server.url, datastore="law", overlap=False)
    with http_scorer(settings) as scorer:
        documents = scorer.score(read_documents(settings.files), lambda tokens, characters: None)
        assert next(documents).id == STORED
        server.backend.registry.load("law", published.law_old)
        with pytest.raises(ServiceError, match="changed what it serves"):
            list(documents)


def test_a_full_server_is_asked_again(
    files: Files, live_server: LiveServer, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm_cli import score_connection
    from knnlm_core.errors import Overloaded

    engine = live_server.backend.engine
    submit, refusals, waits = engine.submit, 2, []

    def full_at_first(request: Any) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Overloaded("the queue is full")
        submit(request)

    monkeypatch.setattr(engine, "submit", full_at_first)
    monkeypatch.setattr(score_connection.time, "sleep", waits.append)
    assert scored(files.texts, "--url", live_server.url)["total"]["tokens"] > 0
    assert waits == [1.0, 1.0]


# -- what is printed -------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_messages_go_elsewhere(files: Files, published: Published) -> None:
    outcome = knnlm("score", files.texts, "--model", published.model, "--json")
    assert outcome.exit_code == 0
    assert outcome.stdout.endswith("}\n")
    assert outcome.stdout.count("\n") == 1
    assert json.loads(outcome.stdout)["object"] == "score"


def test_tables_say_what_json_says(files: Files, published: Published, offline: dict[str, Any], tmp_path: Path) -> None:
    plot = tmp_path / "gains.png"
    given = ("--model", published.model, "--datastore", files.store, "--plot", plot)
    outcome = knnlm("score", files.texts, *given, *SETTINGS)
    assert outcome.exit_code == 0, outcome.stderr
    total = offline["total"]
    for shown in (
        f"{total['tokens']:,} tokens",
        f"{total['base']['perplexity']:,.3f}",
        f"{total['mixed']['perplexity']:,.3f}",
        f"{total['mixed']['bits_per_byte']:,.4f}",
        "Searched for 100.0% of the tokens",
        f"more probable with retrieval {total['better_share']:.1%}",
        "command line: k 12, temperature 15, lambda 0.4, window 128, stride 64",
        f"version {published.law_new}",
        "kept from finding themselves in the datastore: 2 of 5 documents",
        *(document["document_id"] for document in offline["documents"]),
        "16–31",
    ):
        assert shown in outcome.stdout
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datastore", "parts"),
    [
        ("{root}/absent", ["no datastore 'absent'", "published: law, news", "(datastore_not_found)"]),
        ("{root}/law@0123456789abcdef", ["no version '0123456789abcdef'", "published: "]),
        ("{root}", ["is a folder of datastores", "law, news"]),
        ("{root}/No Name", ["`name` of a datastore", "(invalid_parameter)"]),
        ("/", ["--datastore must be ROOT/NAME", "'/'"]),
    ],
)
def test_a_datastore_that_is_not_there_is_refused_with_what_is(
    files: Files, published: Published, datastore: str, parts: list[str]
) -> None:
    line = refused(files.texts, "--model", published.model, "--datastore", datastore.format(root=published.root))
    assert all(part in line for part in parts), line


def test_a_datastore_of_another_model_is_refused(files: Files, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    line = refused(files.texts, "--model", other, "--datastore", files.store)
    assert "datastore 'law' does not fit: model_fingerprint is" in line
    assert "(datastore_mismatch)" in line


def test_a_datastore_without_calibration_needs_settings(files: Files, own_root: Path, published: Published) -> None:
    shutil.rmtree(own_root / "news" / "calibrations")
    current = (own_root / "news" / "CURRENT").read_text().split()[0]
    (own_root / "news" / "CURRENT").write_text(f"{current} -\n")
    place = (files.texts, "--model", published.model, "--datastore", own_root / "news")
    assert "datastore 'news' has no calibration, so --temperature must be given" in refused(*place, "--k", "3")
    report = scored(*place, "--k", "3", "--temperature", "9", "--lambda", "0.1", "--no-overlap")
    assert report["calibration"] is None
    assert report["knn"]["gate"] == {"value": "always", "source": "default"}


def test_an_excluded_document_must_be_there(files: Files, published: Published, live_server: LiveServer) -> None:
    for place in (
        ("--model", published.model, "--datastore", files.store),
        ("--url", live_server.url, "--datastore", "law"),
    ):
        line = refused(files.texts, *place, "--exclude-document", "absent")
        assert "no document 'absent' in datastore 'law' (document_not_found)" in line


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--lambda", "1.5", "`knn.lambda` must be in 0 … 1, got 1.5 (invalid_knn_params)"),
        ("--k", "0", "`knn.k` must be in 1 … 4096, got 0 (invalid_knn_params)"),
        (
            "--gate",
            "sometimes",
            "must be one of always, never, every_n, confidence, automaton, learned, got 'sometimes' (",
        ),
        ("--gate-threshold", "0.5", "`knn.gate_threshold` needs `knn.gate`, and"),
        (
            "--gate",
            "learned",
            "`knn.gate` learned needs a gate in the calibration of datastore 'law', and there is none",
        ),
        ("--lambda-mode", "best", "must be one of fixed, bucketed, rrc, learned, got 'best' (invalid_knn_params)"),
        ("--window", "257", "`window` must be at most the model's context of 256 tokens, got 257"),
        ("--stride", "0", "`stride` must be at least 1 and less than `window` (256), got 0"),
    ],
)
@pytest.mark.parametrize("where", ["offline", "http"])
def test_settings_out_of_bounds_are_refused_alike(
    where: str, files: Files, published: Published, live_server: LiveServer, option: str, value: str, part: str
) -> None:
    place = ("--model", published.model, "--datastore", files.store)
    if where == "http":
        place = ("--url", live_server.url, "--datastore", "law")
    assert part in refused(files.texts, *place, option, value)


def test_what_a_server_does_not_serve_is_refused_with_what_it_does(files: Files, live_server: LiveServer) -> None:
    here = (files.texts, "--url", live_server.url)
    assert "datastore 'absent' is not loaded at" in refused(*here, "--datastore", "absent")
    assert "loaded: law, news (datastore_not_found)" in refused(*here, "--model", f"{LM}@absent")
    assert "model 'other' is not served at" in refused(*here, "--model", "other")
    assert f"served: {LM}, {LM}@law, {LM}@news (model_not_found)" in refused(*here, "--model", "other")
    assert "must agree" in refused(*here, "--model", f"{LM}@law", "--datastore", "news")
    assert "--plot needs a datastore" in refused(*here, "--plot", files.texts.with_suffix(".png"))
    assert "`knn.k` needs a datastore" in refused(*here, "--k", "3")


def test_a_server_that_wants_a_key_says_so(files: Files, start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(api_key="right")
    assert "(invalid_api_key)" in refused(files.texts, "--url", server.url)
    assert "(invalid_api_key)" in refused(files.texts, "--url", server.url, "--api-key", "wrong")
    assert scored(files.texts, "--url", server.url, "--api-key", "right")["total"]["tokens"] > 0
    monkeypatch.setenv("KNNLM_API_KEY", "right")
    assert scored(files.texts, "--url", server.url)["total"]["tokens"] > 0


def test_a_server_that_is_not_ready_says_why(
    files: Files, start_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnlm_server import app

    go, load_lm = threading.Event(), app.load_lm

    def load_later(*args: Any) -> HuggingFaceLM:
        assert go.wait(30)
        return load_lm(*args)

    monkeypatch.setattr(app, "load_lm", load_later)
    server = start_server(wait=False)
    try:
        line = refused(files.texts, "--url", server.url)
    finally:
        go.set()
    assert "waiting for the model" in line
    assert "(not_ready)" in line
    server.wait_ready()


def test_a_server_that_is_not_there_is_named(files: Files, unused_port: int) -> None:
    line = refused(files.texts, "--url", f"http://127.0.0.1:{unused_port}")
    assert f"GET http://127.0.0.1:{unused_port}/v1/models: " in line
    assert line.endswith("(service_error)")


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_error_in_the_middle_of_an_answer_is_told(
    files: Files, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise DatastoreNotFound("the shelf fell over")

    settings = read_settings(files=(files.texts,), url=live_server.url, datastore="law", overlap=False)
    with http_scorer(settings) as scorer:
        law = live_server.backend.registry.status("law").datastore
        monkeypatch.setattr(law, "search", fail)
        monkeypatch.setattr(law, "search_exact", fail)
        with pytest.raises(DatastoreNotFound, match="the shelf fell over"):
            list(scorer.score(read_documents(settings.files), lambda tokens, characters: None))


def test_nothing_to_score_is_an_error(files: Files, published: Published, tmp_path: Path) -> None:
    blank, lone = tmp_path / "blank.txt", tmp_path / "lone.txt"
    blank.write_text("\n\n")
    lone.write_text(next(document.text for document in read_documents([files.texts]) if document.id == LONE))
    assert "nothing to score in " in refused(blank, "--model", published.model)
    assert "1 blank document (empty_corpus)" in refused(blank, "--model", published.model)
    assert "no document in " in refused(lone, "--model", published.model)
