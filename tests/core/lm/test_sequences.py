"""The table of sequences that both runtimes own."""

from __future__ import annotations

import pytest

from knnlm_core.errors import InvalidParameter, Overloaded, PromptTooLong
from knnlm_core.lm.sequences import DEFAULT_MAX_LENGTH, Sequences, choose_max_length


def test_the_lowest_free_one_is_handed_out_and_no_more_than_there_are() -> None:
    table = Sequences(3, 10)
    assert [table.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Overloaded, match="all 3 sequences are in use"):
        table.allocate()
    for sequence in (2, 0):
        table.free(sequence)
    assert (table.num_free, table.allocate(7), table.length(0)) == (2, 0, 7)
    with pytest.raises(KeyError):
        table.free(2)  # twice


def test_lengths_follow_what_is_appended_and_forgotten() -> None:
    table = Sequences(2, 10)
    one, other = table.allocate(), table.allocate()
    table.begin(one, 4)
    with pytest.raises(AssertionError, match="only an empty sequence"):
        table.begin(one, 4)
    table.check_room(one, 6)
    with pytest.raises(PromptTooLong, match="at most 10 tokens, got 11"):
        table.check_room(one, 7)
    table.extend(one, 6)
    table.extend(other, 3)
    assert table.num_tokens == 13
    table.rewind(one, 2)
    assert (table.length(one), table.num_tokens) == (2, 5)
    for length in (-1, 3):
        with pytest.raises(InvalidParameter, match=rf"`length` must be in 0 … 2, got {length}"):
            table.rewind(one, length)
    table.clear()
    assert (table.num_free, table.num_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "requested", "length"),
    [(256, None, 256), (256, 2, 2), (256, 256, 256), (10 * DEFAULT_MAX_LENGTH, None, DEFAULT_MAX_LENGTH)],
)
def test_a_sequence_is_as_long_as_asked_for_else_as_the_model_allows(
    limit: int, requested: int | None, length: int
) -> None:
    assert choose_max_length(limit, requested) == length


@pytest.mark.parametrize("requested", [1, 257])
def test_lengths_beyond_the_model_are_refused(requested: int) -> None:
    with pytest.raises(InvalidParameter, match=rf"`max_model_len` must be in 2 … 256 .*, got {requested}"):
        choose_max_length(256, requested)
