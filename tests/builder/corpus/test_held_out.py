"""Which documents are held out, and where a held-out tail starts."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_builder.corpus import SourceDocument, SourceLocation, document_digest, is_candidate, split_tail
from knnlm_core.errors import InvalidParameter

FRACTION = st.floats(0.0, 1.0)
SEED = st.integers(-(2**63), 2**63 - 1)
DIGEST = st.binary(min_size=32, max_size=32)
DIGESTS = [hashlib.sha256(b"%d" % number).digest() for number in range(20_000)]


def held_out(fraction: float, seed: int) -> set[bytes]:
    return {digest for digest in DIGESTS if is_candidate(digest, fraction, seed)}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_about_the_fraction_asked_for_is_held_out(fraction: float) -> None:
    count = len(held_out(fraction, seed=0))
    deviation = (len(DIGESTS) * fraction * (1 - fraction)) ** 0.5
    assert abs(count - len(DIGESTS) * fraction) < 5 * deviation


def test_another_seed_holds_out_other_documents() -> None:
    one, other = held_out(0.1, seed=1), held_out(0.1, seed=2)
    assert len(one & other) < 0.03 * len(DIGESTS)  # 0.01 expected of independent draws


@given(DIGEST, FRACTION, FRACTION, SEED)
def test_what_is_held_out_stays_so_at_a_larger_fraction(digest: bytes, one: float, other: float, seed: int) -> None:
    assert is_candidate(digest, min(one, other), seed) <= is_candidate(digest, max(one, other), seed)


@given(DIGEST, SEED)
def test_fraction_zero_holds_out_nothing_and_one_everything(digest: bytes, seed: int) -> None:
    assert not is_candidate(digest, 0.0, seed)
    assert is_candidate(digest, 1.0, seed)


@given(DIGEST, FRACTION, SEED)
def test_the_choice_is_the_hash_against_the_threshold(digest: bytes, fraction: float, seed: int) -> None:
    drawn = hashlib.sha256((seed % 2**64).to_bytes(8, "little") + digest).digest()
    assert is_candidate(digest, fraction, seed) == (
        Fraction(int.from_bytes(drawn[:8], "little"), 2**64) < Fraction(int(Fraction(fraction) * 2**64), 2**64)
    )


def test_the_choice_never_changes_between_releases() -> None:
    # Published datastores name the seed; the same documents must be held out when they are calibrated again.
    chosen = [number for number in range(200) if is_candidate(DIGESTS[number], 0.05, seed=17)]
    assert chosen == [0, 3, 20, 42, 47, 51, 73, 75, 109, 166, 176, 178]


@given(st.integers(0, 10**12), FRACTION)
def test_the_tail_has_the_fraction_of_the_tokens_rounded_down(num_tokens: int, fraction: float) -> None:
    position = split_tail(num_tokens, fraction)
    assert 0 <= position <= num_tokens
    exact = num_tokens * Fraction(fraction)
    assert abs(num_tokens - position - int(exact)) <= 1  # one ulp of the product may carry it over an integer
    if num_tokens < 2**20:
        assert num_tokens - position <= exact + Fraction(1, 2**30)


def test_tails_of_round_numbers() -> None:
    assert [split_tail(n, 0.1) for n in (0, 1, 9, 10, 11, 1000)] == [0, 1, 9, 9, 10, 900]
    assert split_tail(7, 0.0) == 7
    assert split_tail(7, 1.0) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_fraction_outside_its_limits_is_refused(fraction: float) -> None:
    with pytest.raises(InvalidParameter, match=f"`fraction` must be in 0 … 1, got {fraction}"):
        is_candidate(DIGESTS[0], fraction, 0)
    with pytest.raises(InvalidParameter, match="`fraction`"):
        split_tail(10, fraction)


def test_other_parameters_outside_their_limits_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="`document_digest` must have 32 bytes, got 3"):
        is_candidate(b"abc", 0.5, 0)
    with pytest.raises(InvalidParameter, match="`seed` must be a signed 64-bit integer, got 9223372036854775808"):
        is_candidate(DIGESTS[0], 0.5, 2**63)
    with pytest.raises(InvalidParameter, match="`num_tokens` must be at least 0, got -1"):
        split_tail(-1, 0.5)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(TEXT, TEXT, TEXT, TEXT)
def test_documents_that_differ_have_different_digests(id1: str, text1: str, id2: str, text2: str) -> None:
    assert (document_digest(id1, text1) == document_digest(id2, text2)) == ((id1, text1) == (id2, text2))


@given(TEXT, TEXT, st.integers(0, 12))
def test_moving_the_border_between_id_and_text_changes_the_digest(one: str, other: str, cut: int) -> None:
    joined = one + other
    moved = document_digest(joined[:cut], joined[cut:])
    assert (moved == document_digest(one, other)) == (joined[:cut] == one)


def test_the_digest_covers_lengths_and_utf8() -> None:
    parts = b"\x02" + b"\0" * 7 + "é".encode() + b"\x03" + b"\0" * 7 + b"abc"
    assert document_digest("é", "abc") == hashlib.sha256(parts).digest()
    document = SourceDocument("é", "abc", SourceLocation(Path("anywhere")), title="not covered")
    assert document.digest == document_digest("é", "abc")
