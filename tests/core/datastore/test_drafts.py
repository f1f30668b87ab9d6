"""Drafts read off a datastore: against a slow walk along the text, entry by entry."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import Plan, open_new, random_keys

from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.reader import Datastore
from knnlm_core.drafts import MAX_LEADS, NO_LEADS, NO_OUTLOOK, Leads, Outlook, find_leads, guess, look_ahead
from knnlm_core.errors import InvalidParameter
from knnlm_core.mixture import find
from knnlm_core.retrieval import Retrieval, Source

VOCAB, DIM = 4, 3
SIZES = (7, 1, 12, 0, 9, 11)
COUNT = sum(SIZES)
STARTS = np.cumsum((0, *SIZES))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    values = torch.randint(0, VOCAB, (COUNT,), generator=torch.Generator().manual_seed(1))
    plan = Plan(random_keys(COUNT, DIM), values=values, cuts=(9, 23), document_sizes=SIZES)
    return open_new(tmp_path_factory.mktemp("drafts"), plan)


def follows(entry: int) -> int:
    """The entry after one in its document, or −1."""
    return -1 if entry < 0 or entry + 1 in STARTS else entry + 1


def read_on(store: Datastore, entry: int, length: int) -> list[int]:
    tokens = []
    for _ in range(length):
        tokens.append(-1 if entry < 0 else int(store.values(torch.tensor([entry]))[0]))
        entry = follows(entry)
    return tokens


@pytest.mark.parametrize("length", [1, 2, 5, COUNT + 3])
def test_continuations_go_to_the_end_of_their_document(store: Datastore, length: int) -> None:
    entries = torch.tensor([*range(COUNT), -1, 0, COUNT - 1])
    have = store.continuations(entries, length)
    assert have.tolist() == [read_on(store, entry, length) for entry in entries.tolist()]
    assert store.continuations(torch.empty(0, dtype=torch.int64), length).shape == (0, length)


def test_continuations_stop_at_what_is_deleted(tmp_path: Path) -> None:
    store = open_new(tmp_path, Plan(random_keys(COUNT, DIM), document_sizes=SIZES))
    living = LivingName(tmp_path, "law")
    snapshot = living.snapshot(store)
    assert snapshot.continuations(torch.tensor([0, 8]), 3).min() >= 0
    living.delete([store.document_ids()[0]])
    assert snapshot.continuations(torch.tensor([0, 5]), 3).tolist() == [[-1] * 3] * 2
    assert snapshot.continuations(torch.tensor([8]), 3).tolist() == [read_on(store, 8, 3)]


def test_an_entry_that_is_not_there_is_refused(store: Datastore) -> None:
    with pytest.raises(InvalidParameter, match="entry_ids"):
        store.continuations(torch.tensor([COUNT]), 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3), st.integers(1, COUNT))
def test_leads_stand_behind_the_neighbours_that_held_the_token(
    store: Datastore, seed: int, tokens: list[int], k: int
) -> None:
    queries = torch.randn(2, DIM, generator=torch.Generator().manual_seed(seed))
    one, other = Source(store, k, 2.0, 0.5, weight=0.3), Source(store, k, 1.0, 0.9, weight=0.7)
    for retrieval in (Retrieval((one,)), Retrieval((one, other))):
        found = find(queries, [retrieval] * 2)
        rows = [0, 1, 1]  # two sequences fork from the second
        leads = find_leads(found, rows, tokens, [retrieval] * 3)
        for row, token, have in zip(rows, tokens, leads, strict=True):
            columns = zip(
                found.sources.tolist(), found.neighbors.entry_ids[row].tolist(), found.neighbors.values[row].tolist(),
                found.log_weights[row].tolist(), strict=True,
            )  # fmt: skip
            held = [(s, entry, math.exp(weight)) for s, entry, value, weight in columns if value == token][:MAX_LEADS]
            need = [(s, follows(entry), weight) for s, entry, weight in held if follows(entry) >= 0]
            assert list(zip(have.sources.tolist(), have.entry_ids.tolist(), strict=True)) == [n[:2] for n in need]
            assert have.weights.tolist() == pytest.approx([n[2] for n in need])


def slow_guesses(outlook: Outlook, length: int) -> list[tuple[int, float, float]]:
    weights, paths = outlook.leads.weights.tolist(), outlook.tokens.tolist()
    prefix: list[int] = []
    guesses = []
    for depth in range(length):
        mass: defaultdict[int, float] = defaultdict(float)
        left = [i for i, path in enumerate(paths) if path[:depth] == prefix]
        for i in left:
            if paths[i][depth] >= 0:
                mass[paths[i][depth]] += weights[i]
        if not mass:
            break
        best = min(token for token in mass if mass[token] == max(mass.values()))
        guesses.append((best, mass[best] / sum(weights[i] for i in left), mass[best]))
        prefix.append(best)
    return guesses


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.sampled_from([0.5, 0.25, 0.125])), max_size=9), st.data())
def test_guesses_are_what_most_of_the_weight_goes_on_with(
    store: Datastore, leads: list[tuple[int, float]], data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, 6))
    retrieval = Retrieval((Source(store, 4, 1.0, 0.5),))
    entries, weights = np.array([e for e, _ in leads], np.int64), np.array([w for _, w in leads])
    of_one = Leads(np.zeros(len(leads), np.int64), entries, weights)
    nothing, outlook = look_ahead([NO_LEADS, of_one], [retrieval] * 2, length + 1)
    assert guess(nothing, length) == []
    assert outlook.tokens.tolist() == [read_on(store, entry, length + 1) for entry in entries.tolist()]
    guesses = guess(outlook, length)
    assert [tuple(g) for g in guesses] == slow_guesses(outlook, length)

    came = [g.token_id for g in guesses][: data.draw(st.integers(0, len(guesses)))]
    came += [data.draw(st.integers(0, VOCAB - 1))] * (not came)
    moved = outlook.after(came)
    need = [
        (entry + len(came), weight)
        for entry, weight in leads
        if read_on(store, entry, len(came)) == came and read_on(store, entry, len(came) + 1)[-1] >= 0
    ]
    assert list(zip(moved.entry_ids.tolist(), moved.weights.tolist(), strict=True)) == need


def test_without_leads_nothing_is_foreseen() -> None:
    assert NO_OUTLOOK.after([3, 4]) is NO_LEADS
    assert guess(NO_OUTLOOK, 1) == []
