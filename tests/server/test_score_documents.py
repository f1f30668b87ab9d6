"""POST /v1/score of the datastore's own documents, and what of a text stands in the datastore."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from exact_reference import ExactReference, Knn
from live_server import LiveServer

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.types import EntryRange
from knnlm_server.api.schemas.score import Score

LAW = "tiny-lm@law"
KNN = Knn(k=12, temperature=15.0, lmbda=0.4)
BODY: dict[str, Any] = {
    "model": LAW, "knn": {"k": KNN.k, "temperature": KNN.temperature, "lambda": KNN.lmbda}, "window": 128, "stride": 64
}  # fmt: skip
NEAR_TIE = 1e-3
BUCKETS = [[0, 0], [1, 1], [2, 3], [4, 7], [8, 15], [16, 31], [32, None]]
NOTHING = {"nll": 0.0, "perplexity": None}


def documents(*ids: str) -> list[dict[str, str]]:
    return [{"document_id": document_id} for document_id in ids]


def check_shape(live_server: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a score, of the documented shape."""
    response = live_server.post("/v1/score", body)
    assert response.status_code == 200, response.text
    Score.model_validate_json(response.content)
    return response.json()


# -- documents -------------------------------------------------------------------------------------------------------


def test_each_document_excludes_its_own_entries_only(live_server: LiveServer, law: Datastore) -> None:
    ids = ["new-1", "new-4", "new-1"]
    together = check_shape(live_server, {**BODY, "input": documents(*ids), "per_token": True})["results"]
    assert [result["document_id"] for result in together] == ids
    for document_id, result in zip(ids, together, strict=True):
        text = law.document(document_id).text
        alone = live_server.score([text], exclude_documents=[document_id], per_token=True, **BODY)["results"][0]
        del result["index"], result["document_id"], alone["index"]
        assert (result["tokens"], result["bytes"]) == (alone["tokens"], alone["bytes"])
        assert result["base"] == pytest.approx(alone["base"], abs=1e-3)
        assert result["mixed"] == pytest.approx(alone["mixed"], abs=1e-3)
        assert [entry["offset"] for entry in result["per_token"]] == [entry["offset"] for entry in alone["per_token"]]
        found_itself = live_server.score([text], **BODY)["results"][0]
        assert found_itself["mixed"]["nll"] < result["mixed"]["nll"] - 1


def test_a_documents_exclusion_comes_on_top_of_the_requests(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM
) -> None:
    excluded = law.document_entries("new-1"), law.document_entries("new-2")
    # Neighbours in the store, so that one range stands for both.
    span = EntryRange(excluded[0].first, excluded[1].stop)
    assert excluded[0].stop == excluded[1].first
    for own, other in (("new-1", "new-2"), ("new-2", "new-1")):
        body = {**BODY, "input": documents(own), "exclude_documents": [other], "per_token": True}
        (result,) = live_server.score(body.pop("input"), **body)["results"]
        ids = lm.tokenizer.encode(law.document(own).text)
        need, margins = reference.mixed_scores(law, ids, KNN, 128, 64, exclude=span)
        clear = margins > NEAR_TIE
        assert clear.mean() > 0.9
        have = np.array([entry["mixed"] for entry in result["per_token"]])
        assert have[clear] == pytest.approx(need[clear], abs=1e-3)


