"""The prefix cache: what it finds is exactly what was kept, and using it changes no result."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.prefix_cache import BLOCK_TOKENS, BlockIndex
from knnlm_core.lm.protocol import Span
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import tiny_model, tiny_tokenizer

SEQUENCES = st.lists(st.lists(st.integers(0, 1), max_size=11), max_size=40)


@given(SEQUENCES, st.integers(0, 12))
def test_a_found_prefix_is_one_that_was_kept_and_none_longer_is_there(
    sequences: list[list[int]], num_blocks: int
) -> None:
    index = BlockIndex(num_blocks, block_tokens=2)
    content: dict[int, tuple[int, ...]] = {}  # block → all tokens up to its end; what the filled block stands for
    for tokens in sequences:
        known, new = index.insert(tokens)
        for i, block in enumerate(new, start=known + 1):
            content[block] = tuple(tokens[: 2 * i])
        assert len(index) <= num_blocks
        for asked in sequences:
            found = index.find(asked)
            assert [content[block] for block in found] == [tuple(asked[: 2 * i + 2]) for i in range(len(found))]
            assert len(set(found)) == len(found)


@given(SEQUENCES)
def test_with_room_for_everything_the_longest_common_prefix_is_found(sequences: list[list[int]]) -> None:
    index = BlockIndex(1000, block_tokens=2)
    for i, tokens in enumerate(sequences):
        best = max((_common(tokens, other) // 2 for other in sequences[:i]), default=0)
        assert len(index.find(tokens)) == best
        index.insert(tokens)


def test_what_was_used_longest_ago_goes_first_and_from_its_end() -> None:
    index = BlockIndex(4, block_tokens=1)
    index.insert([1, 2])
    index.insert([8, 9])
    index.find([1, 2])
    index.insert([5])
    assert [len(index.find(tokens)) for tokens in ([8, 9], [1, 2], [5])] == [1, 2, 1]


def test_a_chain_longer_than_the_cache_is_kept_as_far_as_it_fits() -> None:
    index = BlockIndex(3, block_tokens=1)
    assert len(index.insert([1, 2, 3, 4, 5])[1]) == 3
    assert len(index.find([1, 2, 3, 4, 5])) == 3


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding", "gemma2", "gpt_neox"])
def test_a_sequence_that_begins_with_a_kept_prefix_gives_the_same_rows(family: str) -> None:
    lm = HuggingFaceLM(
        tiny_model(family), Tokenizer(tiny_tokenizer()), name=family, max_sequences=3, prefix_cache_bytes=1 << 24
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 400, (3 * BLOCK_TOKENS + 9,), generator=generator).tolist()
    first = lm.allocate()
    lm.forward([Span(first, tokens[:50], rows=0)])
    lm.forward([Span(first, tokens[50:], rows=0)])
    lm.keep_prefix(first, tokens)
    lm.free(first)
    lm.forward([Span(lm.allocate(), list(range(1, 60)))])  # overwrites the slot that was freed

    again, fresh = lm.allocate(), lm.allocate()
    follow = [*tokens[: 2 * BLOCK_TOKENS + 5], 7, 8, 9, 10]  # leaves the kept text inside its third block
    assert lm.reuse_prefix(again, follow) == 2 * BLOCK_TOKENS
    assert lm.length(again) == 2 * BLOCK_TOKENS
    rest = follow[2 * BLOCK_TOKENS :]
    have = lm.forward([Span(again, rest, rows=len(rest))])
    need = lm.forward([Span(fresh, follow, rows=len(rest))])
    torch.testing.assert_close(have.keys, need.keys, rtol=0, atol=1e-4)
    torch.testing.assert_close(lm.logits(have.hidden), lm.logits(need.hidden), rtol=0, atol=1e-4)
    lm.close()


def test_memory_never_exceeds_its_bound() -> None:
    model, tokenizer = tiny_model("llama"), Tokenizer(tiny_tokenizer())
    lm = HuggingFaceLM(model, tokenizer, name="l", max_sequences=1, prefix_cache_bytes=300_000)
    reserved = lm.prefix_cache_use.reserved_bytes
    assert 0 < reserved <= 300_000
    chooser = random.Random(0)
    for _ in range(30):
        tokens = [chooser.randrange(1, 400) for _ in range(chooser.randrange(1, 100))]
        sequence = lm.allocate()
        known = lm.reuse_prefix(sequence, tokens[:-1])
        lm.forward([Span(sequence, tokens[known:], rows=0)])
        lm.keep_prefix(sequence, tokens)
        lm.free(sequence)
        assert lm.prefix_cache_use.used_bytes <= reserved
    assert lm.prefix_cache_use.used_bytes == reserved  # it did fill up
    lm.close()


def test_without_room_for_a_block_nothing_is_kept() -> None:
    lm = HuggingFaceLM(
        tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="l", max_sequences=2, prefix_cache_bytes=1
    )
    sequence = lm.allocate()
    lm.forward([Span(sequence, list(range(1, 90)), rows=0)])
    lm.keep_prefix(sequence, list(range(1, 90)))
    assert lm.reuse_prefix(lm.allocate(), list(range(1, 90))) == 0
    assert lm.prefix_cache_use.used_bytes == 0
    lm.close()
