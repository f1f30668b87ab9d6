"""Text token by token, against decoding the whole, with real tokenizers trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from knnlm_server.engine.detokenizer import IncrementalDetokenizer

CORPUS = [
    "The server looks for keys like its own thought, and the value is what came next.",
    "def search(query, k):\n    return index.search(query, k)  # 4 spaces\n\n\t\ttabs\n",
    "Der Speicher enthält Einträge; naïve café, Ærøskøbing, Žižek.",
    "Хранилище содержит записи. Ключ — это мысль модели.",
    "你好，世界。数据存储包含条目。日本語のテキストもある。한국어 문장.",
    "नमस्ते दुनिया। مرحبا بالعالم. שלום עולם.",
    "emoji: 🙂🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️ 🏳️‍🌈 e\u0301 𝔘𝔫𝔦",
]
HARD = "𓀀 Ω≈ç√ “quotes”… \u00a0 \u200b ☃☃☃ 𝄞 \U0010ffff  two  spaces   three\n\n\n🙂🙂🙂🙂🙂🙂🙂🙂"
TEXTS = [
    *CORPUS,
    HARD,
    "\ufffd genuine \ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd ones",
    " leading",
    "",
    "  ",
    "🙂",
    "x" * 100,
]
SPECIAL = ["<|end|>", "<|start|>"]


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # No splitting into words: tokens may hold the end of one character and the beginning of the next.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=9,
    )
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return tokenizer


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def metaspace() -> Tokenizer:
    """BPE over ▁-marked words with byte fallback, decoded as Llama's sentencepiece models are."""
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, "<unk>", *BYTES], show_progress=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:3], trainer)  # other scripts fall back to bytes
    vocabulary, merges = _vocabulary_and_merges(trained)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([*SPECIAL])
    return tokenizer


def _vocabulary_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def unigram() -> Tokenizer:
    """Unigram with the Metaspace decoder, which drops the first token's leading space by itself."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "unigram": unigram,
    "word_piece": word_piece,
}


class Decode:
    """The tokenizer's decode, counting what it costs."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.calls, self.tokens = 0, 0

    def __call__(self, token_ids: list[int]) -> str:
        self.calls += 1
        self.tokens += len(token_ids)
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip)


