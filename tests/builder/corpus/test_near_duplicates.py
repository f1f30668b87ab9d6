"""Containment by n-grams: the streaming filter against sets of tuples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_builder.corpus import NearDuplicateFilter, NgramSet, containment, near_duplicates
from knnlm_core.errors import InvalidParameter

TOKENS = st.lists(st.integers(0, 3), max_size=25)
DOCUMENTS = st.lists(TOKENS, max_size=5)
N = st.integers(1, 6)


def reference_ngrams(tokens: Sequence[int], n: int) -> set[tuple[int, ...]]:
    if not tokens:
        return set()
    n = min(n, len(tokens))
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def reference_containment(candidate: Sequence[int], store: Sequence[Sequence[int]], n: int) -> float:
    grams = reference_ngrams(candidate, n)
    held = set().union(*(reference_ngrams(document, n) for document in store))
    return len(grams & held) / len(grams) if grams else 0.0


def filtered(candidates: Sequence[Sequence[int]], store: Sequence[Sequence[int]], n: int) -> dict[str, float]:
    near = NearDuplicateFilter({str(i): np.array(c, np.int64) for i, c in enumerate(candidates)}, n)
    for document in store:
        near.observe(np.array(document, np.int64))
    return near.containment()


@given(DOCUMENTS, DOCUMENTS, N)
def test_containment_is_that_of_sets_of_tuples(candidates: list[list[int]], store: list[list[int]], n: int) -> None:
    expected = {str(i): reference_containment(c, store, n) for i, c in enumerate(candidates)}
    assert filtered(candidates, store, n) == pytest.approx(expected, abs=1e-12)


@given(TOKENS, TOKENS, N)
def test_two_ngram_sets_agree_with_sets_of_tuples(candidate: list[int], store: list[int], n: int) -> None:
    one, other = NgramSet.of(np.array(candidate), n), NgramSet.of(np.array(store), n)
    assert len(one) == len(reference_ngrams(candidate, n))
    assert containment(one, other) == pytest.approx(reference_containment(candidate, [store], n), abs=1e-12)


@given(DOCUMENTS, DOCUMENTS, N, st.randoms(use_true_random=False))
def test_neither_the_order_of_the_store_nor_repetition_matters(candidates, store, n, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = store + store[:2]
    random.shuffle(shuffled)
    assert filtered(candidates, shuffled, n) == filtered(candidates, store, n)


@given(DOCUMENTS, DOCUMENTS, N, st.integers(1, 5))
def test_working_in_chunks_changes_nothing(
    candidates: list[list[int]], store: list[list[int]], n: int, chunk: int
) -> None:
    whole = filtered(candidates, store, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "_CHUNK", chunk)
        assert filtered(candidates, store, n) == whole


def test_containment_grows_from_nothing_to_everything() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 500)
    near = NearDuplicateFilter({"page": tokens})
    assert near.containment() == {"page": 0.0}
    near.observe(tokens[:256])  # 244 of the 488 grams of 13 tokens
    assert near.containment() == {"page": 0.5}
    near.observe(tokens)
    assert near.containment() == {"page": 1.0}


def test_one_changed_token_costs_the_grams_that_hold_it() -> None:
    tokens = np.arange(113)
    changed = tokens.copy()
    changed[50] = 999
    near = NearDuplicateFilter({"page": changed}, n=13)
    near.observe(tokens)
    assert near.containment()["page"] == pytest.approx((101 - 13) / 101)


def test_a_short_candidate_is_one_gram_of_its_own_length() -> None:
    near = NearDuplicateFilter({"short": np.array([1, 2, 3]), "none": np.array([])}, n=4)
    near.observe(np.array([1, 2, 3, 4, 1, 2, 3]))
    assert near.containment() == {"short": 0.0, "none": 0.0}
    near.observe(np.array([1, 2, 3]))
    assert near.containment() == {"short": 1.0, "none": 0.0}


def test_leading_zeros_are_tokens_too() -> None:
    near = NearDuplicateFilter({"short": np.array([1, 2])}, n=4)
    near.observe(np.array([0, 0, 1, 2]))
    assert near.containment() == {"short": 0.0}


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.uint32, np.uint64])
def test_the_integer_type_does_not_matter(kind: type[np.integer]) -> None:
    tokens = np.arange(40, dtype=np.int64)
    assert containment(NgramSet.of(tokens.astype(kind)), NgramSet.of(tokens)) == 1.0


def test_the_callers_arrays_are_left_alone() -> None:
    tokens = np.arange(40, dtype=np.uint64)
    near = NearDuplicateFilter({"page": tokens})
    near.observe(tokens)
    assert tokens.tolist() == list(range(40))


@pytest.mark.parametrize("scale", [1, 1 << 16, 1 << 31], ids=["units", "2^16", "2^31"])
def test_grams_of_small_or_even_numbers_do_not_collide(scale: int) -> None:
    # Without mixing, tokens that are multiples of a power of two leave only a few bits of the hash in use.
    sequence = np.array(list(itertools.product(range(18), repeat=4)), dtype=np.int64).ravel() * scale
    windows = np.lib.stride_tricks.sliding_window_view(sequence, 4)
    assert len(NgramSet.of(sequence, 4)) == len({tuple(window) for window in windows.tolist()})


def test_no_candidates_are_fine() -> None:
    near = NearDuplicateFilter({})
    near.observe(np.arange(20))
    assert near.containment() == {}


@pytest.mark.parametrize("tokens", [np.array([0.5]), np.array([[1, 2]]), np.array([True])])
def test_what_is_no_row_of_integers_is_refused(tokens: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(InvalidParameter, match="`tokens` must be a one-dimensional integer array, got"):
        NgramSet.of(tokens)
    with pytest.raises(InvalidParameter, match="`tokens`"):
        NearDuplicateFilter({"page": np.arange(20)}).observe(tokens)


def test_n_must_be_positive_and_the_same_on_both_sides() -> None:
    with pytest.raises(InvalidParameter, match="`n` must be at least 1, got 0"):
        NearDuplicateFilter({"page": np.arange(3)}, n=0)
    with pytest.raises(InvalidParameter, match="`n` must be the same in both sets, got 2 and 3"):
        containment(NgramSet.of(np.arange(9), 2), NgramSet.of(np.arange(9), 3))
