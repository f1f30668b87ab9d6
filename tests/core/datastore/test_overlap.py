"""Longest matches against a slow and obvious search through sets of tuples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import Plan, open_new, random_keys

from knnlm_core.datastore import overlap
from knnlm_core.datastore.overlap import LENGTHS, longest_matches
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import InvalidParameter
from knnlm_core.types import EntryRange

SIZES = (40, 1, 0, 90, 33, 0, 2, 134)  # entries of each document
ENTRIES = sum(SIZES)


class Stored(NamedTuple):
    datastore: Datastore
    values: list[int]
    documents: list[EntryRange]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    """Few different tokens, long repetitions, documents that end in the middle of a shard and shards in a document."""
    draw = np.random.default_rng(5)
    values = draw.integers(0, 3, ENTRIES)
    values[200:260] = values[50:110]
    values[0:40] = np.arange(40) % 2
    plan = Plan(
        keys=random_keys(ENTRIES, 8), values=values, document_sizes=SIZES, cuts=(35, 100, 101, 250), name="overlaps"
    )
    ends = np.cumsum(SIZES).tolist()
    documents = [EntryRange(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    root: Path = tmp_path_factory.mktemp("overlap")
    with open_new(root, plan) as datastore:
        yield Stored(datastore, values.tolist(), documents)


def reference(stored: Stored, text: Sequence[int], exclude: Sequence[EntryRange]) -> list[int]:
    """Slow and obvious."""
    excluded = {entry for range_ in exclude for entry in range(*range_)}
    runs: set[tuple[int, ...]] = set()
    for document in stored.documents:
        for n in LENGTHS:
            for first in range(document.first, document.stop - n + 1):
                if excluded.isdisjoint(range(first, first + n)):
                    runs.add(tuple(stored.values[first : first + n]))
    return [
        max((n for n in LENGTHS if n <= end and tuple(text[end - n : end]) in runs), default=0)
        for end in range(1, len(text) + 1)
    ]


@st.composite
def texts(draw: st.DrawFn) -> list[list[int]]:
    """Random tokens with copies from anywhere in the datastore's values, which the test fills in."""
    part = st.tuples(st.integers(0, ENTRIES - 1), st.integers(1, 80)) | st.lists(st.integers(0, 4), max_size=4)
    return [draw(st.lists(part, max_size=4)) for _ in range(draw(st.integers(0, 4)))]  # type: ignore[misc]


def spell(stored: Stored, parts: list[object]) -> list[int]:
    """A text from parts: (first, count) copies values, a list stands for itself."""
    text: list[int] = []
    for part in parts:
        text.extend(stored.values[part[0] : part[0] + part[1]] if isinstance(part, tuple) else part)  # type: ignore[arg-type]
    return text


def ranges() -> st.SearchStrategy[EntryRange]:
    bounds = st.integers(0, ENTRIES)
    return st.tuples(bounds, bounds).map(lambda pair: EntryRange(min(pair), max(pair)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    parts=texts(),
    exclude=st.lists(ranges(), max_size=3),
    sizes=st.sampled_from([(13, 1 << 18), (31, 1 << 18), (64, 40), (1 << 16, 40), (1 << 16, 7), (1 << 16, 1 << 18)]),
)
def test_matches_equal_a_search_through_sets_of_tuples(
    stored: Stored,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    parts: list[list[object]],
    exclude: list[EntryRange],
    sizes: tuple[int, int],
) -> None:
    given_texts = [spell(stored, text) for text in parts]
    own = [data.draw(st.none() | st.sampled_from(stored.documents)) for _ in given_texts]
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "_BLOCK_ENTRIES", sizes[0])
        patch.setattr(overlap, "_BATCH_TOKENS", sizes[1])
        found = longest_matches(
            stored.datastore, [np.array(text, np.int32) for text in given_texts], exclude=exclude, own=own
        )
    for text, alone, have in zip(given_texts, own, found, strict=True):
        need = reference(stored, text, [*exclude, *([alone] if alone else [])])
        assert have.tolist() == need


def test_a_run_over_the_end_of_a_document_does_not_count(stored: Stored) -> None:
    # The last 16 values of the first document and the one value of the second.
    text = np.array(stored.values[24:41], np.int32)
    ends_within, ends_beyond = longest_matches(stored.datastore, [text[:-1], text])
    assert ends_within[-1] == 16
    assert ends_beyond[-1] < 16


def test_an_own_document_counts_for_the_others_only(stored: Stored) -> None:
    document = stored.documents[7]
    text = np.array(stored.values[260:300], np.int32)
    own, other = longest_matches(stored.datastore, [text, text], own=[document, None])
    assert other[-1] == 32
    assert own[-1] < 32
    (excluded,) = longest_matches(stored.datastore, [text], exclude=[document])
    assert own.tolist() == excluded.tolist()


def test_everything_excluded_matches_nothing(stored: Stored) -> None:
    text = np.array(stored.values[:64], np.int32)
    (found,) = longest_matches(stored.datastore, [text], exclude=[EntryRange(0, ENTRIES)])
    assert not found.any()


def test_a_checkpoint_ends_the_search(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_BLOCK_ENTRIES", 64)
    calls = []

    def third_time() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        longest_matches(stored.datastore, [np.zeros(3, np.int32)], checkpoint=third_time)
    assert len(calls) == 3


def test_a_range_beyond_the_datastore_is_refused(stored: Stored) -> None:
    beyond = EntryRange(0, ENTRIES + 1)
    for ranges_ in ({"exclude": [beyond]}, {"own": [beyond]}):
        with pytest.raises(InvalidParameter, match=str(ENTRIES)):
            longest_matches(stored.datastore, [np.zeros(1, np.int32)], **ranges_)  # type: ignore[arg-type]
