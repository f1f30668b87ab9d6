"""Rolling windows: every token once, with the context that was promised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.errors import InvalidParameter
from knnlm_core.windows import Window, check_window, context_length, rolling_windows


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """A text's length, a window and a stride."""
    window = draw(st.integers(2, 40))
    return draw(st.integers(0, 200)), window, draw(st.integers(1, window - 1))


@given(cuts())
def test_every_position_but_the_first_is_scored_exactly_once_and_in_order(cut: tuple[int, int, int]) -> None:
    n, window, stride = cut
    scored = [t for w in rolling_windows(n, window, stride) for t in range(w.first_target, w.end)]
    assert scored == list(range(1, n))


@given(cuts())
def test_windows_are_slices_of_the_text_that_fit_and_score_something(cut: tuple[int, int, int]) -> None:
    n, window, stride = cut
    for number, w in enumerate(rolling_windows(n, window, stride)):
        assert 0 <= w.begin < w.first_target < w.end <= n
        assert w.end - w.begin <= window
        assert w.num_targets == w.end - w.first_target
        assert w.num_targets <= (stride if number else window - 1)


@given(cuts())
def test_after_the_first_window_every_token_has_at_least_window_minus_stride_of_context(
    cut: tuple[int, int, int],
) -> None:
    n, window, stride = cut
    _, *later = rolling_windows(max(n, 2), window, stride)
    assert all(w.first_target - w.begin >= window - stride for w in later)


@given(cuts())
def test_the_last_window_has_the_full_context_that_its_length_allows(cut: tuple[int, int, int]) -> None:
    n, window, stride = cut
    if n >= 2:
        *_, last = rolling_windows(n, window, stride)
        assert (last.begin, last.end) == (max(0, n - window), n)


@given(cuts())
def test_context_length_says_what_the_windows_do(cut: tuple[int, int, int]) -> None:
    n, window, stride = cut
    for w in rolling_windows(n, window, stride):
        for position in range(w.first_target, w.end):
            assert context_length(position, n, window, stride) == position - w.begin


def test_the_picture_in_the_documentation() -> None:
    assert list(rolling_windows(14, 8, 4)) == [Window(0, 8, 1), Window(4, 12, 8), Window(6, 14, 12)]


@pytest.mark.parametrize("n", [0, 1])
def test_a_text_without_a_second_token_has_no_window(n: int) -> None:
    assert list(rolling_windows(n, 8, 4)) == []


@pytest.mark.parametrize(
    ("window", "stride", "max_length", "message"),
    [
        (1, 1, None, "`window` must be at least 2 tokens, got 1"),
        (0, 1, None, "`window` must be at least 2 tokens, got 0"),
        (257, 16, 256, "`window` must be at most the model's context of 256 tokens, got 257"),
        (8, 8, None, r"`stride` must be at least 1 and less than `window` \(8\), got 8"),
        (8, 0, None, r"`stride` must be at least 1 and less than `window` \(8\), got 0"),
        (8, -4, None, r"`stride` must be at least 1 and less than `window` \(8\), got -4"),
    ],
)
def test_windows_that_leave_a_token_without_context_are_refused(
    window: int, stride: int, max_length: int | None, message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        check_window(window, stride, max_length)
    if max_length is None:
        with pytest.raises(InvalidParameter, match=message):
            list(rolling_windows(100, window, stride))


def test_a_window_of_the_whole_context_is_allowed() -> None:
    check_window(256, 255, 256)


@pytest.mark.parametrize("position", [-1, 0, 14, 15])
def test_a_position_that_is_never_scored_has_no_context_length(position: int) -> None:
    with pytest.raises(InvalidParameter, match=f"`position` must be in 1 … 13, got {position}"):
        context_length(position, 14, 8, 4)
