"""The openai library, unmodified: every documented call of completions, chat and models reads what the server says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from learned import Learned
from live_server import LiveServer, slowed, wait_until
from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from statutes import statute
from transformers import AutoTokenizer

LM, LAW = "learned-lm", "learned-lm@law"
PROMPT = statute(500, 1)[:30]
ASK: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You know the law."},
    {"role": "user", "content": "Who answers for the swarm?"},
]
NO_END = {"0": -100}


@pytest.fixture
def client(learned_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{learned_server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(learned: Learned) -> Any:
    return AutoTokenizer.from_pretrained(learned.model)


def only(answer: Completion) -> CompletionChoice:
    (choice,) = answer.choices
    return choice


# -- completions -------------------------------------------------------------------------------------------------------


def test_a_completion_is_read_whole(client: openai.OpenAI, learned_server: LiveServer, tokenizer: Any) -> None:
    answer = client.completions.create(model=LM, prompt=PROMPT, max_tokens=9, temperature=0, logit_bias=NO_END)
    raw = learned_server.complete(PROMPT, model=LM, max_tokens=9, logit_bias=NO_END)
    assert (answer.object, answer.model) == ("text_completion", LM)
    assert answer.id.startswith("cmpl-")
    assert answer.id.endswith(answer._request_id or "none")
    assert answer.system_fingerprint == raw["system_fingerprint"]
    choice = only(answer)
    assert (choice.index, choice.text, choice.finish_reason) == (0, raw["choices"][0]["text"], "length")
    assert answer.usage is not None
    prompt_tokens = len(tokenizer(PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 9)
    assert answer.usage.total_tokens == prompt_tokens + 9


def test_a_stream_says_the_same_and_its_usage_last(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": LAW, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**options)
    with client.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    assert {chunk.id for chunk in chunks} == {last.id}
    assert "".join(only(chunk).text for chunk in chunks) == only(whole).text
    assert [only(chunk).finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    parts = [only(chunk).logprobs for chunk in chunks]
    assert [token for part in parts if part for token in part.tokens or ()] == only(whole).logprobs.tokens  # type: ignore[union-attr]
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.usage.prompt_tokens, 12)


def test_a_stream_left_early_ends_the_request(client: openai.OpenAI, learned_server: LiveServer) -> None:
    with slowed(learned_server.lm, 0.05):  # 200 tokens would take ten seconds
        with client.completions.create(
            model=LM, prompt=PROMPT, max_tokens=200, stream=True, logit_bias=NO_END
        ) as stream:
            next(iter(stream))
        wait_until(learned_server.is_idle, within_s=5)


def test_log_probabilities_are_read(client: openai.OpenAI) -> None:
    choice = only(client.completions.create(model=LAW, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3))
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    assert logprobs.text_offset[0] == 0
    for log_prob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert log_prob == max(top.values())  # greedy
        assert 1 <= len(top) <= 4


def test_a_prompt_alone_is_scored_with_echo_and_no_new_token(client: openai.OpenAI, tokenizer: Any) -> None:
    answer = client.completions.create(model=LAW, prompt=PROMPT, echo=True, max_tokens=0, logprobs=1)
    choice = only(answer)
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(tokenizer(PROMPT).input_ids)
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])


def test_echo_puts_the_prompt_before_the_completion(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": LM, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 0}
    plain, echoed = (only(client.completions.create(**options, echo=echo)) for echo in (False, True))
    assert echoed.text == PROMPT + plain.text
    assert echoed.logprobs is not None
    assert plain.logprobs is not None
    assert (echoed.logprobs.tokens or [])[-6:] == plain.logprobs.tokens
    assert (echoed.logprobs.text_offset or [])[-6] == len(PROMPT)


def test_best_of_returns_the_likeliest_of_all_that_are_counted(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=LM, prompt=PROMPT, n=2, best_of=4, max_tokens=5, seed=1, temperature=1, logprobs=0, logit_bias=NO_END
    )
    means = [sum(c.logprobs.token_logprobs or []) for c in answer.choices if c.logprobs]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert means == sorted(means, reverse=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * 5
    all_four = client.completions.create(
        model=LM, prompt=PROMPT, n=4, max_tokens=5, seed=1, temperature=1, logit_bias=NO_END
    )
    assert {choice.text for choice in answer.choices} <= {choice.text for choice in all_four.choices}


def test_sixteen_stops_end_a_text_before_the_first_of_them(client: openai.OpenAI) -> None:
    whole = only(client.completions.create(model=LM, prompt=PROMPT, max_tokens=24, temperature=0)).text
    stop = whole[6:8]
    stops = [f"<never {i}>" for i in range(15)] + [stop]
    choice = only(client.completions.create(model=LM, prompt=PROMPT, max_tokens=24, temperature=0, stop=stops))
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_reproduces_its_text(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return only(client.completions.create(model=LAW, prompt=PROMPT, seed=seed, temperature=1.5, top_p=0.95)).text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1


def test_logit_bias_and_penalties_are_taken(client: openai.OpenAI, tokenizer: Any) -> None:
    (token_id,) = tokenizer("w").input_ids
    options: dict[str, Any] = {"model": LM, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "user": "somebody"}
    assert only(client.completions.create(**options, logit_bias={str(token_id): 100})).text == "wwwww"
    plain = only(client.completions.create(**options)).text
    punished = client.completions.create(**options, presence_penalty=2, frequency_penalty=2, n=1)
    assert len(set(only(punished).text)) >= len(set(plain))


def test_all_four_shapes_of_prompts_are_taken(client: openai.OpenAI, tokenizer: Any) -> None:
    other = statute(501, 1)[:20]

    def texts(prompt: Any) -> list[str]:
        answer = client.completions.create(model=LM, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    ids = [tokenizer(text).input_ids for text in (PROMPT, other)]
    (first,), (second,) = texts(PROMPT), texts(other)
    assert first != second
    assert texts([PROMPT, other]) == texts(ids) == [first, second]
    assert texts(ids[0]) == [first]


def test_a_datastore_is_chosen_by_name_or_by_extra_body(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1}
    by_model = client.completions.create(model=LAW, **options)
    by_body = client.completions.create(model=LM, **options, extra_body={"knn": {"datastore": "law", "trace": True}})
    assert only(by_body).text == only(by_model).text
    assert only(by_body).logprobs == only(by_model).logprobs
    assert (by_body.model, by_body.system_fingerprint) == (LAW, by_model.system_fingerprint)
    assert len((only(by_body).model_extra or {})["knn"]) == 8
    assert by_body.usage is not None
    assert (by_body.usage.model_extra or {})["knn"]["searched"] == 8
    assert only(client.completions.create(model=LM, **options)).logprobs != only(by_model).logprobs


# -- chat --------------------------------------------------------------------------------------------------------------


def chat(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    """A greedy answer of 8 tokens, unless told otherwise."""
    body = {"model": LM, "messages": ASK, "max_completion_tokens": 8, "temperature": 0, "logit_bias": NO_END, **options}
    return client.chat.completions.create(**body)  # type: ignore[no-any-return]


def test_a_chat_is_read_whole(client: openai.OpenAI, tokenizer: Any) -> None:
    answer = chat(client)
    assert (answer.object, answer.model) == ("chat.completion", LM)
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content
    assert choice.message.refusal is None
    assert choice.message.tool_calls is None
    assert answer.usage is not None
    rendered = tokenizer.apply_chat_template(ASK, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(rendered), 8)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_log_probabilities_of_a_chat_are_read(client: openai.OpenAI) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy, and no token is out of reach
        assert token.bytes is not None
    text = b"".join(bytes(token.bytes or ()) for token in content).decode(errors="replace")
    assert text == choice.message.content


def test_a_chat_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = chat(client)
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert {chunk.object for chunk in (*chunks, last)} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 8)


def test_the_library_puts_a_chat_stream_together_itself(client: openai.OpenAI) -> None:
    text = chat(client, max_completion_tokens=24).choices[0].message.content or ""
    # It raises for an answer that was cut off, so that this one has to end by itself.
    options: dict[str, Any] = {"max_completion_tokens": 24, "temperature": 0, "logit_bias": NO_END, "stop": text[5:7]}
    options |= {"model": LM, "messages": ASK, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**options)
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    for built, need in zip(final.choices, whole.choices, strict=True):
        assert (built.message.content, built.finish_reason) == (need.message.content, need.finish_reason)
        assert built.logprobs == need.logprobs
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_chat_takes_what_completions_take(client: openai.OpenAI) -> None:
    sampled = chat(client, n=3, seed=5, temperature=1.5, top_p=0.9, presence_penalty=0.5, user="somebody")
    again = chat(client, n=3, seed=5, temperature=1.5, top_p=0.9, presence_penalty=0.5, user="somebody")
    assert [c.message.content for c in sampled.choices] == [c.message.content for c in again.choices]
    assert len({choice.message.content for choice in sampled.choices}) > 1
    whole = chat(client, max_completion_tokens=24).choices[0].message.content or ""
    stopped = chat(client, max_completion_tokens=24, stop=[whole[5:7], *("<never>" for _ in range(15))]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(whole[5:7])], "stop")


def test_developer_and_parts_are_system_and_text(client: openai.OpenAI) -> None:
    parts: list[dict[str, Any]] = [
        {"role": "developer", "content": "You know the law."},
        {"role": "user", "content": [{"type": "text", "text": "Who answers for the swarm?"}]},
    ]
    assert chat(client, messages=parts).choices[0].message.content == chat(client).choices[0].message.content


def test_a_chat_with_a_datastore(client: openai.OpenAI) -> None:
    by_model = chat(client, model=LAW)
    by_body = chat(client, extra_body={"knn": {"datastore": "law"}})
    assert by_body.choices == by_model.choices
    assert by_model.system_fingerprint == by_body.system_fingerprint != chat(client).system_fingerprint


# -- models, and the asynchronous client -------------------------------------------------------------------------------


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == [LM, LAW]
    for model in models:
        assert (model.object, model.owned_by) == ("model", "knnlm")
        assert client.models.retrieve(model.id) == model


def test_many_at_once_from_the_asynchronous_client(client: openai.OpenAI, learned_server: LiveServer) -> None:
    prompts = [statute(seed, 1)[:20] for seed in range(510, 522)]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}

    async def ask() -> tuple[list[str], str, str | None]:
        async with openai.AsyncOpenAI(base_url=f"{learned_server.url}/v1", api_key="any", timeout=30) as own:
            answers = await asyncio.gather(
                *(own.completions.create(model=LAW, prompt=prompt, **options) for prompt in prompts)
            )
            stream = await own.completions.create(model=LAW, prompt=prompts[0], stream=True, **options)
            streamed = "".join([only(chunk).text async for chunk in stream])
            said = await own.chat.completions.create(model=LM, messages=ASK, logit_bias=NO_END, **options)
            return [only(answer).text for answer in answers], streamed, said.choices[0].message.content

    texts, streamed, said = asyncio.run(ask())
    together = client.completions.create(model=LAW, prompt=prompts, **options)
    assert texts == [choice.text for choice in together.choices]
    assert streamed == texts[0]
    assert said == chat(client).choices[0].message.content
