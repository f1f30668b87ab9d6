"""Which beginnings llama.cpp's cache keeps: whole blocks, within bounds, the one used longest ago given up first."""

from __future__ import annotations

import random

from knnlm_core.lm.llamacpp_prefixes import KeptPrefixes
from knnlm_core.lm.prefix_cache import BLOCK_TOKENS

B = BLOCK_TOKENS


def kept(prefixes: KeptPrefixes, tokens: list[int]) -> int | None:
    return prefixes.keep(tokens)[0]


def test_a_beginning_is_found_in_whole_blocks() -> None:
    prefixes = KeptPrefixes([5, 6], 10 * B)
    text = list(range(3 * B + 7))
    holder = kept(prefixes, text)
    assert holder is not None
    assert prefixes.length(holder) == 3 * B
    assert prefixes.find(text) == (holder, 3 * B)
    assert prefixes.find([*text[: 2 * B + 5], -1]) == (holder, 2 * B)
    assert prefixes.find(text[: B - 1]) == (-1, 0)
    assert prefixes.find([]) == (-1, 0)


def test_what_is_known_is_not_kept_twice_and_what_goes_on_replaces_it() -> None:
    prefixes = KeptPrefixes([5, 6], 10 * B)
    first = kept(prefixes, list(range(2 * B)))
    assert prefixes.keep(list(range(2 * B + 3))) == (None, [])
    assert prefixes.keep(list(range(B))) == (None, [])
    longer, dropped = prefixes.keep(list(range(3 * B)))
    assert (longer is not None, dropped) == (True, [first])
    assert prefixes.tokens == 3 * B


def test_too_long_or_too_short_is_not_kept() -> None:
    prefixes = KeptPrefixes([5], 2 * B)
    assert prefixes.keep(list(range(B - 1))) == (None, [])
    assert prefixes.keep(list(range(3 * B))) == (None, [])
    assert KeptPrefixes([], 9 * B).keep(list(range(B))) == (None, [])
    assert KeptPrefixes([], 9 * B).max_tokens == 0


def test_what_was_used_longest_ago_goes_first() -> None:
    prefixes = KeptPrefixes([5, 6, 7], 3 * B)
    old, unused, new = ([i] * B for i in range(3))
    first, second, third = (kept(prefixes, text) for text in (old, unused, new))
    assert prefixes.find(old).sequence == first
    fourth, dropped = prefixes.keep([9] * B)
    assert dropped == [second]
    assert prefixes.release(3 * B) == []
    assert prefixes.release(B) == [third, first]
    assert prefixes.release(0) == [fourth]


def test_numbers_and_bounds_hold_whatever_is_kept() -> None:
    rng = random.Random(0)
    prefixes = KeptPrefixes(range(4), 9 * B)
    held: set[int] = set()
    for _ in range(500):
        if rng.random() < 0.2:
            limit = rng.randrange(9) * B
            held -= set(prefixes.release(limit))
            assert prefixes.tokens <= limit
        tokens = [rng.randrange(2) for _ in range(rng.randrange(6)) for _ in range(B)]
        holder, dropped = prefixes.keep(tokens)
        held -= set(dropped)
        if holder is not None:
            assert holder not in held
            held.add(holder)
        assert held <= set(range(4))
        assert prefixes.tokens == sum(prefixes.length(number) for number in held) <= 9 * B
