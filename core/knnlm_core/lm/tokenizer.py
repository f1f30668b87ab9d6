"""The tokenizer as knnlm uses it: ids with character spans, and a BOS only where the tokenizer itself puts one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm.fingerprint import tokenizer_fingerprint


class Encoding(NamedTuple):
    """A text's tokens; a BOS token put first has the empty span (0, 0)."""

    token_ids: NDArray[np.int32]  # (T,)
    char_spans: NDArray[np.int32]  # (T, 2) start and end of each token in the text, in characters


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
        return self.decode([token_id])

    def check_ids(self, token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
        """Refuse ids outside the model's vocabulary."""
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidParameter(
                    f"`{param}` holds token id {token_id}; ids must be in 0 … {vocab_size - 1}", param=param
                )
