"""Counts of runs are those of a slow walk over the documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.datastore.ngrams import MAX_VOCAB_SIZE, NgramTable
from knnlm_core.datastore.reader import DocumentTokens

VOCAB = 5
DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=6)


def table_of(documents: list[list[int]], vocab_size: int = VOCAB) -> NgramTable:
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    return NgramTable(DocumentTokens(np.concatenate([np.array(d) for d in documents]), starts), vocab_size)


def runs_of(documents: list[list[int]], length: int) -> list[tuple[int, ...]]:
    return [tuple(d[i : i + length]) for d in documents for i in range(len(d) - length + 1)]


@given(DOCUMENTS)
def test_every_run_is_counted_as_a_walk_counts_it(documents: list[list[int]]) -> None:
    table = table_of(documents)
    every = np.arange(-1, VOCAB)
    for length in (2, 3):
        found = runs_of(documents, length)
        asked = np.stack(np.meshgrid(*[every] * length, indexing="ij")).reshape(length, -1)
        assert table.count(*asked).tolist() == [found.count(tuple(run)) for run in asked.T.tolist()]
        before = np.stack(np.meshgrid(*[every] * (length - 1), indexing="ij")).reshape(length - 1, -1)
        followed = table.after(*before)
        for run, count, fertility in zip(before.T.tolist(), followed.times, followed.fertility, strict=True):
            after = [r[-1] for r in found if r[:-1] == tuple(run)]
            assert (count, fertility) == (len(after), len(set(after)))


def test_a_run_does_not_cross_from_one_document_into_the_next() -> None:
    table = table_of([[1, 2], [3, 4]])
    asked = [np.array([t]) for t in (2, 3)]
    assert table.count(*asked).tolist() == [0]
    assert table.after(np.array([2])).times.tolist() == [0]


def test_the_largest_vocabulary_has_distinct_runs() -> None:
    last = MAX_VOCAB_SIZE - 1
    table = table_of([[last, last, last], [last, last, last - 1]], MAX_VOCAB_SIZE)
    pair = (np.array([last]), np.array([last]))
    assert table.after(*pair) == (2, 2)
    assert table.count(*pair, np.array([last - 1])).tolist() == [1]
    with pytest.raises(ValueError, match=f"at most {MAX_VOCAB_SIZE}, got {MAX_VOCAB_SIZE + 1}"):
        table_of([[1, 2]], MAX_VOCAB_SIZE + 1)
