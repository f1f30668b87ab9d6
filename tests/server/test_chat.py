"""POST /v1/chat/completions on a live server: conversations in, OpenAI's shape out, streamed and not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_folder import END_OF_TURN, with_template
from live_server import LiveServer, parse_events
from small_stores import Published, Start
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_server.api.schemas.chat import ChatBody
from knnlm_server.api.schemas.chat_answers import ChatCompletion

ASK: list[dict[str, Any]] = [
    {"role": "system", "content": "You know the law."},
    {"role": "user", "content": "What may the tenant do?"},
]
LAW = "tiny-lm@law"
NO_END = {"logit_bias": {"0": -100, str(END_OF_TURN): -100}}


@pytest.fixture
def client(chat_server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def chat(server: LiveServer, messages: list[dict[str, Any]] = ASK, **body: Any) -> dict[str, Any]:
    """A chat completion; greedy unless told otherwise."""
    response = server.post("/v1/chat/completions", {"messages": messages, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json())  # what the OpenAPI document promises
    return response.json()


def stream(server: LiveServer, messages: list[dict[str, Any]] = ASK, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed one."""
    request = {"messages": messages, "temperature": 0, "stream": True, **body}
    response = server.post("/v1/chat/completions", request)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return parse_events(response.text)


def only(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    return choice


def prompt_of(server: LiveServer, messages: list[dict[str, Any]], **body: Any) -> str:
    """The prompt that the server makes of messages."""
    tokens = server.post("/tokenize", {"messages": messages, **body}).json()["tokens"]
    return server.post("/detokenize", {"tokens": tokens}).json()["prompt"]


# -- shape -------------------------------------------------------------------------------------------------------------


def test_an_answer_has_the_openai_shape(chat_server: LiveServer) -> None:
    answer = chat(chat_server, max_tokens=5, **NO_END)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny-lm"
    assert answer["system_fingerprint"] == chat_server.lm.identity.model_fingerprint
    choice = only(answer)
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert (choice["logprobs"], choice["finish_reason"]) == (None, "length")
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["prompt_tokens"] == chat_server.post("/tokenize", {"messages": ASK}).json()["count"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert "knn" not in usage


def test_the_openai_client_reads_answers_and_streams(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="tiny-lm", messages=ASK, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=3,
            logit_bias=NO_END["logit_bias"], **options,
        )  # fmt: skip

    answer = ask()
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == 12
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert [t for c in chunks[:-1] if c.choices[0].logprobs for t in c.choices[0].logprobs.content] == (
        choice.logprobs.content
    )
    assert (chunks[-1].choices, chunks[-1].usage) == ([], answer.usage.model_copy(update=_cached(chunks[-1].usage)))


def _cached(usage: Any) -> dict[str, Any]:
    """The second of two equal requests finds the prompt in the prefix cache."""
    return {"prompt_tokens_details": usage.prompt_tokens_details}


def test_the_openai_client_gets_errors_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny-lm", messages=[{"role": "tool", "content": "x", "tool_call_id": ""}])
    assert (caught.value.code, caught.value.param) == ("unsupported_feature", "messages.0.role")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "x"}])


