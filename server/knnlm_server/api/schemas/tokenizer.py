"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from knnlm_core.errors import InvalidParameter
from knnlm_server.api.schemas.answers import Answer
from knnlm_server.api.schemas.chat import Messages, TemplateBody
from knnlm_server.api.schemas.common import Body, Off, Text, TokenIds

MAX_TOKENS = 1 << 20

_EXAMPLE: JsonDict = {
    "prompt": "The tenant may refuse",
    "add_special_tokens": True,
    "return_token_strs": True,
}


class TokenizeBody(TemplateBody):
    """``POST /tokenize``: a text, or a conversation."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    model: str | None = Field(default=None, description="`<lm>` or `<lm>@<datastore>`.")
    prompt: Text | None = Field(default=None, description="A text; not with `messages`.")
    messages: Messages | None = Field(default=None, description="A conversation; not with `prompt`.")
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put BOS first where the tokenizer does so; true by default for a text. A chat template writes "
        "its own special tokens.",
    )
    return_token_strs: Off = Field(default=False, description="Also say what the vocabulary calls the tokens.")

    def check(self) -> None:
        """Raises InvalidParameter: fields that do not go together."""
        if (self.prompt is None) == (self.messages is None):
            given = "none" if self.prompt is None else "both"
            raise InvalidParameter(f"exactly one of `prompt` and `messages` is needed, got {given}", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidParameter(
                "`add_special_tokens` needs `prompt`; a chat template writes its own special tokens",
                param="add_special_tokens",
            )
        self.check_template_fields()


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = Field(default=None, description="`<lm>` or `<lm>@<datastore>`.")
    tokens: Annotated[TokenIds, Field(max_length=MAX_TOKENS)] = Field(
        description="Token ids.", json_schema_extra={"examples": [[5, 17, 300]]}
    )


class Tokenized(Answer):
    """The tokens of a text."""

    count: int = Field(ge=0)
    max_model_len: int = Field(ge=1, description="Tokens per sequence, prompt and completion.")
    tokens: list[Annotated[int, Field(ge=0)]]
    token_strs: list[str] | None = Field(description="Only with `return_token_strs`.")


class Detokenized(Answer):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(Answer):
    """What a client needs to know of the tokenizer."""

    tokenizer_class: str
    vocab_size: int = Field(ge=1, description="Tokens that the tokenizer has, added ones included.")
    model_max_length: int = Field(ge=1, description="Tokens per sequence, prompt and completion.")
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None = Field(description="Jinja.")
    add_bos_token: bool = Field(description="Whether the tokenizer puts BOS before a text.")
