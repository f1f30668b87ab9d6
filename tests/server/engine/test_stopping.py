"""Stop strings across chunk borders, against searching the whole text."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm_server.engine.stopping import StopMatcher, StopResult

# Few letters, so that stop strings overlap, nest and repeat.
TEXT = st.text("abc", max_size=24)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """Start, end and name of the stop string that is complete first; the longest of those with the same end."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, minus_length, stop = min(found)
    return end + minus_length, end, stop


def cut(text: str, borders: list[int]) -> list[str]:
    points = [0, *sorted(min(border, len(text)) for border in borders), len(text)]
    return [text[start:stop] for start, stop in pairwise(points)]


def run(matcher: StopMatcher, chunks: list[str]) -> tuple[str, str | None]:
    out, matched = "", None
    for chunk in chunks:
        result = matcher.push(chunk)
        out += result.emit
        matched = result.matched
        assert result.stopped == (matched is not None)
    return out + matcher.flush(), matched


@settings(max_examples=400, deadline=None)
@given(TEXT, STOPS, st.lists(st.integers(0, 24), max_size=8), st.booleans())
def test_any_chunking_gives_the_text_cut_at_the_first_stop(
    text: str, stops: list[str], borders: list[int], include_stop: bool
) -> None:
    out, matched = run(StopMatcher(stops, include_stop), cut(text, borders))
    expected = first_stop(text, stops)
    if expected is None:
        assert (out, matched) == (text, None)
    else:
        start, end, stop = expected
        assert (out, matched) == (text[: end if include_stop else start], stop)


@settings(max_examples=300, deadline=None)
@given(TEXT, STOPS)
def test_the_match_is_reported_with_the_character_that_completes_it(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    expected = first_stop(text, stops)
    for read, char in enumerate(text, start=1):
        result = matcher.push(char)
        assert result.stopped == (expected is not None and read >= expected[1])


@settings(max_examples=300, deadline=None)
@given(TEXT, STOPS)
def test_what_is_held_back_is_exactly_what_some_continuation_would_cut(text: str, stops: list[str]) -> None:
    """Shortest output over all continuations = what was emitted: less is not needed, more would be wrong."""
    if first_stop(text, stops) is not None:
        return
    matcher = StopMatcher(stops)
    emitted = matcher.push(text).emit
    # What a continuation can cut begins with a stop string's rest, so trying every rest of every stop is exhaustive.
    endings = {stop[k:] for stop in stops for k in range(1, len(stop))}
    outputs = [len(text)]
    for ending in endings:
        cut_at = first_stop(text + ending, stops)
        if cut_at is not None:
            outputs.append(cut_at[0])
    assert emitted == text[: min(outputs)]
    assert matcher.held == text[min(outputs) :]


@pytest.mark.parametrize(
    ("stops", "text", "out", "matched"),
    [
        (["bc", "abc"], "xabc", "x", "abc"),  # same end: the longest
        (["abc", "bc"], "xabc", "x", "abc"),  # … in whatever order they are listed
        (["ab", "abc"], "xabc", "x", "ab"),  # complete first
        (["abcd", "bc"], "abcd", "a", "bc"),  # complete first, though the other begins earlier
        (["aa", "aa"], "baaa", "b", "aa"),
        (["\n\n"], "one\n\ntwo", "one", "\n\n"),
        (["🙂"], "a🙂b", "a", "🙂"),
        (["é"], "e\u0301 é", "e\u0301 ", "é"),  # code points, no normalisation
    ],
)
def test_which_of_several_stops_wins(stops: list[str], text: str, out: str, matched: str) -> None:
    assert run(StopMatcher(stops), list(text)) == (out, matched)


def test_a_failed_partial_match_is_given_back_at_once() -> None:
    matcher = StopMatcher(["<|end|>"])
    assert matcher.push("a <|en") == StopResult("a ", False, None)
    assert matcher.held == "<|en"
    assert matcher.push("ough <") == StopResult("<|enough ", False, None)
    assert matcher.flush() == "<"
    assert matcher.flush() == ""


def test_text_after_the_match_is_dropped() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("one. two") == StopResult("one", True, ".")
    assert matcher.push("three.") == StopResult("", True, ".")
    assert matcher.flush() == ""


def test_an_included_stop_string_is_never_held_back() -> None:
    matcher = StopMatcher(["abc"], include_stop=True)
    assert matcher.push("xab") == StopResult("xab", False, None)
    assert matcher.push("cd") == StopResult("c", True, "abc")


def test_a_stop_that_can_never_be_complete_first_holds_nothing_back() -> None:
    assert StopMatcher(["aab", "a"]).push("x").emit == "x"
    matcher = StopMatcher(["xyab", "y"])
    assert matcher.push("x").emit == "x"


def test_a_copy_goes_its_own_way_from_the_same_state() -> None:
    matcher = StopMatcher(["abc"])
    matcher.push("xab")
    twin = matcher.copy()
    assert twin.push("c") == StopResult("", True, "abc")
    assert matcher.push("d") == StopResult("abd", False, None)
    assert matcher.copy().push("abc").matched == "abc"
    assert twin.copy().push("z").stopped


def test_the_largest_accepted_stops_cost_linear_time() -> None:
    stops = ["a" * (1023 - i) + "b" for i in range(32)]
    matcher = StopMatcher(stops)
    start = time.perf_counter()
    assert len(matcher.push("a" * 50_000).emit) == 50_000 - 1023
    assert time.perf_counter() - start < 5  # quadratic matching would take minutes
