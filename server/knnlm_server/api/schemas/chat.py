"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from knnlm_core.errors import InvalidParameter, UnsupportedFeature
from knnlm_server.api.schemas.common import Body, Text
from knnlm_server.api.schemas.generation import GENERATION_EXAMPLE, STREAM_EXAMPLE, GenerationBody
from knnlm_server.api.schemas.limits import shown
from knnlm_server.engine.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_MESSAGES = 4096
DEFAULT_MAX_TOKENS = 1024
# `developer` is OpenAI's newer word for what templates know as `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NOT_IN_MESSAGES = ("tool_calls", "function_call", "audio")
_NOT_IN_BODY = ("audio", "chat_template", "documents", "echo")


class Part(BaseModel):
    """A part of a message; only texts are offered."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"required": ["type", "text"]})

    type: Annotated[str, shown(enum=["text"])]
    # Parts of another type have none, and are refused for their type.
    text: Annotated[Text | None, WithJsonSchema({"type": "string"})] = None


class Message(BaseModel):
    """Something that somebody said."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, shown(enum=list(_ROLES))] = Field(description="`developer` is taken for `system`.")
    content: Text | Annotated[list[Part], Field(fail_fast=True, min_length=1)] = Field(
        description="Text, or parts that are put together with line breaks."
    )
    name: Text | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class TemplateBody(Body):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool = Field(
        default=True, description="End the prompt with what begins the model's turn; not with `continue_final_message`."
    )
    continue_final_message: bool = Field(default=False, description="End the prompt inside the last message instead.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="More values for the template.")

    def check_template_fields(self) -> None:
        """Raises InvalidParameter: the prompt was asked to end in both ways."""
        is_given = "add_generation_prompt" in self.model_fields_set  # its default gives way
        if self.continue_final_message and self.add_generation_prompt and is_given:
            raise InvalidParameter(
                "`add_generation_prompt` and `continue_final_message` must not both be true",
                param="continue_final_message",
            )

    def template_options(self) -> dict[str, Any]:
        """Keywords for `Tokenizer.apply_chat_template`."""
        return {
            "add_generation_prompt": self.add_generation_prompt and not self.continue_final_message,
            "continue_final_message": self.continue_final_message,
            "variables": self.chat_template_kwargs,
        }


def template_messages(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Messages as chat templates take them: known roles, and one text each.

    Raises: UnsupportedFeature: another role, a part that is no text, or a call of a tool.
    """
    return [_template_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, str]:
    if message.role not in _ROLES:
        raise UnsupportedFeature(
            f"`{where}.role` must be {', '.join(_ROLES)}; got {message.role[:80]!r}", param=f"{where}.role"
        )
    for name in _NOT_IN_MESSAGES:
        if (message.model_extra or {}).get(name):
            raise UnsupportedFeature(f"`{where}.{name}` is not offered by this server", param=f"{where}.{name}")
    result = {"role": _ROLES[message.role], "content": _content(message.content, f"{where}.content")}
    return result if message.name is None else {**result, "name": message.name}


def _content(content: str | list[Part], where: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type != "text":
            raise UnsupportedFeature(
                f"`{where}.{index}.type` must be text, got {part.type[:80]!r}", param=f"{where}.{index}.type"
            )
        if part.text is None:
            raise InvalidParameter(f"`{where}.{index}.text` is needed: a text", param=f"{where}.{index}.text")
    return "\n".join(part.text or "" for part in content)


_EXAMPLE: JsonDict = {
    **GENERATION_EXAMPLE,
    "messages": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "May the tenant refuse?"}], "name": "Ann"},
    ],
    "max_tokens": 8,
    "max_completion_tokens": 8,
    "logprobs": True,
    "top_logprobs": 3,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
}
_STREAMED: JsonDict = {**STREAM_EXAMPLE, "messages": [{"role": "user", "content": "May the tenant refuse?"}]}


class ChatBody(GenerationBody, TemplateBody):
    """A request to go on with a conversation."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE, _STREAMED]})

    messages: Messages = Field(description="The conversation so far.")
    max_tokens: Annotated[int, shown(minimum=1)] | None = Field(
        default=None, description=f"Most tokens to generate; what fits by default, at most {DEFAULT_MAX_TOKENS}."
    )
    max_completion_tokens: Annotated[int, shown(minimum=1)] | None = Field(
        default=None, description="Newer name of `max_tokens`."
    )
    logprobs: bool | None = Field(default=None, description="Report the log-probability of every token.")
    top_logprobs: Annotated[int, shown(minimum=0, maximum=MAX_LOGPROBS)] | None = Field(
        default=None, description=f"Alternatives reported per token, 0 … {MAX_LOGPROBS}; needs `logprobs`."
    )

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedFeature or InvalidParameter for fields that cannot be honoured, or not together."""
        super().refuse_unsupported()
        for name in _NOT_IN_BODY:
            if (self.model_extra or {}).get(name):
                raise UnsupportedFeature(f"`{name}` is not offered by this server", param=name)
        self.check_template_fields()
        self._check_lengths()
        self._check_logprobs()

    def _check_lengths(self) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParameter(f"`{name}` must be at least 1, got {value}", param=name)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidParameter(
                f"`max_completion_tokens` must agree with `max_tokens` ({self.max_tokens}), "
                f"got {self.max_completion_tokens}",
                param="max_completion_tokens",
            )

    def _check_logprobs(self) -> None:
        if self.top_logprobs is None:
            return
        if not self.logprobs:
            raise InvalidParameter("`top_logprobs` needs `logprobs`: true", param="top_logprobs")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InvalidParameter(
                f"`top_logprobs` must be from 0 to {MAX_LOGPROBS}, got {self.top_logprobs}", param="top_logprobs"
            )

    @property
    def length_field(self) -> str:
        """The field that bounds the completion."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def params(self, room: int) -> SamplingParams:
        """The engine's view of this body.

        Args:   room: tokens that the prompt leaves of the LM's context.
        """
        given = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self.sampling_params(
            n=1 if self.n is None else self.n,
            max_tokens=max(1, min(DEFAULT_MAX_TOKENS, room)) if given is None else given,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
