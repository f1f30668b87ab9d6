"""/tokenize, /detokenize, /tokenizer_info on a live server: the model's own tokenizer, for any client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_folder import TEMPLATE, with_template
from live_server import LiveServer
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_server.api.schemas.tokenizer import Detokenized, Tokenized, TokenizerInfo
from knnlm_server.settings import ServerSettings

TEXTS = ["The tenant", "", " naïve café, 你好 🙂\n\n", "a<|end|>b<|start|>c", "\x00\x7f\ufffd\ufeff"]
KEY = "user-key"


@pytest.fixture(scope="module")
def folder(lm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose tokenizer puts a BOS first."""
    folder = with_template(lm_folder, tmp_path_factory.mktemp("bos"))
    raw = AutoTokenizer.from_pretrained(folder)
    # Takes the place of a token, so that the model's vocabulary is as large as before.
    raw.bos_token = raw.convert_ids_to_tokens(33)
    raw.backend_tokenizer.post_processor = TemplateProcessing(single="B $A", special_tokens=[("B", 33)])
    raw.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    with LiveServer(ServerSettings(model=str(folder), max_sequences=2, api_key=KEY)) as server:  # type: ignore[arg-type]
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def local(folder: Path) -> Tokenizer:
    return Tokenizer(AutoTokenizer.from_pretrained(folder))


def tokenize(server: LiveServer, **body: Any) -> dict[str, Any]:
    response = server.post("/tokenize", body)
    assert response.status_code == 200, response.text
    Tokenized.model_validate(response.json())  # what the OpenAPI document promises
    return response.json()


