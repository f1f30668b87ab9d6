"""The answers of the tokenizer's routes."""

from __future__ import annotations

from knnlm_client.responses.common import ResponsePart


class Tokenization(ResponsePart):
    """The answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenization(ResponsePart):
    """The answer of `POST /detokenize`."""

    prompt: str


class TokenizerInfo(ResponsePart):
    """The answer of `GET /tokenizer_info`; a special token that the tokenizer lacks is None."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int  # what the server takes, which may be less than the tokenizer's own
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    add_bos_token: bool
