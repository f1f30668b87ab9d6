"""The tokenizer as knnlm uses it: ids with character spans, and a BOS only where the tokenizer itself puts one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_core.errors import InvalidParameter, UnsupportedFeature, UnsupportedModel
from knnlm_core.lm.checkpoint import first_line
from knnlm_core.lm.fingerprint import tokenizer_fingerprint
from knnlm_core.lm.token_bytes import TokenBytes

_MAX_TEMPLATE_MESSAGE = 300  # characters
# What rendering itself calls by these names, besides the parameters of `apply_chat_template`.
_RENDERER_NAMES = {"self", "messages", "conversations"}


class Encoding(NamedTuple):
    """A text's tokens; a BOS token put first has the empty span (0, 0)."""

    token_ids: NDArray[np.int32]  # (T,)
    char_spans: NDArray[np.int32]  # (T, 2) start and end of each token in the text, in characters


class SpecialTokens(NamedTuple):
    """Tokens with a meaning of their own, None where the tokenizer has none."""

    bos: str | None
    eos: str | None
    pad: str | None
    unk: str | None


class Tokenizer:
    """Wraps a Hugging Face fast tokenizer; adds nothing of its own to a text.

    Args:
        eos_token_ids: tokens that end a completion, besides the tokenizer's own EOS.
    """

    def __init__(self, tokenizer: Any, *, eos_token_ids: Sequence[int] = ()) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} has no character offsets; a fast tokenizer (tokenizer.json) is needed"
            )
        tokenizer.model_max_length = int(1e30)  # we cut long texts ourselves
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        self._to_bytes = TokenBytes(tokenizer)
        # Per token id, so the vocabulary bounds them: alternatives of thousands of tokens are the same few.
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        self.bos_token_ids = self._prefix()
        eos = tokenizer.eos_token_id
        self.eos_token_ids = tuple(sorted({*eos_token_ids, *(() if eos is None else (eos,))}))

    def _prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text when asked for special tokens."""
        bare = self._tokenizer.encode("a", add_special_tokens=False)
        full = self._tokenizer.encode("a", add_special_tokens=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        raise UnsupportedModel(f"cannot tell which special tokens the tokenizer puts before a text: {bare} → {full}")

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own BOS first unless told otherwise."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return [*self.bos_token_ids, *ids] if add_bos else ids

    def encode_with_spans(self, text: str) -> Encoding:
        """Token ids of a text with the characters that each covers, BOS included."""
        batch = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        bos = len(self.bos_token_ids)
        ids = np.array([*self.bos_token_ids, *batch["input_ids"]], dtype=np.int32)
        spans = np.zeros((len(ids), 2), dtype=np.int32)
        if len(ids) > bos:
            spans[bos:] = batch["offset_mapping"]
        return Encoding(ids, spans)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids, exactly as the tokenizer's decoder gives it."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of one token, also where it holds part of a character only; see `token_bytes.py`."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._to_bytes(token_id)
        return data

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls tokens, such as ``Ġthe``; empty for ids that it does not have."""
        return [string or "" for string in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    def check_ids(self, token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
        """Refuse ids outside the model's vocabulary."""
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidParameter(
                    f"`{param}` holds token id {token_id}; ids must be in 0 … {vocab_size - 1}", param=param
                )

    @property
    def class_name(self) -> str:
        """Name of the Hugging Face class."""
        return type(self._tokenizer).__name__

    @property
    def special_tokens(self) -> SpecialTokens:
        """Tokens with a meaning of their own, as text."""
        return SpecialTokens(*(getattr(self._tokenizer, f"{name}_token") for name in SpecialTokens._fields))

    @property
    def chat_template(self) -> str | None:
        """The template (Jinja) that turns messages into a prompt; of several the one called default."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of messages.

        It holds its special tokens already: encode it without BOS. Templates run in a sandbox.

        Args:
            add_generation_prompt: end with what begins the model's turn.
            continue_final_message: end inside the last message instead; not both.
            variables: more values for the template.
        Raises:
            UnsupportedFeature: the model has no chat template.
            InvalidParameter: the template does not take these messages, or a variable has a reserved name.
        """
        if self.chat_template is None:
            raise UnsupportedFeature("the model has no chat template, so it takes prompts only", param="messages")
        variables = dict(variables or {})
        reserved = _RENDERER_NAMES | inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        if taken := sorted(reserved & variables.keys()):
            raise InvalidParameter(
                f"`chat_template_kwargs` must not hold {taken[0]!r}, which is set otherwise or not offered",
                param="chat_template_kwargs",
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            text.encode()  # escapes in a template can make half a surrogate pair
        except Exception as error:  # a template is a program of the model's author and may raise anything
            message = first_line(error)[:_MAX_TEMPLATE_MESSAGE]
            what = "`messages` with these `chat_template_kwargs`" if variables else "`messages`"
            raise InvalidParameter(f"the chat template refuses {what}: {message}", param="messages") from error
        return text
