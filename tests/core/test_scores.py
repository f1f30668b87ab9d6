"""Reported numbers against slow formulas in exactly rounded float64 sums."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.scores import BUCKETS, LogProbs, Loss, bucket_of, buckets, loss, no_overlap, overlap_sums, total_nll

LONGEST = (0, 1, 2, 4, 8, 16, 32)
TOKENS = st.lists(st.tuples(st.sampled_from(LONGEST), *[st.floats(-80, 0, width=32)] * 2), max_size=120)


def columns(tokens: list[tuple[int, float, float]]) -> tuple[np.ndarray, LogProbs, LogProbs]:
    matches, base, mixed = zip(*tokens, strict=True) if tokens else ((), (), ())
    return np.array(matches, np.uint8), np.array(base, np.float32), np.array(mixed, np.float32)


def slow_loss(log_probs: list[float], num_bytes: int) -> Loss:
    nll = -math.fsum(log_probs)
    perplexity = math.exp(nll / len(log_probs)) if log_probs else None
    return Loss(nll, perplexity, nll / math.log(2) / num_bytes if num_bytes else None)


def nearly(measures: Loss) -> tuple[object, ...]:
    return tuple(None if value is None else pytest.approx(value, rel=1e-12, abs=1e-12) for value in measures)


@given(st.lists(st.floats(-80, 0, width=32), max_size=120), st.integers(0, 1000))
def test_losses_are_those_of_the_formula(log_probs: list[float], num_bytes: int) -> None:
    nll = total_nll(np.array(log_probs, np.float32))
    assert loss(nll, len(log_probs), num_bytes) == nearly(slow_loss(log_probs, num_bytes))


def test_many_small_terms_are_not_lost() -> None:
    log_probs = np.full(3_000_000, -1e-4, np.float32)
    log_probs[0] = -1e6
    assert total_nll(log_probs) == pytest.approx(1e6 + 2_999_999 * float(np.float32(1e-4)), rel=1e-12)


def test_a_certain_text_has_the_loss_zero_and_not_minus_zero() -> None:
    for log_probs in (np.zeros(3, np.float32), np.zeros(0, np.float32)):
        assert math.copysign(1, total_nll(log_probs)) == 1
    assert loss(0.0, 3, 9) == (0.0, 1.0, 0.0)
    assert loss(0.0, 0) == (0.0, None, None)


def test_a_token_of_probability_zero_leaves_no_measure() -> None:
    assert total_nll(np.array([-1, -np.inf], np.float32)) == math.inf
    assert loss(math.inf, 2, 9) == (None, None, None)


def test_an_enormous_loss_has_a_perplexity_that_json_can_carry() -> None:
    json.dumps(loss(1e300, 1, 1), allow_nan=False)


def test_buckets_are_powers_of_two() -> None:
    assert BUCKETS == ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, None))
    for longest in range(256):
        (which,) = bucket_of(np.array([longest], np.uint8))
        low, high = BUCKETS[which]
        assert low <= longest <= (math.inf if high is None else high)


@given(TOKENS)
def test_every_token_is_in_the_bucket_of_its_longest_match(tokens: list[tuple[int, float, float]]) -> None:
    found = buckets(overlap_sums(*columns(tokens)))
    assert [(bucket.low, bucket.high) for bucket in found] == list(BUCKETS)
    assert [bucket.label for bucket in found] == ["0", "1", "2–3", "4–7", "8–15", "16–31", "32+"]
    for bucket, longest in zip(found, LONGEST, strict=True):
        inside = [token for token in tokens if token[0] == longest]
        assert bucket.tokens == len(inside)
        assert bucket.base == nearly(slow_loss([base for _, base, _ in inside], 0))
        assert bucket.mixed == nearly(slow_loss([mixed for *_, mixed in inside], 0))
        assert bucket.to_json() == {
            "longest_match": [bucket.low, bucket.high],
            "tokens": len(inside),
            "base": {"nll": bucket.base.nll, "perplexity": bucket.base.perplexity},
            "mixed": {"nll": bucket.mixed.nll, "perplexity": bucket.mixed.perplexity},
        }


@given(TOKENS, st.integers(0, 120))
def test_the_sums_of_two_texts_add_up_to_those_of_both(tokens: list[tuple[int, float, float]], cut: int) -> None:
    parts = overlap_sums(*columns(tokens[:cut])) + overlap_sums(*columns(tokens[cut:])) + no_overlap()
    assert parts == pytest.approx(overlap_sums(*columns(tokens)), rel=1e-12, abs=1e-12)


def test_a_bucket_without_tokens_has_no_perplexity_and_one_of_probability_zero_has_nothing() -> None:
    impossible = np.array([-np.inf], np.float32)
    first, second, *_ = buckets(overlap_sums(np.array([0], np.uint8), np.array([-1], np.float32), impossible))
    assert (first.tokens, first.base.nll, first.mixed) == (1, 1.0, Loss(None, None, None))
    assert (second.tokens, second.base, second.mixed) == (0, Loss(0.0, None, None), Loss(0.0, None, None))
