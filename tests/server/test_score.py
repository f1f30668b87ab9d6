"""POST /v1/score on a live server against slow float64 recomputations, window by window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from exact_reference import ExactReference, Knn
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import LiveServer
from small_stores import Published, Start

from knnlm_client import Client, KnnOptions
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.mixture import find
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.engine import scoring
from knnlm_server.engine.scoring import ScoreRequest, TokenScores

TEXT = "3. new: Der Käufer schuldet the goods. The café’s landlord must keep its value 🙂. " * 3
LAW = "tiny-lm@law"
KNN = Knn(k=12, temperature=15.0, lmbda=0.4)
KNN_BODY = {"k": KNN.k, "temperature": KNN.temperature, "lambda": KNN.lmbda}
NEAR_TIE = 1e-3


def log_probs(result: dict[str, Any], which: str) -> np.ndarray[Any, Any]:
    return np.array([entry[which] for entry in result["per_token"]])


@pytest.mark.parametrize(("window", "stride"), [(256, 128), (64, 32), (17, 16), (10, 3), (2, 1)])
def test_base_equals_a_direct_computation_window_by_window(
    live_server: LiveServer, reference: ExactReference, lm: HuggingFaceLM, window: int, stride: int
) -> None:
    need = reference.base_scores(lm.tokenizer.encode(TEXT), window, stride)
    (result,) = live_server.score([TEXT], window=window, stride=stride, per_token=True)["results"]
    assert result["tokens"] == len(need)
    assert log_probs(result, "base") == pytest.approx(need, abs=1e-3)
    assert result["base"]["nll"] == pytest.approx(-need.sum(), abs=1e-3 * len(need))
    assert result["mixed"] == result["base"]  # no datastore was named
    assert result["searched"] == 0


@pytest.mark.parametrize(("window", "stride"), [(128, 64), (40, 39)])
def test_mixed_equals_a_float64_recomputation_with_exact_search(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM, window: int, stride: int
) -> None:
    need, margins = reference.mixed_scores(law, lm.tokenizer.encode(TEXT), KNN, window, stride)
    body = live_server.score([TEXT], model=LAW, window=window, stride=stride, per_token=True, knn=KNN_BODY)
    (result,) = body["results"]
    clear = margins > NEAR_TIE  # elsewhere it is a matter of rounding which neighbour is the k-th
    assert clear.mean() > 0.9
    assert log_probs(result, "mixed")[clear] == pytest.approx(need[clear], abs=1e-3)
    assert result["searched"] == result["tokens"] == len(need)
    assert log_probs(result, "lambda") == pytest.approx(KNN.lmbda)
    assert {entry["decision"] for entry in result["per_token"]} == {"always"}


def test_lambda_zero_and_gate_never_are_the_base(live_server: LiveServer) -> None:
    (searched,) = live_server.score([TEXT], model=LAW, knn={"lambda": 0.0})["results"]
    (skipped,) = live_server.score([TEXT], model=LAW, knn={"gate": "never"})["results"]
    assert searched["mixed"] == searched["base"] == skipped["mixed"] == skipped["base"]
    assert (searched["searched"], skipped["searched"]) == (searched["tokens"], 0)


# -- each token once -------------------------------------------------------------------------------------------------


def score_request(
    texts: list[list[int]], window: int, stride: int, retrieval: Retrieval | None = None
) -> tuple[ScoreRequest, dict[int, TokenScores]]:
    done: dict[int, TokenScores] = {}
    return ScoreRequest("test", texts, retrieval, window, stride, done.__setitem__, lambda error: None), done


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Lengths around the borders of windows, and window and stride."""
    window = draw(st.integers(2, 24))
    stride = draw(st.integers(1, window - 1))
    near_border = st.builds(
        lambda windows, off: max(2, window + windows * stride + off), st.integers(0, 4), st.integers(-2, 2)
    )
    return draw(st.lists(near_border | st.integers(2, 80), min_size=1, max_size=5)), window, stride


