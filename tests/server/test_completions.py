"""POST /v1/completions on a live server: what comes back, streamed and not, with and without a datastore."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from exact_reference import ExactReference, Knn
from live_server import LiveServer, slowed
from small_stores import Published, Start

from knnlm_client import Client, KnnOptions
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.huggingface import HuggingFaceLM

PROMPT = "1. new: The tenant may"
LAW = "tiny-lm@law"
EOS_NOW = {"0": 100.0}
NEAR_TIE = 1e-3


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    return choice


def token_ids(choice: dict[str, Any]) -> list[int]:
    """The tokens of a choice that was asked for with a trace."""
    return [entry["token_id"] for entry in choice["knn"]]


# -- shape ---------------------------------------------------------------------------------------------------------


def test_answer_has_the_openai_shape(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    answer = live_server.complete(PROMPT, max_tokens=5)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny-lm"
    assert answer["system_fingerprint"] == lm.identity.model_fingerprint
    assert only(answer).keys() == {"index", "text", "logprobs", "finish_reason"}
    assert only(answer)["logprobs"] is None
    prompt_tokens = len(lm.tokenizer.encode(PROMPT))
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": prompt_tokens + 5,
        "prompt_tokens_details": answer["usage"]["prompt_tokens_details"],
    }
    assert answer["usage"]["prompt_tokens_details"].keys() == {"cached_tokens"}


def test_a_completion_has_16_tokens_by_default(live_server: LiveServer) -> None:
    answer = live_server.complete(PROMPT, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert only(answer)["finish_reason"] == "length"


def test_fingerprint_names_store_version_generation_and_revision(
    live_server: LiveServer, published: Published, lm: HuggingFaceLM
) -> None:
    answer = live_server.complete(PROMPT, model=LAW, max_tokens=1)
    assert answer["model"] == LAW
    assert answer["system_fingerprint"] == f"{lm.identity.model_fingerprint}-law:{published.law_new}:1.0"


def test_the_client_reads_what_the_server_writes(live_server: LiveServer) -> None:
    raw = live_server.complete(PROMPT, model=LAW, max_tokens=6, logprobs=2, knn={"trace": True, "lambda": 0.5})
    knn = KnnOptions(trace=True, lmbda=0.5)
    with Client(live_server.url) as client:
        typed = client.completions(PROMPT, model=LAW, max_tokens=6, temperature=0, logprobs=2, knn=knn)
        with client.stream_completions(PROMPT, model=LAW, max_tokens=6, temperature=0, knn=knn) as chunks:
            streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert typed.choices[0].text == only(raw)["text"] == streamed
    assert typed.usage.knn is not None
    assert typed.usage.knn.searched == 6
    trace = typed.choices[0].knn
    assert trace is not None
    assert [t.lmbda for t in trace] == [0.5] * 6
    assert all(t.neighbors and t.neighbors[0].document_id for t in trace)


# -- the plain LM ----------------------------------------------------------------------------------------------------


def greedy_reference(reference: ExactReference, prompt_ids: list[int], count: int) -> list[int]:
    generated: list[int] = []
    for _ in range(count):
        row = reference.run(prompt_ids + generated).log_probs[-1]
        first, second = np.sort(row)[-2:][::-1]
        assert first - second > NEAR_TIE, "choose another prompt: this one meets a near-tie"
        generated.append(int(row.argmax()))
    return generated


def test_greedy_takes_the_most_likely_token_each_time(
    live_server: LiveServer, reference: ExactReference, lm: HuggingFaceLM
) -> None:
    prompt_ids = lm.tokenizer.encode(PROMPT)
    need = greedy_reference(reference, prompt_ids, 12)
    choice = only(live_server.complete(PROMPT, max_tokens=12, ignore_eos=True, knn={"trace": True}))
    assert token_ids(choice) == need
    assert choice["text"] == lm.tokenizer.decode(need, skip_special_tokens=True)


@pytest.mark.parametrize("knn", [{"lambda": 0.0}, {"gate": "never"}, {"gate": "never", "lambda": 1.0}])
def test_lambda_zero_and_gate_never_are_the_plain_lm(live_server: LiveServer, knn: dict[str, Any]) -> None:
    plain = live_server.complete(PROMPT, max_tokens=20, logprobs=3)
    mixed = live_server.complete(PROMPT, model=LAW, max_tokens=20, logprobs=3, knn=knn)
    assert only(mixed)["text"] == only(plain)["text"]
    assert only(mixed)["logprobs"]["tokens"] == only(plain)["logprobs"]["tokens"]
    assert only(mixed)["logprobs"]["token_logprobs"] == pytest.approx(
        only(plain)["logprobs"]["token_logprobs"], abs=1e-4
    )
    never = knn.get("gate") == "never"
    counts = mixed["usage"]["knn"]
    assert (counts["searched"], counts["skipped"]) == ((0, 20) if never else (20, 0))


# -- the mixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knn", [Knn(8, 5.0, 0.5), Knn(32, 20.0, 0.9), Knn(1, 1.0, 0.25), Knn(64, 100.0, 1.0)], ids=str)
def test_reported_log_probability_equals_a_float64_recomputation(
    live_server: LiveServer, reference: ExactReference, law: Datastore, lm: HuggingFaceLM, knn: Knn
) -> None:
    prompt_ids = lm.tokenizer.encode(PROMPT)
    choice = only(
        live_server.complete(
            PROMPT,
            model=LAW,
            max_tokens=16,
            seed=3,
            temperature=1.0,
            ignore_eos=True,
            logprobs=5,
            knn={"k": knn.k, "temperature": knn.temperature, "lambda": knn.lmbda, "trace": True},
        )
    )
    generated = token_ids(choice)
    assert len(generated) == 16
    compared = 0
    for position, (token_id, log_prob) in enumerate(zip(generated, choice["logprobs"]["token_logprobs"], strict=True)):
        need, margin = reference.mixed(law, prompt_ids + generated[:position], knn)
        if margin < NEAR_TIE:  # which neighbour is the k-th is a matter of rounding
            continue
        compared += 1
        assert log_prob == pytest.approx(need[token_id], abs=1e-3), f"token {position}"
        best = [value for value in np.sort(need)[-5:][::-1] if value > -np.inf]
        top = sorted(choice["logprobs"]["top_logprobs"][position].values(), reverse=True)
        assert top[0] == pytest.approx(best[0], abs=1e-3)
    assert compared >= 12


def test_lambda_one_gives_only_tokens_that_a_neighbour_holds(live_server: LiveServer) -> None:
    for seed in range(5):
        answer = live_server.complete(
            PROMPT, model=LAW, max_tokens=16, temperature=1.5, seed=seed, knn={"k": 5, "lambda": 1.0, "trace": True}
        )
        for entry in only(answer)["knn"]:
            assert entry["token"] in {neighbor["token"] for neighbor in entry["neighbors"]}


def test_trace_is_consistent_with_itself_and_with_the_documents(live_server: LiveServer, law: Datastore) -> None:
    k, lmbda = 16, 0.7
    answer = live_server.complete(
        PROMPT, model=LAW, max_tokens=24, logprobs=0, knn={"k": k, "lambda": lmbda, "temperature": 9, "trace": True}
    )
    choice = only(answer)
    assert len(choice["knn"]) == answer["usage"]["completion_tokens"]
    columns = zip(choice["knn"], choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True)
    for entry, token, log_prob in columns:
        assert entry["token"] == token
        assert (entry["searched"], entry["decision"], entry["lambda"]) == (True, "always", pytest.approx(lmbda))
        assert entry["p"] == pytest.approx(lmbda * entry["p_knn"] + (1 - lmbda) * entry["p_lm"], abs=1e-5)
        assert entry["p"] == pytest.approx(np.exp(log_prob), abs=1e-6)
        near = entry["neighbors"]
        assert 1 <= len(near) <= k
        assert [n["distance"] for n in near] == sorted(n["distance"] for n in near)
        assert [n["weight"] for n in near] == sorted((n["weight"] for n in near), reverse=True)
        assert sum(n["weight"] for n in near) <= 1 + 1e-6
        same = sum(n["weight"] for n in near if n["token"] == entry["token"])
        if "\ufffd" not in entry["token"]:
            assert same <= entry["p_knn"] + 1e-5
        for neighbor in near:
            source = law.document(neighbor["document_id"])
            text = source.text[neighbor["char_start"] : neighbor["char_end"]]
            assert (neighbor["uri"], neighbor["title"]) == (source.uri, source.title)
            # A token may be a part of a character; then its place is the whole character.
            assert text == neighbor["token"] or "\ufffd" in neighbor["token"]


def test_every_field_of_knn_has_its_effect(live_server: LiveServer) -> None:
    def trace(**knn: Any) -> dict[str, Any]:
        answer = live_server.complete(PROMPT, model=LAW, max_tokens=1, knn={"trace": True, **knn})
        (entry,) = only(answer)["knn"]
        return entry

    base = {"k": 4, "temperature": 5.0, "lambda": 0.25, "gate": "always"}
    assert len(trace(**base)["neighbors"]) == 4
    assert len(trace(**{**base, "k": 2})["neighbors"]) == 2
    assert trace(**{**base, "lambda": 0.75})["lambda"] == 0.75
    hot, cold = trace(**{**base, "temperature": 1e6}), trace(**{**base, "temperature": 1e-3})
    assert hot["neighbors"][0]["weight"] == pytest.approx(0.25, abs=1e-3)  # uniform over four
    assert cold["neighbors"][0]["weight"] == pytest.approx(1.0, abs=1e-3)
    never = trace(**{**base, "gate": "never"})
    assert (never["searched"], never["decision"], never["lambda"], never["neighbors"]) == (False, "never", 0.0, [])


def test_what_is_left_out_of_knn_comes_from_the_calibration(live_server: LiveServer) -> None:
    calibration = live_server.http.get("/v1/datastores/law").json()["calibration"]
    names = ("k", "temperature", "lambda", "gate")
    spelled_out = {name: calibration[name] for name in names}
    defaulted = live_server.complete(PROMPT, model=LAW, max_tokens=12, logprobs=2)
    given = live_server.complete(PROMPT, model=LAW, max_tokens=12, logprobs=2, knn=spelled_out)
    assert only(defaulted) == only(given)


def test_a_store_is_chosen_by_model_name_or_by_knn(live_server: LiveServer) -> None:
    by_model = live_server.complete(PROMPT, model=LAW, max_tokens=12, logprobs=1)
    for body in ({"knn": {"datastore": "law"}}, {"model": LAW, "knn": {"datastore": "law"}}):
        other = live_server.complete(PROMPT, max_tokens=12, logprobs=1, **body)
        assert only(other) == only(by_model)
        assert (other["model"], other["system_fingerprint"]) == (LAW, by_model["system_fingerprint"])
    news = live_server.complete(PROMPT, model="tiny-lm@news", max_tokens=12, logprobs=1)
    assert only(news) != only(by_model)


def test_a_default_datastore_serves_requests_that_name_none(published: Published, start_server: Start) -> None:
    server = start_server(datastores=published.root, load=("news",), default_datastore="news")
    answer = server.complete(PROMPT, max_tokens=2)
    assert answer["model"] == "tiny-lm@news"
    assert answer["usage"]["knn"]["searched"] == 2
    assert server.http.get("/v1/datastores").json()["published"] == ["law"]


def test_usage_counts_the_tokens_of_all_prompts_and_choices(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    prompts = [PROMPT, "A buyer"]
    answer = live_server.complete(
        prompts, model=LAW, n=2, max_tokens=3, ignore_eos=True, temperature=1.0, knn={"lambda": 0.5}
    )
    prompt_tokens = sum(len(lm.tokenizer.encode(prompt)) for prompt in prompts)
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": prompt_tokens + 12,
        "prompt_tokens_details": answer["usage"]["prompt_tokens_details"],
        "knn": {"searched": 12, "followed": 0, "skipped": 0, "drafted": 0, "accepted": 0},
    }


# -- prompts and choices ---------------------------------------------------------------------------------------------


def test_index_is_prompt_times_n_plus_choice(live_server: LiveServer) -> None:
    prompts = [PROMPT, "A buyer shall", "The court"]
    answer = live_server.complete(prompts, n=2, max_tokens=6)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for index, prompt in enumerate(prompts):
        alone = only(live_server.complete(prompt, max_tokens=6))["text"]
        assert [answer["choices"][2 * index + j]["text"] for j in range(2)] == [alone, alone]


def test_token_ids_are_a_prompt_like_their_text(live_server: LiveServer, lm: HuggingFaceLM) -> None:
    ids, other = lm.tokenizer.encode(PROMPT), lm.tokenizer.encode("A buyer shall")
    text = live_server.complete([PROMPT, "A buyer shall"], max_tokens=8)["choices"]
    assert live_server.complete([ids, other], max_tokens=8)["choices"] == text
    assert only(live_server.complete(ids, max_tokens=8)) == text[0]


def test_choices_of_one_request_differ_when_sampled(live_server: LiveServer) -> None:
    answer = live_server.complete(PROMPT, n=4, max_tokens=12, temperature=2.0, seed=1)
    assert len({choice["text"] for choice in answer["choices"]}) == 4


# -- sampling --------------------------------------------------------------------------------------------------------


def test_seed_reproduces_in_any_batch(live_server: LiveServer) -> None:
    body = {"model": LAW, "max_tokens": 20, "temperature": 1.0, "seed": 11, "n": 2, "knn": {"lambda": 0.3}}
    alone = live_server.complete(PROMPT, **body)["choices"]
    with ThreadPoolExecutor(12) as pool:
        crowd = [
            pool.submit(live_server.complete, f"{i} crowd", max_tokens=25, temperature=1.0, seed=i) for i in range(10)
        ]
        again = [pool.submit(live_server.complete, PROMPT, **body) for _ in range(2)]
        assert [future.result()["choices"] for future in again] == [alone, alone]
        assert len({only(future.result())["text"] for future in crowd}) == 10
    other = live_server.complete(PROMPT, **{**body, "seed": 12})["choices"]
    assert other != alone


def test_sampling_without_a_seed_varies(live_server: LiveServer) -> None:
    texts = {only(live_server.complete(PROMPT, max_tokens=12, temperature=2.0))["text"] for _ in range(4)}
    assert len(texts) > 1


# -- ends ------------------------------------------------------------------------------------------------------------


def test_eos_ends_a_choice_and_counts_as_a_token_without_text(live_server: LiveServer) -> None:
    answer = live_server.complete(PROMPT, max_tokens=8, logit_bias=EOS_NOW, logprobs=1)
    choice = only(answer)
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert answer["usage"]["completion_tokens"] == 1
    assert choice["logprobs"]["tokens"] == ["<|end|>"]


def test_ignore_eos_goes_on_to_the_end(live_server: LiveServer) -> None:
    answer = live_server.complete(PROMPT, max_tokens=8, logit_bias=EOS_NOW, ignore_eos=True)
    assert only(answer)["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8


def test_min_tokens_holds_the_end_back(live_server: LiveServer) -> None:
    answer = live_server.complete(PROMPT, max_tokens=8, min_tokens=5, logit_bias=EOS_NOW)
    assert only(answer)["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 6


def test_a_stop_token_ends_a_choice(live_server: LiveServer) -> None:
    first = only(live_server.complete(PROMPT, max_tokens=4, knn={"trace": True}))
    third = token_ids(first)[2]
    answer = live_server.complete(PROMPT, max_tokens=4, stop_token_ids=[third])
    assert only(answer)["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == token_ids(first).index(third) + 1


def across_tokens(choice: dict[str, Any]) -> str:
    """A string that begins inside one token of the text and ends inside another, first found where it is expected."""
    tokens = choice["logprobs"]["tokens"]
    for left, right in pairwise(tokens[3:]):
        stop = left[-1] + right[0]
        if stop.isprintable() and "\ufffd" not in stop:
            return stop
    raise AssertionError(f"choose another prompt: no two readable tokens in {tokens}")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_cuts_the_text_there(live_server: LiveServer, include: bool) -> None:
    body = {"model": LAW, "max_tokens": 40, "knn": {"lambda": 0.95}}
    whole = only(live_server.complete(PROMPT, logprobs=0, **body))
    stop = across_tokens(whole)
    body |= {"stop": ["never in it", stop], "include_stop_str_in_output": include}
    choice = only(live_server.complete(PROMPT, **body))
    need = whole["text"][: whole["text"].index(stop)] + (stop if include else "")
    assert (choice["text"], choice["finish_reason"]) == (need, "stop")
    streamed = live_server.stream(PROMPT, **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == need
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_says_the_same_as_the_whole_answer(live_server: LiveServer) -> None:
    body = {
        "model": LAW, "n": 2, "max_tokens": 24, "temperature": 1.0, "seed": 5, "logprobs": 2,
        "knn": {"trace": True, "lambda": 0.6},
    }  # fmt: skip
    prompts = [PROMPT, "Der Käufer"]
    whole = live_server.complete(prompts, **body)
    with slowed(live_server.lm, 0.02):  # a reader that is slow gets several tokens in one chunk
        chunks = live_server.stream(prompts, **body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["system_fingerprint"] == whole["system_fingerprint"] for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    for need in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == need["index"]]
        assert len(parts) > 1
        assert "".join(part["text"] for part in parts) == need["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [need["finish_reason"]]
        for name, values in need["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][name]] == values, name
        assert [entry for part in parts for entry in part["knn"]] == need["knn"]


def test_usage_comes_last_in_a_stream_that_asks_for_it(live_server: LiveServer) -> None:
    body = {"model": LAW, "max_tokens": 5, "ignore_eos": True}
    *chunks, last = live_server.stream(PROMPT, stream_options={"include_usage": True}, **body)
    assert last["choices"] == []
    assert last["usage"] == live_server.complete(PROMPT, **body)["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


# -- logprobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 5, 20])
def test_logprobs_have_one_entry_per_generated_token(live_server: LiveServer, most: int) -> None:
    answer = live_server.complete(PROMPT, model=LAW, max_tokens=20, temperature=1.0, seed=2, logprobs=most)
    logprobs = only(answer)["logprobs"]
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in logprobs.values()} == {answer["usage"]["completion_tokens"]}
    columns = zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    for token, log_prob, top in columns:
        assert log_prob <= 0
        assert top[token] == log_prob  # the very same float
        assert 1 <= len(top) <= most + 1
    offsets = np.cumsum([0, *map(len, logprobs["tokens"])])[:-1]
    assert logprobs["text_offset"] == offsets.tolist()


def test_logprobs_are_those_before_penalties_and_temperature(live_server: LiveServer) -> None:
    plain = only(live_server.complete(PROMPT, max_tokens=1, logprobs=3))["logprobs"]
    changed = only(
        live_server.complete(
            PROMPT, max_tokens=1, logprobs=3, temperature=5.0, seed=1, repetition_penalty=3.0, logit_bias={"5": 3.0}
        )
    )["logprobs"]
    (top,), (changed_top,) = plain["top_logprobs"], changed["top_logprobs"]
    assert len(top) == 3
    # The token drawn comes on top of the three; which of several half characters keeps the name depends on it.
    assert sorted(changed_top.values())[-3:] == pytest.approx(sorted(top.values()), abs=1e-5)


def test_an_impossible_token_is_reported_as_a_number(live_server: LiveServer) -> None:
    answer = live_server.complete(
        PROMPT, model=LAW, max_tokens=1, logprobs=20, knn={"k": 1, "lambda": 1.0, "temperature": 1.0}
    )
    (top,) = only(answer)["logprobs"]["top_logprobs"]
    assert sorted(top.values())[-1] == pytest.approx(0.0, abs=1e-6)
    assert min(top.values()) == -9999.0
