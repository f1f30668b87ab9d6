"""Following pointers: against a slow walk in plain Python and float64, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import Plan, open_new

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import InvalidParameter
from knnlm_core.knn.gates import GATE_FEATURES, MAX_POINTERS, Automaton, Context, Gate, LearnedGate
from knnlm_core.knn.lambdas import Bucketed
from knnlm_core.mixture import advance_walks, find, mix_targets, start_walks
from knnlm_core.replay import Run, replay
from knnlm_core.retrieval import Retrieval, Source
from knnlm_core.signals import lm_signals
from knnlm_core.trees import Trees
from knnlm_core.types import EntryRange
from knnlm_core.walks import FOLLOWED, SEARCHED, SKIPPED

VOCAB, DIM = 4, 3
SIZES = (7, 1, 12, 0, 9, 11)
COUNT = sum(SIZES)
TAU = 3.0
RULE = Bucketed(torch.tensor([1.0, 4.0]), torch.tensor([0.6, 0.4, 0.1], dtype=torch.float64))
FOLLOW_RULE = Bucketed(torch.tensor([2.0]), torch.tensor([0.5, 0.2], dtype=torch.float64))


def tree_of(name: str, threshold: float, low: float, high: float) -> list[list[float]]:
    """Feature, threshold, left, right and value of the three nodes of one tree."""
    return [[GATE_FEATURES.index(name), 0, 0], [threshold, 0, 0], [1, 1, 2], [2, 1, 2], [0, low, high]]


def trees_of(*trees: list[list[float]], baseline: float = 0.0) -> Trees:
    columns = dict(
        zip(("feature", "threshold", "left", "right", "value"), np.array(trees).transpose(1, 0, 2), strict=True)
    )
    whole = {name: columns[name].astype(np.int64) for name in ("feature", "left", "right")}
    return Trees.of({**columns, **whole, "baseline": np.array([baseline])}, len(GATE_FEATURES))


# Every feature that a walk makes has a say.
TREES = trees_of(
    tree_of("log-probability of the LM's guess", -1.0, 0.3, -0.1),
    tree_of("margin of the LM's guess", 0.5, 0.1, -0.1),
    tree_of("log of the number of pointers", 0.9, 0.25, -0.15),
    tree_of("pointers: log of the nearest distance", 1.2, -0.2, 0.2),
    tree_of("pointers: whether that token is the LM's guess", 0.5, 0.07, -0.13),
    tree_of("log of the nearest distance of the step before", 0.8, -0.03, 0.11),
    tree_of("steps since the last search", 1.5, -0.3, 0.2),
    tree_of("whether the nearest one held the token that came", 0.5, 0.17, -0.19),
    baseline=0.02,
)
GATES: list[Gate] = [Automaton(), Automaton(2.0), Automaton(3.0), LearnedGate(TREES, 0.1), LearnedGate(TREES, 0.35)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """Entries on a coarse grid, so that distances tie and tokens repeat."""
    draw = np.random.default_rng(5)
    keys = draw.integers(-1, 2, (COUNT, DIM)).astype(np.float16)
    values = draw.integers(0, VOCAB, COUNT)
    return open_new(tmp_path_factory.mktemp("walks"), Plan(keys, values, cuts=(5, 20), document_sizes=SIZES))


@dataclass
class SlowWalk:
    """What `knnlm_core.walks` says, one entry after the other."""

    store: Datastore
    gate: Gate
    k: int
    excluded: set[int]
    pointers: list[int] = field(default_factory=list)
    nearest: float = -1.0
    steps: int = 20
    hit: float = -1.0

    def step(self, key: np.ndarray, p_lm: np.ndarray, token: int) -> tuple[int, list[int], float]:
        """The outcome, the entries used, and log p of the token."""
        every = self.store.keys(torch.arange(COUNT)).double().numpy()
        values = self.store.values(torch.arange(COUNT)).tolist()
        distance = [float(((row - key) ** 2).sum()) for row in every]
        near = sorted((i for i in self.pointers if i not in self.excluded), key=lambda i: (distance[i], i))
        if self._searches(near, distance, values, p_lm):
            outcome = SEARCHED
            used = sorted((i for i in range(COUNT) if i not in self.excluded), key=lambda i: (distance[i], i))[: self.k]
        else:
            outcome, used = (FOLLOWED, near) if near else (SKIPPED, [])
        p = float(p_lm[token])
        if used:
            edges, lmbdas = ([1.0, 4.0], [0.6, 0.4, 0.1]) if outcome == SEARCHED else ([2.0], [0.5, 0.2])
            lmbda = lmbdas[sum(edge < distance[used[0]] for edge in edges)]
            weights = self._weights(used, distance)
            p = (1 - lmbda) * p + lmbda * sum(w for w, i in zip(weights, used, strict=True) if values[i] == token)
            self.nearest, self.hit = distance[used[0]], float(values[used[0]] == token)
        else:
            self.hit = -1.0
            self.nearest = self.nearest if outcome == SKIPPED else -1.0
        self.steps = 0 if outcome == SEARCHED else min(self.steps + 1, 20)
        came = [i for i in used if values[i] == token][:MAX_POINTERS]
        ends = {end - 1 for end in np.cumsum(SIZES)}
        self.pointers = [i + 1 for i in came if i not in ends]
        return outcome, used, math.log(p)

    def _weights(self, used: list[int], distance: list[float]) -> list[float]:
        scores = [math.exp(-(distance[i] - distance[used[0]]) / TAU) for i in used]
        return [score / sum(scores) for score in scores]

    def _searches(self, near: list[int], distance: list[float], values: list[int], p_lm: np.ndarray) -> bool:
        if isinstance(self.gate, Automaton):
            return len(near) < self.gate.threshold
        ordered, guess = sorted(p_lm, reverse=True), int(p_lm.argmax())
        first = math.log1p(distance[near[0]]) if near else 0.0
        agrees = float(bool(near) and values[near[0]] == guess)
        gain = 0.02
        gain += 0.3 if math.log(ordered[0]) <= -1.0 else -0.1
        gain += 0.1 if math.log(ordered[0] / ordered[1]) <= 0.5 else -0.1
        gain += 0.25 if math.log1p(len(near)) <= 0.9 else -0.15
        gain += -0.2 if first <= 1.2 else 0.2
        gain += 0.07 if agrees <= 0.5 else -0.13
        gain += -0.03 if (math.log1p(self.nearest) if self.nearest >= 0 else -1.0) <= 0.8 else 0.11
        gain += -0.3 if self.steps <= 1.5 else 0.2
        gain += 0.17 if self.hit <= 0.5 else -0.19
        return gain > self.gate.threshold


def random_step(seed: int, length: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Log-probabilities (T, V), keys (T, D) and tokens of a sequence."""
    generator = torch.Generator().manual_seed(seed)
    lm = torch.log_softmax(2 * torch.randn(length, VOCAB, generator=generator), dim=1)
    keys = torch.randint(-1, 2, (length, DIM), generator=generator).float()
    return lm, keys, torch.randint(0, VOCAB, (length,), generator=generator).tolist()