@given(cuts(), st.integers(1, 200))
def test_each_token_is_scored_exactly_once(cut: tuple[list[int], int, int], budget: int) -> None:
    lengths, window, stride = cut
    request, _ = score_request([[1] * length for length in lengths], window, stride)
    times = [np.zeros(length, int) for length in lengths]
    while taken := request.take(budget):
        widest = max(w.end - w.begin for _, w in taken)
        assert len(taken) == 1 or widest * len(taken) <= budget
        for text, w in taken:
            assert w.begin < w.first_target
            assert w.end - w.begin <= window
            times[text][w.first_target : w.end] += 1
    assert all(count.tolist() == [0] + [1] * (len(count) - 1) for count in times)


@given(cuts(), st.integers(1, 200), st.data())
def test_what_is_behind_a_context_is_scored_exactly_once(
    cut: tuple[list[int], int, int], budget: int, data: st.DataObject
) -> None:
    lengths, window, stride = cut
    firsts = [data.draw(st.integers(1, length - 1)) for length in lengths]
    texts = [[1] * length for length in lengths]
    request = ScoreRequest("test", texts, None, window, stride, lambda *_: None, lambda error: None, firsts=firsts)
    whole, _ = score_request(texts, window, stride)
    ends = {(text, w.end): w for text, w in whole.take(10**6)}
    times = [np.zeros(length, int) for length in lengths]
    while taken := request.take(budget):
        for text, w in taken:
            # With the context that its tokens would have if everything were scored.
            assert w.begin == ends[text, w.end].begin
            assert ends[text, w.end].first_target <= w.first_target
            times[text][w.first_target : w.end] += 1
    for count, first in zip(times, firsts, strict=True):
        assert count.tolist() == [0] * first + [1] * (len(count) - first)


@settings(max_examples=20)
@given(cuts(), st.sampled_from([1, 64, 4096]), st.integers(0, 1000))
def test_scores_do_not_depend_on_how_windows_are_batched(
    lm: HuggingFaceLM, reference: ExactReference, cut: tuple[list[int], int, int], budget: int, seed: int
) -> None:
    lengths, window, stride = cut
    draw = np.random.default_rng(seed)
    texts = [draw.integers(1, 400, length).tolist() for length in lengths]
    request, done = score_request(texts, window, stride)
    while not request.is_done:
        request.run(lm, budget)
    assert sorted(done) == list(range(len(texts)))
    shortest = min(range(len(texts)), key=lambda i: lengths[i])
    need = reference.base_scores(texts[shortest], window, stride)
    assert done[shortest].base == pytest.approx(need, abs=1e-3)


