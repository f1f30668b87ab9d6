"""The tokenizer adds nothing of its own to a text, and its spans lead back to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import TEXT, tiny_tokenizer

MULTILINGUAL = [
    TEXT,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを、色は匂へど",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "여보세요 नमस्ते สวัสดี שלום",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙃 e\u0301 ﬁ \u200b\ufeff",
    "  two spaces, a tab\tand\r\n\r\nnewlines \n",
]
WITHOUT_BOS = Tokenizer(tiny_tokenizer())


def with_template(template: str) -> Tokenizer:
    raw = tiny_tokenizer()
    raw.add_special_tokens({"bos_token": "<|start|>"})
    raw.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|start|>", raw.bos_token_id), ("<|end|>", raw.eos_token_id)]
    )
    return Tokenizer(raw)


WITH_BOS = with_template("<|start|> $A")


def bos_id(tokenizer: Tokenizer) -> int:
    return int(tokenizer._tokenizer.bos_token_id)


def test_a_tokenizer_without_a_bos_adds_none() -> None:
    assert WITHOUT_BOS.bos_token_ids == ()
    assert WITHOUT_BOS.encode("a key") == WITHOUT_BOS.encode("a key", add_bos=False)
    assert WITHOUT_BOS.encode("") == []


def test_a_tokenizer_that_puts_a_bos_first_puts_it_first_once() -> None:
    bos = bos_id(WITH_BOS)
    assert WITH_BOS.bos_token_ids == (bos,)
    bare = WITH_BOS.encode("a key", add_bos=False)
    assert bos not in bare
    assert WITH_BOS.encode("a key") == [bos, *bare]
    assert WITH_BOS.encode("") == [bos]
    assert WITH_BOS.encode_with_spans("a key").char_spans[0].tolist() == [0, 0]


def test_a_bos_token_that_the_tokenizer_only_has_is_not_put_first() -> None:
    raw = tiny_tokenizer()
    raw.add_special_tokens({"bos_token": "<|start|>"})
    assert Tokenizer(raw).bos_token_ids == ()


def test_what_a_tokenizer_puts_behind_a_text_is_left_out() -> None:
    both = with_template("<|start|> $A <|end|>")
    assert both.bos_token_ids == (bos_id(both),)
    assert both.encode("a key") == [bos_id(both), *WITHOUT_BOS.encode("a key")]
    behind = with_template("$A <|end|>")
    assert behind.bos_token_ids == ()
    assert behind.encode("a key") == WITHOUT_BOS.encode("a key")


any_text = st.one_of(st.sampled_from(MULTILINGUAL), st.text(st.characters(exclude_categories=["Cs"]), max_size=60))


@given(any_text, st.sampled_from([WITHOUT_BOS, WITH_BOS]))
def test_encode_with_spans_gives_the_tokens_of_encode(text: str, tokenizer: Tokenizer) -> None:
    encoding = tokenizer.encode_with_spans(text)
    assert encoding.token_ids.tolist() == tokenizer.encode(text)
    assert encoding.char_spans.shape == (len(encoding.token_ids), 2)
    assert (encoding.token_ids.dtype, encoding.char_spans.dtype) == (np.int32, np.int32)


@given(any_text, st.sampled_from([WITHOUT_BOS, WITH_BOS]))
def test_spans_cover_the_text_in_order_without_a_gap(text: str, tokenizer: Tokenizer) -> None:
    spans = tokenizer.encode_with_spans(text).char_spans[len(tokenizer.bos_token_ids) :].tolist()
    if not text:
        assert spans == []
        return
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    assert all(start < end for start, end in spans)
    for (start, end), (next_start, next_end) in pairwise(spans):
        # The bytes of one character may be several tokens, each of which has the whole character as its span.
        assert start <= next_start <= end <= next_end


@given(any_text)
def test_every_span_holds_its_tokens_text(text: str) -> None:
    encoding = WITHOUT_BOS.encode_with_spans(text)
    for token_id, (start, end) in zip(encoding.token_ids.tolist(), encoding.char_spans.tolist(), strict=True):
        token = WITHOUT_BOS.token_text(token_id)
        if "\ufffd" not in token:  # a whole character or more
            assert token in text[start:end]


@given(any_text)
def test_a_text_comes_back_exactly(text: str) -> None:
    assert WITHOUT_BOS.decode(WITHOUT_BOS.encode(text)) == text


def test_special_tokens_can_be_left_out_of_a_text() -> None:
    ids = WITH_BOS.encode("a key")
    assert WITH_BOS.decode(ids) == "<|start|>a key"
    assert WITH_BOS.decode(ids, skip_special_tokens=True) == "a key"


def test_long_texts_are_neither_cut_nor_warned_about() -> None:
    raw: Any = tiny_tokenizer()
    raw.model_max_length = 8
    assert len(Tokenizer(raw).encode("key " * 500)) > 500


def test_tokens_that_end_a_completion_are_the_tokenizers_and_those_given() -> None:
    assert WITHOUT_BOS.eos_token_ids == (0,)
    assert Tokenizer(tiny_tokenizer(), eos_token_ids=(7, 0)).eos_token_ids == (0, 7)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    WITHOUT_BOS.check_ids([0, 511], 512, param="prompt")
    for bad in (-1, 512):
        with pytest.raises(InvalidParameter, match=f"`prompt` holds token id {bad}; ids must be in 0 … 511"):
            WITHOUT_BOS.check_ids([3, bad], 512, param="prompt")


def test_a_tokenizer_without_character_offsets_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="ByT5Tokenizer has no character offsets; a fast tokenizer"):
        Tokenizer(ByT5Tokenizer())