# -- what the model says -----------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_that_of_transformers(chat_server: LiveServer, chat_folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    for turn in ("What may the tenant do?", "Der Käufer 🙂", "def f(x):", ""):
        messages = [*ASK[:1], {"role": "user", "content": turn}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(ids[:-1] if ids[-1] in (0, END_OF_TURN) else ids)
        assert only(chat(chat_server, messages, max_tokens=24))["message"]["content"] == expected


def test_an_end_of_turn_ends_the_answer_and_shows_no_text(chat_server: LiveServer) -> None:
    for token_id in (0, END_OF_TURN):
        answer = chat(chat_server, logit_bias={str(token_id): 100}, logprobs=True, max_tokens=8)
        assert only(answer)["message"]["content"] == ""
        assert only(answer)["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 1
        (entry,) = only(answer)["logprobs"]["content"]
        assert bytes(entry["bytes"]) == chat_server.backend.tokenizer.token_bytes(token_id)


def test_without_a_bound_an_answer_takes_what_fits(chat_server: LiveServer) -> None:
    answer = chat(chat_server, **NO_END)
    assert answer["usage"]["total_tokens"] == chat_server.lm.max_length == 256
    assert only(answer)["finish_reason"] == "length"


def test_without_a_bound_an_answer_has_at_most_1024_tokens() -> None:
    body = ChatBody.model_validate({"messages": ASK})
    assert [body.params(room).max_tokens for room in (1, 1024, 5000)] == [1, 1024, 1024]
    for given in ({"max_tokens": 7}, {"max_completion_tokens": 7}, {"max_tokens": 7, "max_completion_tokens": 7}):
        assert ChatBody.model_validate({"messages": ASK, **given}).params(5000).max_tokens == 7


def test_choices_differ_and_a_seed_reproduces_them(chat_server: LiveServer) -> None:
    options = {"n": 3, "temperature": 1, "seed": 5, "max_tokens": 8, **NO_END}
    answer = chat(chat_server, **options)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer["usage"]["completion_tokens"] == 24
    assert [c["message"]["content"] for c in chat(chat_server, **options)["choices"]] == texts


def test_a_datastore_is_used_and_traced(chat_server: LiveServer) -> None:
    knn = {"lambda": 0.5, "trace": True}
    answer = chat(chat_server, model=LAW, knn=knn, max_tokens=4, **NO_END)
    assert answer["model"] == LAW
    assert answer["usage"]["knn"]["searched"] == 4
    trace = only(answer)["knn"]
    assert [entry["lambda"] for entry in trace] == [0.5] * 4
    assert all(entry["neighbors"][0]["document_id"].startswith("new-") for entry in trace)
    chunks = stream(chat_server, model=LAW, knn=knn, max_tokens=4, **NO_END)
    streamed = [entry for chunk in chunks for entry in only(chunk).get("knn", [])]
    assert [entry["token_id"] for entry in streamed] == [entry["token_id"] for entry in trace]


# -- streams -----------------------------------------------------------------------------------------------------------

STREAMED: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 20},
    "one token": {"max_tokens": 1},
    "ends at once": {"logit_bias": {"0": 100}, "max_tokens": 5},
    "several choices": {"n": 3, "temperature": 1, "seed": 3, "max_tokens": 20},
    "logprobs": {"n": 2, "temperature": 1, "seed": 4, "max_tokens": 20, "logprobs": True, "top_logprobs": 2},
    "logprobs of an end": {"logit_bias": {"0": 100}, "logprobs": True},
    "a stop string": {"max_tokens": 60, "stop": ["e", "a"], "temperature": 1, "seed": 1},
}