EXCLUDES: list[tuple[EntryRange, ...]] = [(), (EntryRange(0, 7),), (EntryRange(3, 5), EntryRange(20, COUNT))]


def retrieval_of(store: Datastore, gate: Gate, k: int, exclude: Sequence[EntryRange]) -> Retrieval:
    source = Source(store, k, TAU, 0.3, tuple(exclude), gate=gate, lambda_rule=RULE, follow_rule=FOLLOW_RULE)
    return Retrieval((source,))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.sampled_from(GATES), st.sampled_from([1, 3, 8, 60]), st.sampled_from(EXCLUDES))
def test_stepping_is_the_slow_walk_token_by_token(store, seed, gate, k, exclude) -> None:
    lm, keys, tokens = random_step(seed, 25)
    retrieval = retrieval_of(store, gate, k, exclude)
    slow = SlowWalk(store, gate, k, {i for first, stop in exclude for i in range(first, stop)})
    walks = start_walks(retrieval)
    for t, token in enumerate(tokens):
        outcome, used, log_p = slow.step(keys[t].double().numpy(), lm[t].double().exp().numpy(), token)
        row = slice(t, t + 1)
        context = Context(lm_signals(lm[row]), torch.tensor([t + 1]))
        found = find(keys[row], [retrieval], context, [walks])
        mixed = mix_targets(lm[row, token], torch.tensor([token]), found)
        assert found.outcomes.tolist() == [[outcome]]
        assert [i for i in found.neighbors.entry_ids[0].tolist() if i >= 0] == used
        assert mixed.item() == pytest.approx(log_p, abs=1e-5)
        (walks,) = advance_walks([walks], [retrieval], found, [0], [token])
        assert walks[0].pointers.tolist() == slow.pointers
        assert (walks[0].steps, walks[0].hit) == (slow.steps, slow.hit)
        assert walks[0].nearest == pytest.approx(slow.nearest, abs=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=4), st.data())
