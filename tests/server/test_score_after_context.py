"""POST /v1/score of texts that go on from a context: it is conditioned on and not scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from exact_reference import ExactReference, Knn
from live_server import LiveServer, parse_events
from tokenizers.processors import TemplateProcessing

from knnlm_client import AfterContext, Client
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_server.api import score_inputs
from knnlm_server.api.schemas.score import Score, ScoreBody
from knnlm_server.api.score_inputs import read_texts
from knnlm_server.api.state import Backend
from tiny import tiny_tokenizer

LAW = "tiny-lm@law"
KNN = Knn(k=12, temperature=15.0, lmbda=0.4)
BODY: dict[str, Any] = {
    "model": LAW, "knn": {"k": KNN.k, "temperature": KNN.temperature, "lambda": KNN.lmbda}, "per_token": True
}  # fmt: skip
CONTEXT, TEXT = "3. new: Der Käufer schuldet the goods. The café’s", " landlord must keep its value 🙂. Der Käufer"
NEAR_TIE = 1e-3


def after(context: Any, text: Any) -> dict[str, Any]:
    return {"context": context, "text": text}


def scored(server: LiveServer, inputs: Any, **options: Any) -> dict[str, Any]:
    response = server.post("/v1/score", {**BODY, "input": inputs, **options})
    assert response.status_code == 200, response.text
    Score.model_validate_json(response.content)
    return response.json()


def without_offsets(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "per_token": [{**entry, "offset": None} for entry in result["per_token"]]}


@pytest.mark.parametrize(("window", "stride"), [(256, 128), (24, 8), (2, 1)])
def test_what_follows_a_context_is_scored_as_the_end_of_the_whole(
    live_server: LiveServer, lm: HuggingFaceLM, window: int, stride: int
) -> None:
    context, text = lm.tokenizer.encode(CONTEXT), lm.tokenizer.encode(TEXT)
    options = {"window": window, "stride": stride, "overlap": True}
    (whole,) = scored(live_server, [context + text], **options)["results"]
    (part,) = scored(live_server, [after(context, text)], **options)["results"]
    assert part["tokens"] == part["searched"] == len(text)
    assert part["bytes"] == len(TEXT.encode())
    for have, need in zip(part["per_token"], whole["per_token"][-len(text) :], strict=True):
        assert (have["id"], have["longest_match"]) == (need["id"], need["longest_match"])
        for which in ("base", "mixed", "lambda"):
            assert have[which] == pytest.approx(need[which], abs=1e-4)
    assert sum(bucket["tokens"] for bucket in part["overlap"]) == len(text)


def test_a_context_counts_as_a_float64_recomputation_has_it(
    live_server: LiveServer, lm: HuggingFaceLM, reference: ExactReference, law: Datastore
) -> None:
    context, text = lm.tokenizer.encode(CONTEXT), lm.tokenizer.encode(TEXT)
    (result,) = scored(live_server, [after(context, text)])["results"]
    need, margins = [], []
    for end, token in enumerate(text):
        log_probs, margin = reference.mixed(law, context + text[:end], KNN)
        need.append(log_probs[token])
        margins.append(margin)
    clear = np.array(margins) > NEAR_TIE
    assert clear.mean() > 0.9
    have = np.array([entry["mixed"] for entry in result["per_token"]])
    assert have[clear] == pytest.approx(np.array(need)[clear], abs=1e-3)


def test_texts_are_tokenised_by_themselves_and_tell_their_own_offsets(
    live_server: LiveServer, lm: HuggingFaceLM
) -> None:
    # Cut inside what would be one token of the whole.
    whole = lm.tokenizer.encode("The datastore")
    for context, text in ((CONTEXT, TEXT), ("The datas", "tore"), ("x", "🙂")):
        ids = lm.tokenizer.encode(context), lm.tokenizer.encode(text)
        if text == "tore":
            assert [*ids[0], *ids[1]] != whole
        (by_text,) = scored(live_server, [after(context, text)])["results"]
        (by_ids,) = scored(live_server, [after(*ids)])["results"]
        assert without_offsets(by_text) == by_ids
        assert by_text["bytes"] == len(text.encode())
        offsets = [entry["offset"] for entry in by_text["per_token"]]
        assert offsets == lm.tokenizer.encode_with_spans(text).char_spans[:, 0].tolist()


def test_a_batch_a_stream_and_the_client_give_the_same(live_server: LiveServer) -> None:
    inputs = [after(CONTEXT[: 9 * i], TEXT[: 13 * i]) for i in range(1, 5)] + [after(CONTEXT, "")]
    batch = scored(live_server, inputs)
    for given, result in zip(inputs[:-1], batch["results"], strict=False):
        (alone,) = scored(live_server, [given])["results"]
        assert alone["mixed"]["nll"] == pytest.approx(result["mixed"]["nll"], abs=1e-3)
        assert (alone["tokens"], alone["bytes"]) == (result["tokens"], result["bytes"])
    nothing = batch["results"][-1]
    assert (nothing["tokens"], nothing["bytes"], nothing["per_token"]) == (0, 0, [])
    lines = live_server.post("/v1/score", {**BODY, "input": inputs, "stream": True}).text.splitlines()
    assert f'"tokens":{batch["total"]["tokens"]},' in lines[-1]
    with Client(live_server.url) as client:
        pairs = [AfterContext(**given) for given in inputs]
        answer = client.score(pairs, model=LAW, per_token=True, knn={**BODY["knn"]})  # type: ignore[typeddict-item]
    assert answer.total.mixed.nll == pytest.approx(batch["total"]["mixed"]["nll"], abs=1e-3)


def test_what_is_scored_is_attributed_too(live_server: LiveServer) -> None:
    knn = {**BODY["knn"], "attribution": True}
    (result,) = scored(live_server, [after(CONTEXT, TEXT)], knn=knn)["results"]
    for entry in result["per_token"]:
        shares = [entry["attribution"]["model"], *(source["share"] for source in entry["attribution"]["sources"])]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert min(shares) >= 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [True, False])
def test_a_completion_is_scored_after_its_prompt_as_it_was_generated(
    live_server: LiveServer, lm: HuggingFaceLM, stream: bool, logprobs: bool
) -> None:
    """Its token ids from the trace; strings would do where the tokenizer happens to cut them alike."""
    knn = {**BODY["knn"], "trace": True}
    body = {"model": LAW, "max_tokens": 12, "ignore_eos": True, "logprobs": 0 if logprobs else None, "knn": knn}
    if stream:
        response = live_server.post("/v1/completions", {"prompt": CONTEXT, "temperature": 0, "stream": True, **body})
        choices = [choice for event in parse_events(response.text) for choice in event["choices"]]
    else:
        choices = live_server.complete(CONTEXT, **body)["choices"]
    trace = [entry for choice in choices for entry in choice.get("knn") or []]
    ids = [entry["token_id"] for entry in trace]
    (result,) = scored(live_server, [after(lm.tokenizer.encode(CONTEXT), ids)])["results"]
    have = [entry["mixed"] for entry in result["per_token"]]
    assert np.exp(have) == pytest.approx([entry["p"] for entry in trace], abs=1e-4)
    if logprobs:
        reported = [p for choice in choices for p in (choice["logprobs"] or {}).get("token_logprobs", [])]
        assert have == pytest.approx(reported, abs=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        (after("", "x"), "input.0.context", "`input.0.context` must hold at least 1 token, got 0"),
        (after([], [5]), "input.0.context", "`input.0.context` must hold at least 1 token, got 0"),
        (after("x", [5]), "input.0.text", "valid string"),
        (after([5], "x"), "input.0.text", "valid list"),
        (after([5], [512]), "input.0.text", "`input.0.text` holds token id 512; ids must be in 0 … 511"),
        (after([5, -1], [5]), "input.0.context", "`input.0.context` holds token id -1"),
        (after([5, "x"], [5]), "input.0.context.1", "valid integer, got 'x'"),
        ({"context": "x"}, "input.0.text", "Field required"),
        ({"text": "x"}, "input.0.context", "Field required"),
        ({**after("x", "y"), "document_id": "new-1"}, "input.0.context", "not permitted"),
        ({**after("x", "y"), "weight": 1}, "input.0.weight", "not permitted"),
    ],
)
def test_what_is_no_text_after_a_context_is_refused_by_its_field(
    live_server: LiveServer, given: dict[str, Any], param: str, message: str
) -> None:
    response = live_server.post("/v1/score", {**BODY, "input": [given]})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_parameter", param)
    assert message in error["message"]


def test_forms_do_not_mix_and_the_element_is_named(live_server: LiveServer) -> None:
    for inputs, param in (
        ([after("x", "y"), {"document_id": "new-1"}], "input.1.context"),
        ([{"document_id": "new-1"}, after("x", "y")], "input.1.document_id"),
        (["x", after("x", "y")], "input.1"),
        ([after("x", "y"), "x"], "input.1"),
        ([[5], after([5], [5])], "input.1"),
        (after("x", "y"), "input"),
    ):
        error = live_server.post("/v1/score", {**BODY, "input": inputs}).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_parameter", param), error


def test_a_context_counts_towards_the_tokens_of_a_request(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_inputs, "MAX_SCORE_TOKENS", 8)
    scored(live_server, [after([5] * 6, [7] * 2)])
    response = live_server.post("/v1/score", {**BODY, "input": [after([5] * 6, [7] * 2), after([5], [7])]})
    assert response.status_code == 400
    assert "at most 8 tokens in all, got 10" in response.json()["error"]["message"]


def test_a_tokenizers_bos_stands_before_the_context_alone() -> None:
    raw = tiny_tokenizer()
    raw.add_special_tokens({"bos_token": "<|start|>"})
    raw.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", raw.bos_token_id)]
    )
    tokenizer = Tokenizer(raw)
    assert tokenizer.bos_token_ids == (raw.bos_token_id,)
    lm = SimpleNamespace(identity=SimpleNamespace(vocab_size=len(tokenizer)))
    backend = cast(Backend, SimpleNamespace(tokenizer=tokenizer, lm=lm))
    body = ScoreBody.model_validate({"input": [after("The", " buyer")], "per_token": True})
    (text,) = read_texts(backend, body, None, lambda: None)
    bare = tokenizer.encode("The", add_bos=False), tokenizer.encode(" buyer", add_bos=False)
    assert text.token_ids.tolist() == [raw.bos_token_id, *bare[0], *bare[1]]
    assert (text.first, text.num_scored, text.num_bytes) == (1 + len(bare[0]), len(bare[1]), 6)
    assert text.starts is not None
    assert text.starts[0] == 0