@pytest.mark.parametrize("body", STREAMED.values(), ids=STREAMED.keys())
def test_a_stream_adds_up_to_the_answer_in_one_piece(chat_server: LiveServer, body: dict[str, Any]) -> None:
    answer, chunks = chat(chat_server, **body), stream(chat_server, **body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in answer["choices"]:
        first, *middle, last = [only(c) for c in chunks if only(c)["index"] == choice["index"]]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert (last["delta"], last["finish_reason"]) == ({}, choice["finish_reason"])
        assert all(part["delta"].keys() == {"content"} for part in middle)
        assert all(part["finish_reason"] is None for part in (first, *middle))
        assert "".join(part["delta"]["content"] for part in middle) == choice["message"]["content"]
        if body.get("logprobs"):
            streamed = [entry for part in middle for entry in part["logprobs"]["content"]]
            whole = choice["logprobs"]["content"]
            assert [(e["token"], e["bytes"]) for e in streamed] == [(e["token"], e["bytes"]) for e in whole]
            assert [e["logprob"] for e in streamed] == pytest.approx([e["logprob"] for e in whole], abs=1e-5)
        else:
            assert all(part["logprobs"] is None for part in (first, *middle, last))


def test_a_stream_tells_its_usage_where_asked(chat_server: LiveServer) -> None:
    usage = chat(chat_server, max_tokens=5, **NO_END)["usage"]
    *chunks, last = stream(chat_server, max_tokens=5, stream_options={"include_usage": True}, **NO_END)
    assert last["choices"] == []
    assert last["object"] == "chat.completion.chunk"
    assert last["usage"]["total_tokens"] == usage["total_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    running = stream(chat_server, max_tokens=5, stream_options={"continuous_usage_stats": True}, **NO_END)
    assert [c["usage"]["completion_tokens"] for c in running][-1] == 5
    assert all("usage" not in chunk for chunk in stream(chat_server, max_tokens=5))


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_a_completion_of_the_same_tokens(chat_server: LiveServer) -> None:
    body = {"max_tokens": 12, **NO_END}
    prompt = chat_server.post("/tokenize", {"messages": ASK}).json()["tokens"]
    for model in ("tiny-lm", LAW):
        entries = only(chat(chat_server, model=model, logprobs=True, top_logprobs=5, **body))["logprobs"]["content"]
        plain = only(chat_server.complete(prompt, model=model, logprobs=5, **body))["logprobs"]
        assert [e["token"] for e in entries] == plain["tokens"]
        assert [e["logprob"] for e in entries] == pytest.approx(plain["token_logprobs"], abs=1e-5)
        for entry, expected in zip(entries, plain["top_logprobs"], strict=True):
            top = entry["top_logprobs"]
            assert len(top) == 5
            assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
            given: dict[str, float] = {}
            for other in top:
                given.setdefault(other["token"], other["logprob"])
            assert given == pytest.approx({token: expected[token] for token in given}, abs=1e-5)


def test_alternatives_are_reported_only_where_asked(chat_server: LiveServer) -> None:
    def tops(**body: Any) -> list[int]:
        entries = only(chat(chat_server, logprobs=True, max_tokens=3, **body, **NO_END))["logprobs"]["content"]
        return [len(entry["top_logprobs"]) for entry in entries]

    assert tops() == tops(top_logprobs=0) == [0, 0, 0]
    assert tops(top_logprobs=20) == [20, 20, 20]
    assert only(chat(chat_server, logprobs=False, max_tokens=3))["logprobs"] is None


def test_bytes_of_the_tokens_make_the_text(chat_server: LiveServer) -> None:
    body = {"temperature": 1.5, "seed": 2, "max_tokens": 150, "logprobs": True, **NO_END}
    choice = only(chat(chat_server, **body))
    data = [bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]]
    assert b"".join(data).decode(errors="replace") == choice["message"]["content"]
    assert any(part[-1:] >= b"\x80" for part in data), "no token ended inside or behind a longer character"


# -- from messages to the prompt ---------------------------------------------------------------------------------------


def test_messages_become_the_templates_prompt(chat_server: LiveServer) -> None:
    parts = [{"type": "text", "text": "Two"}, {"type": "text", "text": "parts"}]
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": []},
    ]
    expected = "[system]Be brief.<|end|>[user Ada]Two\nparts<|end|>[assistant]Yes."
    assert prompt_of(chat_server, conversation) == f"{expected}<|end|>[assistant]"
    assert prompt_of(chat_server, conversation, add_generation_prompt=False) == f"{expected}<|end|>"
    for options in ({}, {"add_generation_prompt": False}):
        assert prompt_of(chat_server, conversation, continue_final_message=True, **options) == expected
    opening = {"chat_template_kwargs": {"opening": "Well,"}}
    assert prompt_of(chat_server, conversation, **opening) == f"{expected}<|end|>[assistant]Well,"
    # And it is what the model reads.
    answer = chat(chat_server, conversation, max_tokens=6, **opening, **NO_END)
    ids = chat_server.post("/tokenize", {"messages": conversation, **opening}).json()["tokens"]
    plain = chat_server.complete(ids, max_tokens=6, **NO_END)
    assert only(answer)["message"]["content"] == only(plain)["text"]
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_special_tokens_of_the_template_are_special(chat_server: LiveServer) -> None:
    ids = chat_server.post("/tokenize", {"messages": ASK}).json()["tokens"]
    assert ids.count(0) == 2  # <|end|>