def test_a_replay_of_several_texts_is_what_stepping_through_each_gives(store, seeds, data) -> None:
    cases = []
    for seed in seeds:
        gate, k = data.draw(st.sampled_from(GATES)), data.draw(st.sampled_from([2, 9, 80]))
        retrieval = retrieval_of(store, gate, k, data.draw(st.sampled_from(EXCLUDES)))
        cases.append((retrieval, *random_step(seed, data.draw(st.integers(1, 14)))))
    stepped, after = [], []
    for retrieval, lm, keys, tokens in cases:
        walks = start_walks(retrieval)
        for t, token in enumerate(tokens):
            row = slice(t, t + 1)
            found = find(keys[row], [retrieval], Context(lm_signals(lm[row]), torch.tensor([t + 1])), [walks])
            mixed = mix_targets(lm[row, token], torch.tensor([token]), found)
            scores = found.gates.scores.nan_to_num().item(), found.gates.pointers.item(), found.lmbda.item()
            stepped.append((found.outcomes.item(), mixed.item(), *scores))
            (walks,) = advance_walks([walks], [retrieval], found, [0], [token])
        after.append(walks[0].pointers.tolist())
    lm, keys = (torch.cat([case[i] for case in cases]) for i in (1, 2))
    tokens = torch.tensor([token for case in cases for token in case[3]])
    positions = torch.cat([torch.arange(1, len(case[3]) + 1) for case in cases])
    ends = np.cumsum([0, *(len(case[3]) for case in cases)]).tolist()
    runs = [Run(range(a, b), start_walks(c[0])) for a, b, c in zip(ends, ends[1:], cases, strict=False)]
    retrievals = [case[0] for case in cases for _ in case[3]]
    replayed = replay(keys, tokens, retrievals, Context(lm_signals(lm), positions), runs)
    found = replayed.found
    mixed = mix_targets(lm.gather(1, tokens[:, None])[:, 0], tokens, found)
    assert [walks[0].pointers.tolist() for walks in replayed.walks] == after
    columns = (
        found.outcomes[:, 0],
        mixed,
        found.gates.scores[:, 0].nan_to_num(),
        found.gates.pointers[:, 0],
        found.lmbda,
    )
    for row, need in enumerate(stepped):
        assert [column[row].item() for column in columns] == pytest.approx(list(need), abs=1e-5)


def test_forks_part_and_leave_the_walk_that_they_came_from_as_it_was(store: Datastore) -> None:
    retrieval = retrieval_of(store, Automaton(), 60, ())
    lm, keys, _ = random_step(3, 1)
    context = Context(lm_signals(lm), torch.tensor([1]))
    begin = start_walks(retrieval)
    found = find(keys, [retrieval], context, [begin])
    first, second, again = advance_walks([begin] * 3, [retrieval] * 3, found, [0, 0, 0], [0, 1, 0])
    assert begin == start_walks(retrieval)
    assert begin[0].pointers.size == 0
    assert first[0].pointers.tolist() == again[0].pointers.tolist()
    assert not set(first[0].pointers.tolist()) & set(second[0].pointers.tolist())
    values = store.values(torch.arange(COUNT)).tolist()
    for walks, token in ((first, 0), (second, 1)):
        assert {values[i - 1] for i in walks[0].pointers.tolist()} == {token}


