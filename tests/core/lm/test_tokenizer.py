"""The tokenizer adds nothing of its own to a text, and its spans lead back to it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from knnlm_core.errors import InvalidParameter, UnsupportedFeature, UnsupportedModel
from knnlm_core.lm.token_bytes import TokenBytes
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


# -- bytes of single tokens --------------------------------------------------------------------------------------------


def byte_fallback() -> Tokenizer:
    """Words marked with ▁ and bytes for everything else, as Llama's sentencepiece models are."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdekhtr.", "▁t", "▁th", "▁the"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    raw = RawTokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))


BYTE_FALLBACK = byte_fallback()
SPECIALS = ["<|end|>", "<|start|>"]


def joined_bytes(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_bos=False)))


@given(st.lists(st.one_of(any_text, st.sampled_from(SPECIALS)), max_size=4), st.sampled_from([WITHOUT_BOS, WITH_BOS]))
def test_bytes_of_a_texts_tokens_are_its_utf8(parts: list[str], tokenizer: Tokenizer) -> None:
    text = "".join(parts)
    assert joined_bytes(tokenizer, text) == text.encode()


@given(any_text.filter(lambda text: "▁" not in text))
def test_bytes_of_sentencepiece_tokens_are_the_texts_behind_a_space(text: str) -> None:
    assert joined_bytes(BYTE_FALLBACK, text) == (b" " + text.encode() if text else b"")


@given(st.lists(st.integers(1, 511), max_size=12))
def test_bytes_of_any_tokens_decode_as_the_tokenizer_does(token_ids: list[int]) -> None:
    data = b"".join(map(WITHOUT_BOS.token_bytes, token_ids))
    assert data.decode(errors="replace") == WITHOUT_BOS.decode(token_ids)


def test_every_byte_is_a_token_of_its_own_somewhere() -> None:
    for tokenizer in (WITHOUT_BOS, BYTE_FALLBACK):
        singles = {tokenizer.token_bytes(i) for i in range(len(tokenizer))}
        assert singles >= {bytes([byte]) for byte in range(256)}


def test_special_and_added_tokens_are_their_text() -> None:
    raw = tiny_tokenizer()
    added = ["<é>", "<你>", "Ĳnot a byte"]  # in the vocabulary, é stands for the byte E9
    raw.add_tokens(added)
    tokenizer = Tokenizer(raw)
    for token in ("<|end|>", *added):
        assert tokenizer.token_bytes(raw.convert_tokens_to_ids(token)) == token.encode()
        assert joined_bytes(tokenizer, f"a{token} é") == f"a{token} é".encode()
    assert BYTE_FALLBACK.token_bytes(1) == b"</s>"


@pytest.mark.parametrize(
    ("decoder", "pieces", "expected"),
    [
        (decoders.Metaspace(), ["▁the", "the", "<0x41>"], [b" the", b"the", b"<0x41>"]),
        (decoders.WordPiece(), ["the", "##re"], [b" the", b"re"]),
        (decoders.BPEDecoder(), ["the</w>", "the"], [b"the ", b"the"]),
        (
            decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])]),
            ["Ġa", "Ã©", "你"],
            [b" a", "é".encode(), "你".encode()],
        ),
        (None, ["the"], [b"the"]),
    ],
    ids=["Metaspace", "WordPiece", "word suffix", "nested", "none"],
)
def test_bytes_follow_the_tokenizers_decoder(decoder: Any, pieces: list[str], expected: list[bytes]) -> None:
    raw = RawTokenizer(models.WordLevel({piece: i for i, piece in enumerate([*pieces, "<unk>"])}, unk_token="<unk>"))
    if decoder is not None:
        raw.decoder = decoder
    read = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert [read(i) for i in range(len(pieces))] == expected


def test_ids_of_a_padded_embedding_have_no_bytes_and_no_name() -> None:
    assert WITHOUT_BOS.token_bytes(600) == b""
    assert WITHOUT_BOS.token_text(600) == ""
    assert WITHOUT_BOS.token_strings([0, 600]) == ["<|end|>", ""]


def test_texts_and_bytes_of_tokens_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    first = [(tokenizer.token_text(i), tokenizer.token_bytes(i)) for i in range(512)]
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    monkeypatch.setattr(tokenizer, "_to_bytes", None)
    assert [(tokenizer.token_text(i), tokenizer.token_bytes(i)) for i in range(512)] == first


# -- chat templates ----------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}


def with_chat(template: Any) -> Tokenizer:
    raw = tiny_tokenizer()
    raw.chat_template = template
    return Tokenizer(raw)


CHAT = with_chat(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ opening }}{% endif %}"
)


def test_messages_become_the_templates_text() -> None:
    assert CHAT.apply_chat_template([USER]) == "[user]Hi<|end|>[assistant]"
    assert CHAT.apply_chat_template([USER], add_generation_prompt=False) == "[user]Hi<|end|>"
    continued = CHAT.apply_chat_template([USER], add_generation_prompt=False, continue_final_message=True)
    assert continued == "[user]Hi"
    assert CHAT.apply_chat_template([USER], variables={"opening": "So"}) == "[user]Hi<|end|>[assistant]So"


def test_of_several_chat_templates_the_default_is_used() -> None:
    several = with_chat({"default": "{{ messages[0].content }}", "tool_use": "no"})
    assert several.chat_template == "{{ messages[0].content }}"
    assert several.apply_chat_template([USER]) == "Hi"
    for none in (with_chat({"tool_use": "no"}), WITHOUT_BOS):
        assert none.chat_template is None
        with pytest.raises(UnsupportedFeature, match="no chat template"):
            none.apply_chat_template([USER])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content.upper() }}", "has no element 5"),
        ("{% for", "."),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('a\\nb' * 500) }}", "^.{,400}$"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
def test_what_a_template_raises_is_about_the_messages(template: str, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message) as caught:
        with_chat(template).apply_chat_template([USER])
    assert caught.value.param == "messages"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "conversation", "conversations", "messages", "self"])
def test_a_template_variable_overrides_none_of_our_arguments(name: str) -> None:
    with pytest.raises(InvalidParameter, match=f"must not hold '{name}'") as caught:
        CHAT.apply_chat_template([USER], variables={"opening": "x", name: True})
    assert caught.value.param == "chat_template_kwargs"


def test_special_tokens_are_known_by_their_role() -> None:
    assert WITHOUT_BOS.special_tokens == (None, "<|end|>", "<|end|>", None)
    assert WITH_BOS.special_tokens.bos == "<|start|>"