# -- errors ------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}

# body over {"messages": [USER]}, status, code, param, and what the message says
BAD: list[tuple[dict[str, Any], int, str, str, str]] = [
    ({"messages": []}, 400, "invalid_parameter", "messages", "at least 1 item"),
    ({"messages": [USER] * 4097}, 400, "invalid_parameter", "messages", "at most 4096 items"),
    ({"messages": None}, 400, "invalid_parameter", "messages", ""),
    ({"messages": "hi"}, 400, "invalid_parameter", "messages", "got 'hi'"),
    ({"messages": [USER, "hi"]}, 400, "invalid_parameter", "messages.1", "got 'hi'"),
    ({"messages": [{"content": "x"}]}, 400, "invalid_parameter", "messages.0.role", "required"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_parameter", "messages.0.content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "invalid_parameter", "messages.0.content", ""),
    ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_parameter", "messages.0.content", ""),
    ({"messages": [{**USER, "name": 5}]}, 400, "invalid_parameter", "messages.0.name", "got '5'"),
    ({"messages": [USER, {**USER, "role": "tool"}]}, 400, "unsupported_feature", "messages.1.role", "got 'tool'"),
    ({"messages": [{**USER, "role": "function"}]}, 400, "unsupported_feature", "messages.0.role", "'function'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
        400, "unsupported_feature", "messages.0.content.1.type", "must be text, got 'image_url'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400, "invalid_parameter", "messages.0.content.0.text", "needed",
    ),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, 400, "unsupported_feature", "messages.0.tool_calls", "not offered"),
    ({"messages": [USER, ASK[0]]}, 400, "invalid_parameter", "messages", "only one system message"),
    ({"messages": [{"role": "user", "content": "long " * 500}]}, 400, "context_length_exceeded", "messages", "256"),
    ({"messages": [{**USER, "content": "long " * 500}], "max_tokens": 3}, 400, "context_length_exceeded", "messages",
     r"256 tokens together, got \d+ \+ 3"),
    ({"max_tokens": 256}, 400, "context_length_exceeded", "max_tokens", r"`max_tokens` .* 256 = "),
    ({"max_completion_tokens": 256}, 400, "context_length_exceeded", "max_completion_tokens", "`max_completion_to"),
    ({"max_tokens": 0}, 400, "invalid_parameter", "max_tokens", "at least 1, got 0"),
    ({"max_completion_tokens": -1}, 400, "invalid_parameter", "max_completion_tokens", "at least 1, got -1"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "invalid_parameter", "max_completion_tokens", r"\(3\), got 4"),
    ({"top_logprobs": 3}, 400, "invalid_parameter", "top_logprobs", "needs `logprobs`"),
    ({"logprobs": False, "top_logprobs": 3}, 400, "invalid_parameter", "top_logprobs", "needs `logprobs`"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_parameter", "top_logprobs", "from 0 to 20, got 21"),
    ({"logprobs": True, "top_logprobs": -1}, 400, "invalid_parameter", "top_logprobs", "got -1"),
    ({"logprobs": 3}, 400, "invalid_parameter", "logprobs", "got '3'"),
    (
        {"add_generation_prompt": True, "continue_final_message": True},
        400, "invalid_parameter", "continue_final_message", "must not both be true",
    ),
    ({"chat_template_kwargs": 5}, 400, "invalid_parameter", "chat_template_kwargs", ""),
    *(
        ({"chat_template_kwargs": {name: False}}, 400, "invalid_parameter", "chat_template_kwargs", f"'{name}'")
        for name in ("tokenize", "chat_template", "conversation", "conversations", "messages", "self", "kwargs",
                     "tools", "return_dict", "add_generation_prompt", "continue_final_message")
    ),
    ({"chat_template_kwargs": {"opening": 5}}, 400, "invalid_parameter", "messages", "can only concatenate"),
    ({"tools": [{"type": "function"}]}, 400, "unsupported_feature", "tools", "not offered"),
    ({"functions": [{"name": "f"}]}, 400, "unsupported_feature", "functions", "not offered"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_feature", "response_format", "other than text"),
    ({"audio": {"voice": "x"}}, 400, "unsupported_feature", "audio", "not offered"),
    ({"chat_template": "{{ 1 }}"}, 400, "unsupported_feature", "chat_template", "not offered"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_parameter", "stream_options", "stream"),
    ({"min_tokens": 9, "max_tokens": 3}, 400, "invalid_parameter", "min_tokens", "from 0 to 3, got 9"),
    ({"n": 9}, 400, "invalid_parameter", "n", "at most 8"),
    ({"knn": {"k": 4}}, 400, "invalid_parameter", "knn.k", "needs a datastore"),
    ({"model": "gpt-5"}, 404, "model_not_found", "model", "'gpt-5'"),
    ({"model": "tiny-lm@nope"}, 404, "datastore_not_found", "knn.datastore", "'nope'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "message"), BAD, ids=lambda v: str(v)[:50] if type(v) is dict else ""
)
def test_a_bad_request_gets_its_own_error(
    chat_server: LiveServer, body: dict[str, Any], status: int, code: str, param: str, message: str
) -> None:
    for streamed in ({}, {"stream": True}):
        if streamed and "stream_options" in body:
            continue
        response = chat_server.post("/v1/chat/completions", {"messages": [USER], **streamed, **body})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert (error["code"], error["param"]) == (code, param), error
        assert re.search(message, error["message"]), error["message"]
        assert "Traceback" not in error["message"]
        assert len(error["message"]) < 500


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(chat_server: LiveServer) -> None:
    half = r'"\ud800"'
    for fields in (
        f'"messages": [{{"role": "user", "content": {half}}}]',
        f'"messages": [{{"role": {half}, "content": "x"}}]',
        f'"messages": [{{"role": "user", "content": "x", "name": {half}}}]',
        f'"messages": [{{"role": "user", "content": [{{"type": "text", "text": {half}}}]}}]',
        f'"messages": [{{"role": "user", "content": [{{"type": {half}, "text": "x"}}]}}]',
        f'"messages": [{{"role": "user", "content": "x"}}], "chat_template_kwargs": {{"opening": {half}}}',
    ):
        headers = {"content-type": "application/json"}
        response = chat_server.http.post("/v1/chat/completions", content=f"{{{fields}}}", headers=headers)
        assert response.status_code == 400, (fields, response.text)


def test_null_and_unknown_fields_change_nothing(chat_server: LiveServer) -> None:
    plain = chat(chat_server, max_tokens=4)["choices"]
    names = ("max_completion_tokens", "logprobs", "top_logprobs", "n", "stop", "chat_template_kwargs", "knn", "model")
    assert chat(chat_server, max_tokens=4, **dict.fromkeys(names))["choices"] == plain
    extra = {"tools": [], "tool_choice": "none", "store": False, "response_format": {"type": "text"}}
    assert chat(chat_server, max_tokens=4, **extra)["choices"] == plain


def test_a_model_without_a_chat_template_says_so(live_server: LiveServer) -> None:
    response = live_server.post("/v1/chat/completions", {"messages": [USER]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_feature", "messages")
    assert "no chat template" in error["message"]


def test_a_template_that_makes_no_token_is_a_bad_request(
    start_server: Start, published: Published, tmp_path: Path
) -> None:
    server = start_server(model=str(with_template(published.model, tmp_path, "{% if false %}{% endif %}")))
    response = server.post("/v1/chat/completions", {"messages": [USER]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert "makes no token" in response.json()["error"]["message"]


def test_a_key_is_asked_for(start_server: Start, chat_folder: Path) -> None:
    server = start_server(model=str(chat_folder), api_key="user-key")
    body = {"messages": ASK, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).status_code == 401
    headers = {"authorization": "Bearer user-key"}
    assert server.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