def detokenize(server: LiveServer, tokens: list[int]) -> str:
    response = server.post("/detokenize", {"tokens": tokens})
    assert response.status_code == 200, response.text
    Detokenized.model_validate(response.json())
    return response.json()["prompt"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_becomes_the_tokenizers_own_ids_and_comes_back(server: LiveServer, local: Tokenizer, text: str) -> None:
    bare = local.encode(text, add_bos=False)
    answer = tokenize(server, prompt=text, add_special_tokens=False)
    assert answer == {"count": len(bare), "max_model_len": 256, "tokens": bare, "token_strs": None}
    assert detokenize(server, bare) == text
    assert tokenize(server, prompt=text)["tokens"] == [33, *bare]
    assert tokenize(server, prompt=text, add_special_tokens=True, model="tiny-lm")["count"] == len(bare) + 1


def test_tokens_are_named_as_the_vocabulary_does_where_asked(server: LiveServer) -> None:
    answer = tokenize(server, prompt=" é<|end|>", add_special_tokens=False, return_token_strs=True)
    assert answer["token_strs"][-1] == "<|end|>"
    assert "".join(answer["token_strs"][:-1]) == "ĠÃ©"


def test_a_conversation_becomes_the_prompt_of_a_chat(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    for options, expected in (
        ({}, "[user]Hi<|end|>[assistant]Well<|end|>[assistant]"),
        ({"add_special_tokens": False}, "[user]Hi<|end|>[assistant]Well<|end|>[assistant]"),
        ({"add_generation_prompt": False}, "[user]Hi<|end|>[assistant]Well<|end|>"),
        ({"continue_final_message": True}, "[user]Hi<|end|>[assistant]Well"),
        ({"chat_template_kwargs": {"opening": "So"}}, "[user]Hi<|end|>[assistant]Well<|end|>[assistant]So"),
    ):
        assert detokenize(server, tokenize(server, messages=messages, **options)["tokens"]) == expected
    usage = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == tokenize(server, messages=messages)["count"]


def test_ids_that_are_no_whole_character_become_replacement_characters(server: LiveServer, local: Tokenizer) -> None:
    first_byte = local.encode("€", add_bos=False)[:1]
    assert local.token_bytes(first_byte[0])[:1] == "€".encode()[:1]
    assert detokenize(server, first_byte) == "\ufffd"
    assert detokenize(server, []) == ""


def test_the_tokenizer_describes_itself(server: LiveServer, local: Tokenizer) -> None:
    info = server.http.get("/tokenizer_info").json()
    TokenizerInfo.model_validate(info)
    assert info.pop("tokenizer_class")
    assert info.pop("bos_token")
    assert info == {
        "vocab_size": len(local),
        "model_max_length": 256,
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "unk_token": None,
        "chat_template": TEMPLATE,
        "add_bos_token": True,
    }


def test_a_tokenizer_without_bos_and_template_says_so(live_server: LiveServer) -> None:
    info = live_server.http.get("/tokenizer_info").json()
    TokenizerInfo.model_validate(info)
    assert (info["bos_token"], info["chat_template"], info["add_bos_token"]) == (None, None, False)
    ids = tokenize(live_server, prompt="The tenant")["tokens"]
    assert ids == tokenize(live_server, prompt="The tenant", add_special_tokens=False, model="tiny-lm@law")["tokens"]


def test_lm_evaluation_harness_takes_it_for_its_remote_tokenizer(server: LiveServer, local: Tokenizer) -> None:
    url = f"{server.url}/v1/completions"
    assert check_remote_tokenizer_support(url, auth_token=KEY)
    remote = RemoteTokenizer(url, auth_token=KEY)
    with remote.session:
        for text in TEXTS:
            ids = remote.encode(text)
            assert ids == local.encode(text, add_bos=False) == remote(text)["input_ids"]
            assert remote.batch_decode([ids, ids]) == [text, text]
        assert (remote.eos_token, remote.eos_token_id, remote.pad_token) == ("<|end|>", 0, "<|end|>")
        assert remote.bos_token_id == 33
        messages = [{"role": "user", "content": "Hi"}]
        prompt = remote.apply_chat_template(messages)
        assert remote.encode(prompt) == tokenize(server, messages=messages)["tokens"]


def test_a_key_is_asked_for(server: LiveServer) -> None:
    wrong = {"authorization": "Bearer other"}
    assert server.http.get("/tokenizer_info", headers=wrong).status_code == 401
    assert server.http.post("/tokenize", json={"prompt": "x"}, headers=wrong).status_code == 401
    assert server.http.post("/detokenize", json={"tokens": [1]}, headers=wrong).status_code == 401


USER = {"role": "user", "content": "x"}
BAD: list[tuple[str, dict[str, Any], int, str, str | None, str]] = [
    ("/tokenize", {}, 400, "invalid_parameter", "prompt", "exactly one .* got none"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, 400, "invalid_parameter", "prompt", "got both"),
    ("/tokenize", {"prompt": ["x"]}, 400, "invalid_parameter", "prompt", "valid string"),
    ("/tokenize", {"prompt": 5}, 400, "invalid_parameter", "prompt", "got '5'"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": "no"}, 400, "invalid_parameter", "add_special_tokens", "'no'"),
    ("/tokenize", {"messages": []}, 400, "invalid_parameter", "messages", "at least 1 item"),
    ("/tokenize", {"messages": [{"role": "tool", "content": ""}]}, 400, "unsupported_feature", "messages.0.role", ""),
    ("/tokenize", {"messages": [USER, {**USER, "role": "system"}]}, 400, "invalid_parameter", "messages", "only one"),
    (
        "/tokenize", {"messages": [USER], "add_special_tokens": True},
        400, "invalid_parameter", "add_special_tokens", "needs `prompt`",
    ),
    (
        "/tokenize", {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
        400, "invalid_parameter", "continue_final_message", "both",
    ),
    ("/tokenize", {"prompt": "x", "model": "gpt-5"}, 404, "model_not_found", "model", "'gpt-5'"),
    ("/tokenize", {"prompt": "x", "model": "tiny-lm@nope"}, 404, "datastore_not_found", None, "'nope'"),
    ("/detokenize", {}, 400, "invalid_parameter", "tokens", "required"),
    ("/detokenize", {"tokens": "x"}, 400, "invalid_parameter", "tokens", "got 'x'"),
    ("/detokenize", {"tokens": [1, "2"]}, 400, "invalid_parameter", "tokens.1", "got '2'"),
    ("/detokenize", {"tokens": [True]}, 400, "invalid_parameter", "tokens.0", "valid integer"),
    ("/detokenize", {"tokens": [512]}, 400, "invalid_parameter", "tokens", "token id 512; ids must be in 0 … 511"),
    ("/detokenize", {"tokens": [-1]}, 400, "invalid_parameter", "tokens", "token id -1"),
    ("/detokenize", {"tokens": [10**30]}, 400, "invalid_parameter", "tokens", "0 … 511"),
    ("/detokenize", {"tokens": [1], "model": "gpt-5"}, 404, "model_not_found", "model", "'gpt-5'"),
    ("/detokenize", {"tokens": [1] * 1_100_000}, 400, "invalid_parameter", "tokens", "at most 1048576 items"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "message"),
    BAD,
    ids=lambda v: str(v)[:50] if isinstance(v, (dict, str)) else "",
)
def test_a_bad_request_gets_its_own_error(
    server: LiveServer, path: str, body: dict[str, Any], status: int, code: str, param: str | None, message: str
) -> None:
    response = server.post(path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize("body", [r'{"prompt": "\ud800"}', r'{"messages": [{"role": "user", "content": "\udc00"}]}'])
def test_half_a_surrogate_pair_is_refused(server: LiveServer, body: str) -> None:
    headers = {"content-type": "application/json"}
    response = server.http.post("/tokenize", content=body, headers=headers)
    assert response.status_code == 400
    assert "surrogate" in response.json()["error"]["message"]


def test_a_model_without_a_chat_template_says_so(live_server: LiveServer) -> None:
    response = live_server.post("/tokenize", {"messages": [USER]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_feature"


def test_before_the_model_is_loaded_the_routes_say_so(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server.service, "backend", None)
        for response in (
            server.post("/tokenize", {"prompt": "x"}),
            server.post("/detokenize", {"tokens": [1]}),
            server.http.get("/tokenizer_info"),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