def stream(decode: Callable[[list[int]], str], prompt: Sequence[int], generated: Sequence[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(decode, prompt)
    return [*(detokenizer.push(token_id) for token_id in generated), detokenizer.flush()]


def expected(decode: Callable[[list[int]], str], prompt: Sequence[int], generated: Sequence[int]) -> str:
    """decode(prompt + generated) without its common prefix with decode(prompt)."""
    before, whole = decode([*prompt]) if prompt else "", decode([*prompt, *generated])
    common = 0
    while common < min(len(before), len(whole)) and before[common] == whole[common]:
        common += 1
    return whole[common:]


def byte_runs_are_valid(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bool:
    """Whether each unbroken run of byte tokens is UTF-8; special tokens are skipped, so they break no run."""
    pieces = [piece for i in token_ids if (piece := tokenizer.id_to_token(i)) not in SPECIAL]
    for is_byte, run in groupby(pieces, key=lambda piece: piece in BYTES):
        if is_byte:
            try:
                bytes(int(piece[3:5], 16) for piece in run).decode()
            except UnicodeDecodeError:
                return False
    return True


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_real_text_comes_out_as_decoded_whole_wherever_the_prompt_ends(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("One prompt. " + text + " The end.").ids
    for border in range(len(ids) + 1):
        prompt, generated = ids[:border], ids[border:]
        finished = prompt
        while not byte_runs_are_valid(tokenizer, finished):
            # Byte fallback shows nothing of a run that ends inside a character.
            finished = finished[:-1]
        if finished != prompt and tokenizer.decode(ids[len(finished) :]).startswith("\ufffd"):
            continue  # an unfinished U+FFFD looks like a finished one
        assert "".join(stream(tokenizer.decode, prompt, generated)) == expected(
            tokenizer.decode, finished, ids[len(finished) :]
        )


def any_ids(name: str) -> st.SearchStrategy[list[int]]:
    """Random tokens, among them many with incomplete characters, and special ones."""
    tokenizer = TOKENIZERS[name]()
    vocab_size = tokenizer.get_vocab_size()
    awkward = [i for i in range(vocab_size) if "\ufffd" in tokenizer.decode([i]) or tokenizer.decode([i]).strip() == ""]
    one = st.integers(0, vocab_size - 1)
    genuine = tokenizer.encode("\ufffd").ids
    emoji = tokenizer.encode("🙂🚀").ids
    some = st.one_of(one, one, st.sampled_from(awkward)) if awkward else one
    piece = st.one_of(some.map(lambda i: [i]), st.just(genuine), st.just(emoji), st.just(emoji[:-1]))
    return st.lists(piece, max_size=40).map(lambda pieces: [i for ids in pieces for i in ids])


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", ["byte_level", "unigram", "word_piece"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_come_out_as_decoded_whole(name: str, skip_special_tokens: bool, data: st.DataObject) -> None:
    decode = Decode(TOKENIZERS[name](), skip_special_tokens)
    prompt, generated = data.draw(any_ids(name)), data.draw(any_ids(name))
    assert "".join(stream(decode, prompt, generated)) == expected(decode, prompt, generated)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_with_byte_fallback_valid_runs_come_out_as_decoded_whole(data: st.DataObject) -> None:
    """Characters as bytes, in runs of any length, between any other tokens."""
    tokenizer = metaspace()
    byte_ids = [tokenizer.token_to_id(byte) for byte in BYTES]
    others = [i for i in range(tokenizer.get_vocab_size()) if tokenizer.id_to_token(i) not in BYTES]
    text = st.one_of(st.text(max_size=9), st.text("\ufffd🙂", max_size=30))
    as_bytes = text.map(lambda text: [byte_ids[b] for b in text.encode()])
    piece = st.one_of(st.sampled_from(others).map(lambda i: [i]), as_bytes)
    ids = st.lists(piece, max_size=20).map(lambda pieces: [i for ids in pieces for i in ids])
    prompt, generated = data.draw(ids), data.draw(ids)
    assert "".join(stream(tokenizer.decode, prompt, generated)) == expected(tokenizer.decode, prompt, generated)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_with_byte_fallback_invalid_runs_cost_none_of_the_other_text(data: st.DataObject) -> None:
    tokenizer = metaspace()
    byte_ids = [tokenizer.token_to_id(byte) for byte in BYTES[128:]]
    words = [i for i in range(tokenizer.get_vocab_size()) if tokenizer.id_to_token(i).isascii() and i not in byte_ids]
    words = [i for i in words if tokenizer.id_to_token(i) not in BYTES]
    one = st.one_of(st.sampled_from(words), st.sampled_from(byte_ids), st.sampled_from(byte_ids))
    prompt, generated = data.draw(st.lists(st.sampled_from(words))), data.draw(st.lists(one, max_size=60))

    def ascii_of(text: str) -> str:
        return "".join(char for char in text if char.isascii())

    out = stream(tokenizer.decode, prompt, generated)
    assert ascii_of("".join(out)) == ascii_of(expected(tokenizer.decode, prompt, generated))


@pytest.mark.parametrize("name", ["byte_level", "unigram", "word_piece"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nothing_is_taken_back_and_little_is_held(name: str, data: st.DataObject) -> None:
    """Only U+FFFD; at most three, or as many as the last three tokens brought."""
    tokenizer = TOKENIZERS[name]()
    prompt, generated = data.draw(any_ids(name)), data.draw(any_ids(name))
    generated = [i for i in generated if tokenizer.id_to_token(i) not in SPECIAL]
    whole = expected(tokenizer.decode, prompt, generated)
    out = ""
    detokenizer = IncrementalDetokenizer(tokenizer.decode, prompt)
    for read, token_id in enumerate(generated, start=1):
        out += detokenizer.push(token_id)
        assert whole.startswith(out)
        held = expected(tokenizer.decode, prompt, generated[:read])[len(out) :]
        assert set(held) <= {"\ufffd"}
        assert len(held) <= 3 or len(expected(tokenizer.decode, prompt, generated[: max(0, read - 3)])) <= len(out)


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_no_character_is_ever_split(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(HARD + CORPUS[4]).ids
    out = stream(tokenizer.decode, [], ids)
    assert not any("\ufffd" in text for text in out)
    assert "" in out  # some tokens do end inside a character


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
@pytest.mark.parametrize("repeated", ["\ufffd", b"\x80", b"\xf0", b"\xf0\x9f", b"\xff"], ids=repr)
def test_hopeless_bytes_and_genuine_replacement_characters_do_not_stall(name: str, repeated: str | bytes) -> None:
    tokenizer = TOKENIZERS[name]()
    if isinstance(repeated, str):
        ids = tokenizer.encode(repeated).ids[-3:]
    elif name == "metaspace":
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in repeated]
    else:
        # The byte-level alphabet spells byte b as the b-th character of `ByteLevel` with an identity vocabulary.
        ids = [tokenizer.token_to_id(_byte_level_spelling(byte)) for byte in repeated]
    assert None not in ids
    decode = Decode(tokenizer)
    prompt = tokenizer.encode("A prompt").ids
    detokenizer = IncrementalDetokenizer(decode, prompt)
    given_so_far = 0
    for count in range(1, 201):
        for token_id in ids:
            given_so_far += len(detokenizer.push(token_id))
        assert given_so_far >= count - 4
    ending = detokenizer.push(tokenizer.encode("a").ids[-1]) + detokenizer.flush()
    assert ending.endswith("a")
    assert decode.tokens < 33 * decode.calls


def _byte_level_spelling(byte: int) -> str:
    """How GPT-2's alphabet writes a byte ≥ 0x80: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printable else chr(0x100 + [b for b in range(256) if b not in printable].index(byte))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_time_per_token_does_not_depend_on_the_length(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(" ".join(CORPUS) * 20).ids
    decode = Decode(tokenizer)
    text = "".join(stream(decode, ids, ids))
    assert text
    assert decode.calls < 2 * len(ids)
    assert decode.tokens < 20 * decode.calls


def test_special_tokens_that_are_not_shown_are_forgotten() -> None:
    tokenizer = metaspace()
    end = tokenizer.token_to_id(SPECIAL[0])
    word = tokenizer.encode("server").ids
    decode = Decode(tokenizer)
    for prompt in ([], [end] * 40, [*word, *[end] * 40]):
        generated = [*[end] * 300, *word, *[end] * 300, *word]
        assert "".join(stream(decode, prompt, generated)) == expected(decode, prompt, generated)
    assert decode.tokens < 20 * decode.calls


def test_spaces_before_words_are_kept_after_special_tokens() -> None:
    tokenizer = metaspace()
    end = tokenizer.token_to_id(SPECIAL[0])
    the, server = tokenizer.encode("the server").ids, tokenizer.encode("server").ids
    assert "".join(stream(tokenizer.decode, the, server)) == " server"
    assert "".join(stream(tokenizer.decode, [*the, *[end] * 30], server)) == " server"
    assert "".join(stream(tokenizer.decode, [end] * 30, server)) == "server"
    assert "".join(stream(tokenizer.decode, [], server)) == "server"


def test_a_character_begun_by_the_prompt_is_given_whole() -> None:
    tokenizer = byte_level()
    smile = [tokenizer.token_to_id(_byte_level_spelling(byte)) for byte in "🙂".encode()]
    prompt = [*tokenizer.encode("hi ").ids, *smile[:2]]
    assert stream(tokenizer.decode, prompt, smile[2:]) == ["", "🙂", ""]
    word = tokenizer.encode("x").ids
    assert "".join(stream(tokenizer.decode, prompt, word)) == "x"  # the prompt's own U+FFFD is not repeated


def test_flush_gives_an_unfinished_character_once() -> None:
    tokenizer = byte_level()
    smile = [tokenizer.token_to_id(_byte_level_spelling(byte)) for byte in "🙂".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer.decode)
    assert [detokenizer.push(token_id) for token_id in smile[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