def test_with_everything_excluded_the_mixture_is_the_base(live_server: LiveServer, law: Datastore) -> None:
    *others, last = law.document_ids()
    for inputs, excluded in ((["The court"], [*others, last]), (documents(last), others)):
        body = {**BODY, "input": inputs, "exclude_documents": excluded, "overlap": True, "per_token": True}
        (result,) = check_shape(live_server, body)["results"]
        assert result["mixed"] == result["base"]
        assert result["base"]["nll"] > 0
        assert {entry["lambda"] for entry in result["per_token"]} == {0.0}
        assert [bucket["tokens"] for bucket in result["overlap"]] == [result["tokens"], 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": documents("new-1")}, 400, "invalid_parameter", "input"),
        ({"input": ["x y"], "overlap": True}, 400, "invalid_parameter", "overlap"),
        ({"input": documents("new-1", "old-1"), "model": LAW}, 404, "document_not_found", "input"),
        ({"input": documents(*["new-1"] * 4097), "model": LAW}, 400, "invalid_parameter", "input"),
        ({"input": documents(""), "model": LAW}, 400, "invalid_parameter", "input"),
        ({"input": ["x", {"document_id": "new-1"}], "model": LAW}, 400, "invalid_parameter", "input"),
        ({"input": [{"document_id": "new-1", "text": "x"}], "model": LAW}, 400, "invalid_parameter", "input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_scored_is_refused_before_the_answer_begins(
    live_server: LiveServer, body: dict[str, Any], status: int, code: str, param: str, stream: bool
) -> None:
    response = live_server.post("/v1/score", {**body, "stream": stream})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["param"].split(".")[0] == param


# -- overlap ---------------------------------------------------------------------------------------------------------


def longest_in(law: Datastore, ids: list[int], excluded: tuple[str, ...] = ()) -> list[int]:
    """Slow and obvious: the longest run that ends at each of tokens 1 … T − 1, exactly."""
    stored = []
    for document_id in law.document_ids():
        if document_id not in excluded:
            entries = law.document_entries(document_id)
            stored.append(tuple(law.values(torch.arange(*entries)).tolist()))
    runs = {n: {values[i : i + n] for values in stored for i in range(len(values) - n + 1)} for n in range(1, 64)}
    return [
        max((n for n in range(1, min(end, 63) + 1) if tuple(ids[end - n : end]) in runs[n]), default=0)
        for end in range(2, len(ids) + 1)
    ]


@pytest.mark.parametrize("own", [False, True])
def test_overlap_is_that_of_a_search_through_the_store(
    live_server: LiveServer, law: Datastore, lm: HuggingFaceLM, own: bool
) -> None:
    text = law.document("new-3").text
    given = documents("new-3") if own else [text]
    answer = check_shape(live_server, {**BODY, "input": given, "overlap": True, "per_token": True})
    (result,) = answer["results"]
    need = longest_in(law, lm.tokenizer.encode(text), ("new-3",) if own else ())
    assert (max(need) == 63) is not own
    reported = [entry["longest_match"] for entry in result["per_token"]]
    assert reported == [0 if not n else min(32, 2 ** int(math.log2(n))) for n in need]
    assert [bucket["longest_match"] for bucket in result["overlap"]] == BUCKETS
    assert sum(bucket["tokens"] for bucket in result["overlap"]) == result["tokens"]
    assert result["overlap"] == answer["total"]["overlap"]
    for bucket in result["overlap"]:
        low, high = bucket["longest_match"]
        members = [
            entry
            for entry, n in zip(result["per_token"], need, strict=True)
            if n >= low and (high is None or n <= high)
        ]
        assert bucket["tokens"] == len(members)
        for which in ("base", "mixed"):
            nll = -math.fsum(entry[which] for entry in members)
            assert bucket[which]["nll"] == pytest.approx(nll, abs=1e-6)
            if members:
                assert bucket[which]["perplexity"] == pytest.approx(math.exp(nll / len(members)))
            else:
                assert bucket[which] == NOTHING


def test_overlaps_add_up_over_texts(live_server: LiveServer) -> None:
    texts = ["The court may refuse every key.", "Q", "zzz 123 qqq", "A buyer must keep the goods. " * 8]
    answer = check_shape(live_server, {**BODY, "input": texts, "overlap": True})
    for position, bucket in enumerate(answer["total"]["overlap"]):
        parts = [result["overlap"][position] for result in answer["results"]]
        assert bucket["tokens"] == sum(part["tokens"] for part in parts)
        assert bucket["mixed"]["nll"] == pytest.approx(sum(part["mixed"]["nll"] for part in parts))
    assert [bucket["tokens"] for bucket in answer["results"][1]["overlap"]] == [0] * 7  # it has no scored token
    filled = [bucket for bucket in answer["total"]["overlap"] if bucket["tokens"]]
    assert len(filled) > 3


def test_a_probability_of_zero_has_no_perplexity_in_its_bucket_either(live_server: LiveServer) -> None:
    knn = {"k": 1, "lambda": 1.0, "temperature": 1.0}
    answer = check_shape(
        live_server, {"model": LAW, "input": ["zzz qqq xxx"], "knn": knn, "overlap": True, "per_token": True}
    )
    assert answer["total"]["mixed"] == {"nll": None, "perplexity": None, "bits_per_byte": None}
    losses = [bucket["mixed"] for bucket in answer["total"]["overlap"] if bucket["tokens"]]
    assert {"nll": None, "perplexity": None} in losses


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["🙂 shall", "你好，世界", "ßß", "ab🙂", "é"])
def test_bytes_are_exact_where_a_character_is_split(live_server: LiveServer, lm: HuggingFaceLM, text: str) -> None:
    ids = lm.tokenizer.encode(text)
    behind_first = len(text.encode()) - len(lm.tokenizer.token_bytes(ids[0]))
    by_text, by_ids = (live_server.score(given)["total"] for given in ([text], [ids]))
    assert by_text["bytes"] == by_ids["bytes"] == behind_first
    assert by_text == by_ids


def test_bytes_of_tokens_that_are_no_text_count_each(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    # Three times the first byte of an emoji: decoded together they would be replacement characters.
    first = lm.tokenizer.encode("🙂")[0]
    size = len(lm.tokenizer.token_bytes(first))
    assert size < 4
    (result,) = live_server.score([[first] * 4])["results"]
    assert result["bytes"] == 3 * size
