"""`echo`: the prompt comes back, scored by the same mixture that generates."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from exact_reference import ExactReference, Knn
from live_server import LiveServer, wait_until
from small_stores import Published
from transformers import AutoModelForCausalLM

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM

LAW = "tiny-lm@law"
PROMPT = "The tenant shall pay the rent on the first day of each month, unless the landlord agrees."
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
NEAR_TIE = 1e-3


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    return choice


@pytest.mark.parametrize("length", [2, 3, 40, 120])
def test_prompt_log_probabilities_are_those_of_transformers(
    live_server: LiveServer, published: Published, length: int
) -> None:
    ids = torch.randint(3, 500, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    logprobs = only(live_server.complete(ids, echo=True, logprobs=3, max_tokens=1))["logprobs"]
    model = AutoModelForCausalLM.from_pretrained(published.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        need = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=1)
    of_prompt = need[torch.arange(length - 1), torch.tensor(ids[1:])]
    assert logprobs["token_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][1:length], of_prompt.numpy(), rtol=0, atol=1e-4)
    assert logprobs["token_logprobs"][length] == pytest.approx(need[-1].max().item(), abs=1e-4)
    best = [max(top.values()) for top in logprobs["top_logprobs"][1:]]
    np.testing.assert_allclose(best, need.amax(1).numpy(), rtol=0, atol=1e-4)


def test_prompt_log_probabilities_of_a_mixture_equal_a_float64_recomputation(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM
) -> None:
    knn = Knn(16, 20.0, 0.6)
    asked = {"k": knn.k, "temperature": knn.temperature, "lambda": knn.lmbda}
    logprobs = only(live_server.complete(PROMPT, model=LAW, echo=True, logprobs=0, max_tokens=0, knn=asked))["logprobs"]
    ids = lm.tokenizer.encode(PROMPT)
    need, margins = reference.mixed_scores(law, ids, knn, window=len(ids) + 1, stride=1)
    certain = margins > NEAR_TIE
    assert certain.sum() > len(ids) // 2
    np.testing.assert_allclose(np.array(logprobs["token_logprobs"][1:])[certain], need[certain], rtol=0, atol=1e-3)


def test_an_echoed_prompt_equals_its_score(live_server: LiveServer) -> None:
    echoed = only(live_server.complete(PROMPT, model=LAW, echo=True, logprobs=0, max_tokens=0))
    (scored,) = live_server.score([PROMPT], model=LAW, per_token=True, window=128)["results"]
    have = echoed["logprobs"]
    np.testing.assert_allclose(
        have["token_logprobs"][1:], [token["mixed"] for token in scored["per_token"]], rtol=0, atol=1e-4
    )
    assert have["tokens"][1:] == [token["token"] for token in scored["per_token"]]
    assert have["text_offset"][1:] == [token["offset"] for token in scored["per_token"]]


@pytest.mark.parametrize("generated", [0, 1, 5])
def test_there_is_one_entry_per_prompt_and_generated_token(live_server: LiveServer, generated: int) -> None:
    answer = live_server.complete(
        [[5, 6, 7], [8] * 90], echo=True, logprobs=2, max_tokens=generated, ignore_eos=True, n=2
    )
    for choice in answer["choices"]:
        count = (3, 90)[choice["index"] // 2] + generated
        assert [len(choice["logprobs"][column]) for column in COLUMNS] == [count] * 4
        assert choice["logprobs"]["top_logprobs"][0] is None
        for log_prob, top in zip(*(choice["logprobs"][name][1:] for name in COLUMNS[1:3]), strict=True):
            assert log_prob in top.values()  # the very same float
            assert 2 <= len(top) <= 3
        assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4 * generated


def test_a_generated_eos_has_an_entry_of_its_own(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    eos = lm.tokenizer.eos_token_ids[0]
    answer = live_server.complete([5, 6, 7], echo=True, logprobs=1, max_tokens=1, logit_bias={str(eos): 100})
    choice = only(answer)
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert choice["text"] == lm.tokenizer.decode([5, 6, 7])


@pytest.mark.parametrize("prompt", [PROMPT, "Grüße aus Köln — 你好, 🙂🙂!", " leading and trailing "])
def test_a_text_is_echoed_as_it_was_given(live_server: LiveServer, prompt: str) -> None:
    plain = only(live_server.complete(prompt, max_tokens=6, ignore_eos=True))["text"]
    choice = only(live_server.complete(prompt, max_tokens=6, ignore_eos=True, echo=True, logprobs=0))
    assert choice["text"] == prompt + plain
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-6] == len(prompt)


def test_offsets_say_where_each_token_begins(live_server: LiveServer) -> None:
    choice = only(live_server.complete(PROMPT, max_tokens=12, ignore_eos=True, echo=True, logprobs=0))
    logprobs, text = choice["logprobs"], choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)


def test_token_ids_are_echoed_as_their_text(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    by_text = only(live_server.complete(PROMPT, max_tokens=4, echo=True, logprobs=1))
    by_ids = only(live_server.complete(lm.tokenizer.encode(PROMPT), max_tokens=4, echo=True, logprobs=1))
    assert by_text == by_ids


def test_without_logprobs_nothing_of_the_prompt_is_reported_but_its_text(live_server: LiveServer) -> None:
    choice = only(live_server.complete(PROMPT, max_tokens=0, echo=True))
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (PROMPT, None, "length")


@pytest.mark.parametrize("max_tokens", [0, 7])
def test_a_stream_echoes_first_and_says_the_same(live_server: LiveServer, max_tokens: int) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "n": 2, "seed": 4, "temperature": 0.8, "model": LAW}
    whole = live_server.complete(PROMPT, **body)
    chunks = live_server.stream(PROMPT, **body, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert pieces[0]["text"].startswith(PROMPT)
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        for column in COLUMNS:
            joined = [value for piece in pieces for value in piece["logprobs"][column]]
            if column == "token_logprobs":
                assert joined[1:] == pytest.approx(choice["logprobs"][column][1:], abs=1e-4)
            elif column != "top_logprobs":
                assert joined == choice["logprobs"][column]


def test_a_prompt_is_scored_alike_alone_and_among_others(live_server: LiveServer) -> None:
    prompts = [[7 + i, *range(20 + i, 60 + 3 * i)] for i in range(8)]
    body = {"echo": True, "logprobs": 0, "max_tokens": 0, "model": LAW}
    together = live_server.complete(prompts, **body)["choices"]
    for prompt, among in zip(prompts, together, strict=True):
        alone = only(live_server.complete(prompt, **body))
        np.testing.assert_allclose(
            alone["logprobs"]["token_logprobs"][1:], among["logprobs"]["token_logprobs"][1:], rtol=0, atol=1e-4
        )


def test_best_of_returns_the_choices_with_the_best_mean_log_probability(live_server: LiveServer) -> None:
    body = {"temperature": 1.3, "seed": 11, "max_tokens": 8, "logprobs": 0}
    every = live_server.complete([PROMPT, "Rent"], n=6, **body)
    best = live_server.complete([PROMPT, "Rent"], n=2, best_of=6, **body)
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"]
    for prompt in range(2):
        ranked = sorted(
            every["choices"][6 * prompt : 6 * prompt + 6], key=lambda c: -np.mean(c["logprobs"]["token_logprobs"])
        )
        got = best["choices"][2 * prompt : 2 * prompt + 2]
        assert [choice["text"] for choice in got] == [choice["text"] for choice in ranked[:2]]


def test_every_chunk_carries_the_usage_so_far_when_asked(live_server: LiveServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = live_server.stream(PROMPT, max_tokens=5, ignore_eos=True, logprobs=0, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]
    assert all(chunk["usage"]["total_tokens"] > chunk["usage"]["completion_tokens"] for chunk in chunks)
    assert chunks[-1]["choices"] == []


def test_the_chosen_token_keeps_its_own_float_where_texts_collide(live_server: LiveServer) -> None:
    prompt = "你好世界 🙂🙃 — Grüße, ça va? 你们好吗"
    logprobs = only(live_server.complete(prompt, max_tokens=8, ignore_eos=True, echo=True, logprobs=20))["logprobs"]
    assert sum("\ufffd" in token for token in logprobs["tokens"]) > 8
    for token, log_prob, top in zip(*(logprobs[name][1:] for name in COLUMNS[:3]), strict=True):
        assert top[token] == log_prob
        assert 20 <= len(top) <= 21  # nothing is lost to a token of the same text


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"n": 0, "best_of": 1}, "n", "`n` must be from 1 to 128, got 0"),
        ({"n": -1, "best_of": 3}, "n", "`n` must be from 1 to 128, got -1"),
        ({"best_of": 200}, "best_of", "`best_of` must be from 1 to 128, got 200"),
        ({"best_of": 50}, "best_of", "`best_of` must be at most 8, .* got 50"),
        ({"logit_bias": {"5": 10**400}}, "logit_bias", "got an integer of 1329 bits for token 5"),
        (
            {"prompt": [[5] * 250] * 200, "n": 8, "echo": True, "max_tokens": 0, "logprobs": 20},
            "logprobs",
            "at most 2000000 log-probabilities in one answer, got 400000 tokens × 21 = 8400000",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_no_answer_can_hold_is_refused(
    live_server: LiveServer, body: dict[str, Any], param: str, said: str
) -> None:
    response = live_server.post("/v1/completions", {"prompt": PROMPT, **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert re.search(said, error["message"]), error["message"]


def test_null_means_what_leaving_out_means(live_server: LiveServer) -> None:
    names = ("echo", "stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "stream_options")
    plain = only(live_server.complete(PROMPT, max_tokens=4))
    assert only(live_server.complete(PROMPT, max_tokens=4, **dict.fromkeys(names))) == plain


def test_running_usage_tells_of_searches_and_cached_tokens(live_server: LiveServer) -> None:
    prompt = [(11 * i) % 400 + 7 for i in range(100)]
    live_server.complete(prompt, max_tokens=1)
    options = {"continuous_usage_stats": True}
    chunks = live_server.stream(prompt, model=LAW, max_tokens=4, ignore_eos=True, logprobs=0, stream_options=options)
    assert all(chunk["usage"]["prompt_tokens_details"]["cached_tokens"] == 96 for chunk in chunks)
    searched = [chunk["usage"]["knn"]["searched"] for chunk in chunks]
    assert searched == sorted(searched)
    assert searched[0] >= 1
    assert searched[-1] == 4


def test_a_job_that_cannot_be_built_gives_its_lease_back(
    live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no renderer today")

    for place in ("completions.CompletionRenderer.__init__", "generation.GenerationJob._request"):
        with monkeypatch.context() as patch:
            patch.setattr(f"knnlm_server.api.{place}", fail)
            assert live_server.post("/v1/completions", {"prompt": PROMPT, "model": LAW}).status_code == 500
    wait_until(live_server.is_idle)