def test_pointers_are_never_more_than_can_be_carried(tmp_path: Path) -> None:
    keys = np.zeros((300, DIM), np.float16)
    with open_new(tmp_path, Plan(keys, np.zeros(300, np.int64))) as same:
        retrieval = retrieval_of(same, Automaton(), 300, ())
        context = Context(lm_signals(torch.zeros(1, VOCAB)), torch.ones(1))
        found = find(torch.zeros(1, DIM), [retrieval], context, [start_walks(retrieval)])
        (walks,) = advance_walks([start_walks(retrieval)], [retrieval], found, [0], [0])
        assert walks[0].pointers.tolist() == list(range(1, MAX_POINTERS + 1))


def test_replaying_a_stored_document_saves_nearly_all_searches(store: Datastore) -> None:
    first, stop = store.document_entries("doc/2")
    keys, tokens = store.keys(torch.arange(first, stop)), store.values(torch.arange(first, stop))
    lm = torch.log_softmax(torch.zeros(len(keys), VOCAB), dim=1)
    retrieval = retrieval_of(store, Automaton(), 1, ())
    context = Context(lm_signals(lm), torch.arange(1, len(keys) + 1))
    replayed = replay(keys, tokens, [retrieval] * len(keys), context, [Run(range(len(keys)), start_walks(retrieval))])
    outcomes = replayed.found.outcomes[:, 0].tolist()
    assert outcomes.count(SEARCHED) <= 2  # ties on the grid may begin with another document
    assert outcomes.count(FOLLOWED) == len(keys) - outcomes.count(SEARCHED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": [[1, 1, 0]]}, "children after their parents"),
        ({"left": [[3, 1, 2]]}, "children after their parents"),
        ({"left": [[-1, 1, 2]]}, "children after their parents"),
        ({"feature": [[99, 0, 0]]}, "features 0 … 15"),
        ({"feature": [[-1, 0, 0]]}, "features 0 … 15"),
        ({"value": [[0.0, math.nan, 0.0]]}, "numbers of trees must be in"),
        ({"threshold": [[math.inf, 0.0, 0.0]]}, "numbers of trees must be in"),
        ({"baseline": [0.0, 1.0]}, "'baseline'"),
        ({"value": [[0.0, 1.0]]}, "'value' of trees has the wrong shape"),
        ({"left": [[1.0, 1.0, 2.0]]}, "'left' of trees has the wrong shape or type"),
        ({"extra": [1]}, "trees must have feature"),
    ],
)
def test_what_is_no_tree_is_refused(change: dict[str, list[object]], message: str) -> None:
    arrays = trees_of(tree_of("entropy of p_lm", 1.0, 0.0, 1.0)).arrays()
    with pytest.raises(InvalidParameter, match=message):
        Trees.of({**arrays, **{name: np.array(value) for name, value in change.items()}}, len(GATE_FEATURES))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 4))
def test_trees_predict_what_walking_down_each_of_them_gives(seed: int, count: int, splits: int) -> None:
    draw = np.random.default_rng(seed)
    size = 2 * splits + 1
    shape = count, size
    own = np.broadcast_to(np.arange(size), shape)
    left, right = own.copy(), own.copy()
    for tree in range(count):
        leaves = [0]
        for number in range(splits):
            node = leaves.pop(draw.integers(len(leaves)))
            left[tree, node], right[tree, node] = 2 * number + 1, 2 * number + 2
            leaves += [2 * number + 1, 2 * number + 2]
    grid = draw.integers(-2, 3, shape).astype(float)  # coarse, so that features equal thresholds
    arrays = {
        "feature": draw.integers(0, 3, shape), "threshold": grid, "left": left, "right": right,
        "value": draw.standard_normal(shape), "baseline": np.array([0.5]),
    }  # fmt: skip
    trees = Trees.of(arrays, 3)
    rows = draw.integers(-2, 3, (7, 3)).astype(float)
    for row, have in zip(rows, trees.predict(rows), strict=True):
        total = 0.5
        for tree in range(count):
            node = 0
            while left[tree, node] != node:
                goes_left = row[arrays["feature"][tree, node]] <= grid[tree, node]
                node = left[tree, node] if goes_left else right[tree, node]
            total += arrays["value"][tree, node]
        assert have == pytest.approx(total, abs=1e-12)
    assert trees.predict(np.empty((0, 3))).tolist() == []
    again = Trees.of(trees.arrays(), 3)
    assert all(np.array_equal(a, b) for a, b in zip(trees, again, strict=True))
