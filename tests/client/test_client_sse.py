"""The parser of server-sent events."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from knnlm_client._sse import EventStreamParser

LINE_ENDS = ["\n", "\r\n", "\r"]
LINES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12)
NOISE = st.sampled_from([": keep-alive", ":", "event: progress", "id: 7", "retry: 10", "data-ish: x", "unknown"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A stream's bytes, and the data of its events."""
    end = draw(st.sampled_from(LINE_ENDS))
    events = draw(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=6))
    text = ""
    for event in events:
        for line in event:
            text += draw(st.sampled_from(["", draw(NOISE) + end]))
            # One space after the colon belongs to the syntax and may be missing, unless the data begins with one.
            text += "data:" + draw(st.sampled_from([" "] if line.startswith(" ") else [" ", ""])) + line + end
        text += end * draw(st.integers(1, 3))
    return text.encode(), ["\n".join(event) for event in events]


def cut(body: bytes, places: list[int]) -> list[bytes]:
    """The body in pieces, some of them empty where a place is named twice."""
    borders = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:stop] for start, stop in pairwise(borders)]


@given(streams(), st.lists(st.integers(0, 10_000), max_size=30))
def test_events_are_the_same_wherever_the_bytes_are_cut(stream: tuple[bytes, list[str]], places: list[int]) -> None:
    body, events = stream
    parser = EventStreamParser()
    assert [event for piece in cut(body, places) for event in parser.feed(piece)] == events


@given(streams())
def test_events_are_the_same_byte_by_byte(stream: tuple[bytes, list[str]]) -> None:
    body, events = stream
    parser = EventStreamParser()
    assert [event for place in range(len(body)) for event in parser.feed(body[place : place + 1])] == events


def test_an_event_is_given_out_as_soon_as_it_is_complete() -> None:
    for end in LINE_ENDS:
        parser = EventStreamParser()
        assert parser.feed(f"data: one{end}".encode()) == []
        assert parser.feed(end.encode()) == ["one"], repr(end)
        assert parser.feed(f"data: two{end}{end}".encode()) == ["two"], repr(end)


def test_a_crlf_cut_in_its_middle_is_one_line_end() -> None:
    parser = EventStreamParser()
    pieces = [b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n"]
    assert [event for piece in pieces for event in parser.feed(piece)] == ["a\nb"]


def test_line_separators_of_unicode_do_not_end_a_line() -> None:
    assert EventStreamParser().feed("data: a\u2028b\x85c\x0cd\n\n".encode()) == ["a\u2028b\x85c\x0cd"]


def test_an_unfinished_event_is_not_given_out() -> None:
    assert EventStreamParser().feed(b"data: whole\n\ndata: half\n") == ["whole"]