@pytest.mark.parametrize("rows", [1, 50, 100_000])
def test_scores_do_not_depend_on_how_many_rows_are_searched_at_once(
    lm: HuggingFaceLM, law: Datastore, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    texts = [[(i * j) % 400 + 1 for i in range(length)] for j, length in enumerate((90, 3, 200, 40), start=1)]

    def scores() -> dict[int, TokenScores]:
        request, done = score_request(texts, 64, 32, Retrieval((Source(law, 16, 20.0, 0.5),)))
        searched = 0
        while not request.is_done:
            searched += request.run(lm, 128).searched
        assert searched == request.tokens_done == sum(len(text) - 1 for text in texts)
        return done

    need = scores()
    monkeypatch.setattr(scoring, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(scoring, "NEIGHBORS_AT_ONCE", 16 * rows)
    have = scores()
    for index in range(len(texts)):
        np.testing.assert_allclose(have[index].mixed, need[index].mixed, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(have[index].base, need[index].base)


# -- exclusion -------------------------------------------------------------------------------------------------------


def test_an_excluded_document_is_never_retrieved(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM
) -> None:
    document = law.document("new-2")
    entries = law.document_entries(document.id)
    # The text of the entries: what was held out of the document's end is not in the store.
    ids = lm.tokenizer.encode(document.text)[: entries.stop - entries.first + 1]
    body = {"model": LAW, "window": 128, "stride": 64, "per_token": True, "knn": {**KNN_BODY, "k": 1, "lambda": 1.0}}
    (itself,) = live_server.score([ids], **body)["results"]
    # Every context finds itself, nearest of all, and with it the token that followed.
    assert itself["mixed"]["nll"] == pytest.approx(0.0, abs=1e-3)
    (others,) = live_server.score([ids], exclude_documents=[document.id], **body)["results"]
    assert others["mixed"]["nll"] is None or others["mixed"]["nll"] > 1
    assert others["base"]["nll"] == pytest.approx(itself["base"]["nll"], abs=1e-3)

    body["knn"] = KNN_BODY
    (excluded,) = live_server.score([ids], exclude_documents=[document.id], **body)["results"]
    need, margins = reference.mixed_scores(law, ids, KNN, 128, 64, exclude=entries)
    clear = margins > NEAR_TIE
    assert clear.mean() > 0.9
    assert log_probs(excluded, "mixed")[clear] == pytest.approx(need[clear], abs=1e-3)

    keys = lm.encode([ids[:127]], [0]).keys
    retrieval = Retrieval((Source(law, KNN.k, KNN.temperature, KNN.lmbda, exclude=(entries,)),))
    found = find(keys, [retrieval] * len(keys)).neighbors
    assert not ((found.entry_ids >= entries.first) & (found.entry_ids < entries.stop)).any()
    assert found.distances.min() > 1e-3
    unrestricted = find(keys, [Retrieval((Source(law, *KNN),))] * len(keys)).neighbors
    assert unrestricted.distances[:, 0].max() < 1e-3


def test_requests_with_and_without_exclusion_do_not_mix(live_server: LiveServer, law: Datastore) -> None:
    text = law.document("new-1").text[:120]
    body = {"model": LAW, "knn": KNN_BODY}
    free = live_server.score([text], **body)["total"]
    excluded = live_server.score([text], exclude_documents=["new-1", "new-3"], **body)["total"]
    assert excluded["mixed"]["nll"] > free["mixed"]["nll"] + 1
    assert live_server.score([text], **body)["total"] == free


# -- batches, forms, sums --------------------------------------------------------------------------------------------


def test_a_batch_equals_its_texts_one_by_one(live_server: LiveServer) -> None:
    texts = [TEXT[: 10 + 23 * i] for i in range(8)]
    body = {"model": LAW, "knn": KNN_BODY, "window": 64, "stride": 48, "per_token": True}
    batch = live_server.score(texts, **body)["results"]
    assert [result["index"] for result in batch] == list(range(8))
    for text, result in zip(texts, batch, strict=True):
        (alone,) = live_server.score([text], **body)["results"]
        for which in ("base", "mixed"):
            assert log_probs(result, which) == pytest.approx(log_probs(alone, which), abs=1e-3)
        assert (result["tokens"], result["bytes"]) == (alone["tokens"], alone["bytes"])


def test_token_ids_score_like_their_text(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    body = {"model": LAW, "knn": KNN_BODY, "per_token": True}
    (text,) = live_server.score([TEXT], **body)["results"]
    (single,) = live_server.score(TEXT, **body)["results"]
    (ids,) = live_server.score([lm.tokenizer.encode(TEXT)], **body)["results"]
    assert single == text
    assert [entry["offset"] for entry in ids["per_token"]] == [None] * ids["tokens"]
    for result in (text, ids):
        for entry in result["per_token"]:
            del entry["offset"]
    assert ids == text


def test_totals_are_sums(live_server: LiveServer) -> None:
    texts = [TEXT, "The court", "Q", "A buyer must keep every key."]
    answer = live_server.score(texts, model=LAW, knn=KNN_BODY, per_token=True)
    results, total = answer["results"], answer["total"]
    for name in ("tokens", "bytes", "searched"):
        assert total[name] == sum(result[name] for result in results)
    for which in ("base", "mixed"):
        nll = sum(result[which]["nll"] for result in results)
        assert total[which]["nll"] == pytest.approx(nll, rel=1e-9)
        assert total[which]["perplexity"] == pytest.approx(math.exp(nll / total["tokens"]), rel=1e-9)
        assert total[which]["bits_per_byte"] == pytest.approx(nll / math.log(2) / total["bytes"], rel=1e-9)
        for result in results:
            assert result[which]["nll"] == pytest.approx(-log_probs(result, which).sum(), abs=1e-4)


def test_bytes_are_those_of_the_scored_tokens(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    (result,) = live_server.score([TEXT], per_token=True)["results"]
    ids = lm.tokenizer.encode(TEXT)
    first = lm.tokenizer.decode(ids[:1])
    assert TEXT.startswith(first)
    assert result["bytes"] == len(TEXT.encode()) - len(first.encode())
    offsets = [entry["offset"] for entry in result["per_token"]]
    assert offsets == sorted(offsets)
    for entry, token_id in zip(result["per_token"], ids[1:], strict=True):
        assert entry["id"] == token_id
        if "\ufffd" not in entry["token"]:
            assert TEXT[entry["offset"] :].startswith(entry["token"])


def test_a_text_without_a_scored_token_counts_nothing(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    nothing = {"nll": 0.0, "perplexity": None, "bits_per_byte": None}
    for empty in ([[]], [[5]], ["Q"], [[], [7]]):
        answer = live_server.score(empty, model=LAW, per_token=True)
        for result in (*answer["results"], answer["total"]):
            assert (result["tokens"], result["bytes"], result["searched"]) == (0, 0, 0)
            assert result["base"] == result["mixed"] == nothing
        assert all(result["per_token"] == [] for result in answer["results"])
    mixed = live_server.score([[5], lm.tokenizer.encode("The court"), []])
    assert [result["tokens"] > 0 for result in mixed["results"]] == [False, True, False]


def test_zero_probability_is_reported_without_infinity(live_server: LiveServer) -> None:
    (result,) = live_server.score(
        ["zzz qqq xxx"], model=LAW, per_token=True, knn={"k": 1, "lambda": 1.0, "temperature": 1.0}
    )["results"]
    assert result["mixed"] == {"nll": None, "perplexity": None, "bits_per_byte": None}
    assert result["base"]["nll"] > 0
    assert min(log_probs(result, "mixed")) == -9999.0


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_default_to_the_context_and_half_of_it(live_server: LiveServer) -> None:
    long = TEXT * 2
    assert live_server.lm.max_length == 256
    default = live_server.score([long])
    assert default["total"]["tokens"] > 256
    assert default == live_server.score([long], window=256, stride=128)
    assert live_server.score([long], window=60) == live_server.score([long], window=60, stride=30)
    assert default != live_server.score([long], window=60)


def test_a_context_shorter_by_setting_shortens_the_default_window(
    start_server: Start, reference: ExactReference, lm: HuggingFaceLM
) -> None:
    server = start_server(max_model_len=40)
    need = reference.base_scores(lm.tokenizer.encode(TEXT), 40, 20)
    assert server.score([TEXT])["total"]["base"]["nll"] == pytest.approx(-need.sum(), abs=0.1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"window": 257}, "window"),
        ({"window": 1}, "window"),
        ({"window": 64, "stride": 64}, "stride"),
        ({"stride": 0}, "stride"),
    ],
)
def test_windows_out_of_bounds_are_refused(live_server: LiveServer, body: dict[str, int], param: str) -> None:
    response = live_server.post("/v1/score", {"input": [TEXT], **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_client_reads_scores(live_server: LiveServer, published: Published) -> None:
    with Client(live_server.url) as client:
        answer = client.score([TEXT], model=LAW, per_token=True, knn=KnnOptions(lmbda=0.4), exclude_documents=["new-0"])
    assert answer.total.tokens == answer.results[0].tokens == len(answer.results[0].per_token or [])
    assert f"law:{published.law_new}:1.0" in (answer.system_fingerprint or "")
