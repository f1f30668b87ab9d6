"""The bodies of the tokenizer's routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pydantic import JsonValue

from knnlm_client.requests.chat import ChatMessage
from knnlm_client.requests.common import RequestPart, TokenIds


class TokenizeOptions(TypedDict, total=False):
    """Keywords of `tokenize`; `TokenizeRequest` and `TokenizeChatRequest` explain them."""

    model: str | None
    return_token_strs: bool | None
    add_special_tokens: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


class _TokenizeRequest(RequestPart):
    model: str | None = None
    return_token_strs: bool | None = None


class TokenizeRequest(_TokenizeRequest):
    """The body of `POST /tokenize` for a text.

    Attributes:
        return_token_strs: also return each token's text.
        add_special_tokens: put in what the tokenizer puts around a text, such as BOS.
    """

    prompt: str
    add_special_tokens: bool | None = None


class TokenizeChatRequest(_TokenizeRequest):
    """The body of `POST /tokenize` for a conversation, in the words of `ChatRequest`."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class DetokenizeRequest(RequestPart):
    """The body of `POST /detokenize`."""

    tokens: TokenIds
    model: str | None = None
