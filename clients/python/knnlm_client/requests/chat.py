"""The body of a chat completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import ConfigDict, JsonValue, model_validator

from knnlm_client.requests.common import GenerationOptions, GenerationRequest, RequestPart, StreamOptions
from knnlm_client.responses.chat import AssistantMessage


class TextPart(RequestPart):
    """A piece of a message that is made of several.

    Attributes:
        type: `"text"`, the one kind that servers take.
    """

    type: str
    text: str


class ChatMessage(RequestPart):
    """One turn of a conversation.

    Attributes:
        role: `"system"`, `"developer"`, `"user"` or `"assistant"`.
        name: who speaks, for chat templates that say so.
    """

    # So that the message of an answer can be sent back as it is.
    model_config = ConfigDict(from_attributes=True)

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_dict(cls, given: object) -> object:
        return dict(given) if isinstance(given, Mapping) else given


# A mapping has the fields of `ChatMessage`, under the same names.
Messages: TypeAlias = Sequence[ChatMessage | AssistantMessage | Mapping[str, object]]


class ChatOptions(GenerationOptions, total=False):
    """Keywords of `chat`, beside messages and model; `ChatRequest` explains them."""

    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


class StreamChatOptions(ChatOptions, total=False):
    """Keywords of `stream_chat`."""

    stream_options: StreamOptions | None


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`.

    Attributes:
        max_completion_tokens: the newer name of `max_tokens`; who gives both must give the same.
        logprobs: report the log-probability of each token, of the mixed distribution.
        top_logprobs: how many alternatives to report beside it; needs `logprobs=True`.
        add_generation_prompt: end the prompt where the assistant begins to speak; the server does unless told not to.
        continue_final_message: write on in the last message instead.
        chat_template_kwargs: further variables of the model's chat template.
    """

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
