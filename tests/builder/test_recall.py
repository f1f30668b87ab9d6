"""The recall gate: what it measures, and that it stops at the first nprobe that passes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_build import flat_signals

from knnlm_builder.stages.fit import Evidence, Known, fit
from knnlm_builder.stages.held_out import Queries
from knnlm_builder.stages.recall import FIRST_NPROBE, GATE_QUERIES, RecallGate, choose_nprobe, recall
from knnlm_core.datastore import layout
from knnlm_core.datastore.checksums import record_files
from knnlm_core.datastore.documents import Document, DocumentsWriter
from knnlm_core.datastore.index import build_shard_index, choose_index, ivf_spec, train_index
from knnlm_core.datastore.manifest import (
    ContextSection,
    DocumentsSection,
    IndexSpec,
    KeySection,
    LMSection,
    Manifest,
    ShardSection,
)
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.writer import ShardWriter
from knnlm_core.types import LMIdentity, Neighbors

DIM, ENTRIES, NLIST, K = 16, 4000, 64, 40
VOCAB = 30


def found(rows: list[list[tuple[int, float]]], k: int) -> Neighbors:
    """Neighbours from (id, distance) pairs, filled up with missing ones."""
    padded = [row + [(-1, math.inf)] * (k - len(row)) for row in rows]
    ids = torch.tensor([[i for i, _ in row] for row in padded])
    return Neighbors(ids, torch.tensor([[d for _, d in row] for row in padded]), ids.clone())


# Integers below 5,000 differ by more than the tolerance of 1e-4.
distances = st.lists(st.integers(1, 4999), min_size=1, max_size=20, unique=True)


@given(st.lists(distances, min_size=1, max_size=5), st.integers(1, 20), st.randoms(use_true_random=False))
def test_recall_is_the_share_of_the_exact_neighbours_found(rows: list[list[int]], k: int, draw) -> None:
    everything = [sorted((float(d), i) for i, d in enumerate(row)) for row in rows]
    exact = [[(i, d) for d, i in row[:k]] for row in everything]
    some = [[(i, d) for d, i in row if draw.random() < 0.7][:k] for row in everything]
    need = np.mean([len({i for i, _ in e} & {i for i, _ in s}) / len(e) for e, s in zip(exact, some, strict=True)])
    assert recall(found(some, k), found(exact, k), k) == pytest.approx(need)
    assert recall(found(exact, k), found(exact, k), k) == 1.0


def test_an_equally_near_entry_counts_as_found() -> None:
    exact = found([[(0, 1.0), (1, 2.0), (2, 2.0)]], 3)
    assert recall(found([[(0, 1.0), (7, 2.0), (8, 2.0)]], 3), exact, 3) == 1.0
    assert recall(found([[(0, 1.0), (7, 2.0), (8, 2.1)]], 3), exact, 3) == pytest.approx(2 / 3)
    assert recall(found([[(0, 1.0)]], 3), exact, 3) == pytest.approx(1 / 3)


def test_only_the_nearest_k_of_both_are_looked_at() -> None:
    exact = found([[(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]], 4)
    lower = found([[(0, 1.0), (2, 3.0), (3, 4.0), (1, 5.0)]], 4)
    assert recall(lower, exact, 2) == 0.5
    assert recall(lower, exact, 1) == 1.0


@pytest.mark.parametrize(
    ("gate", "passes"),
    [
        (RecallGate(8, 0.95, 0.90, 1.005), True),
        (RecallGate(8, 0.949, 1.0, 1.0), False),
        (RecallGate(8, 1.0, 0.899, 1.0), False),
        (RecallGate(8, 1.0, 1.0, 1.0051), False),
        (RecallGate(8, 1.0, 1.0, 0.9949), False),  # better than exact is wrong too
    ],
)
def test_the_gate_needs_every_figure(gate: RecallGate, passes: bool) -> None:
    assert gate.passes is passes


def clustered(rng: np.random.Generator, n: int, spread: float) -> npt.NDArray[np.float32]:
    """Keys around 24 centres; the wider they are spread, the more lists a query's neighbours lie in."""
    centres = np.random.default_rng(0).standard_normal((24, DIM))
    return (centres[rng.integers(0, 24, n)] + spread * rng.standard_normal((n, DIM))).astype(np.float32)


def make_store(folder: Path, spec: IndexSpec, keys: npt.NDArray[np.float32]) -> Datastore:
    values = np.random.default_rng(1).integers(0, VOCAB, ENTRIES)
    folder.mkdir()
    with DocumentsWriter(folder / layout.DOCUMENTS) as documents:
        documents.add(Document("d", "x" * ENTRIES), ENTRIES)
    trained = folder / layout.TRAINED if spec.is_trained else None
    if trained is not None:
        train_index(spec, keys[: spec.train_vectors], trained)
    shard = folder / layout.shard_name(0)
    with ShardWriter(shard, DIM) as writer:
        spans = np.stack([np.arange(ENTRIES), np.arange(ENTRIES) + 1], axis=1)
        writer.append(keys, values, spans)
        writer.finish()
    build_shard_index(trained, spec, shard, dim=DIM, entries=ENTRIES)
    Manifest(
        name="law",
        version="0" * 16,
        lm=LMSection.of(LMIdentity("f" * 32, "0" * 32, "tiny", VOCAB, "ffn_input", DIM)),
        key=KeySection(tap="ffn_input", dim=DIM),
        context=ContextSection(window=16, stride=8),
        entries=ENTRIES,
        shards=(ShardSection(name=shard.name, first_entry=0, entries=ENTRIES),),
        index=spec,
        documents=DocumentsSection(count=1),
        build={},
        quality={},
        files=record_files(folder),
    ).write(folder / layout.MANIFEST)
    return Datastore.open_folder(folder)


def queries(spread: float, count: int = 600) -> Queries:
    rng = np.random.default_rng(2)
    keys = torch.from_numpy(clustered(rng, count, spread))
    targets = torch.from_numpy(rng.integers(0, VOCAB, count))
    base = torch.from_numpy(-rng.exponential(2.5, count)).float()
    return Queries(
        keys, base, targets, torch.arange(count) // 128, torch.zeros(count, dtype=torch.int64), flat_signals(count)
    )


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])  # 8, 16 and 32 lists of 64
def test_the_smallest_power_of_two_that_passes_is_chosen(tmp_path: Path, spread: float) -> None:
    keys = clustered(np.random.default_rng(3), ENTRIES, spread)
    spec = ivf_spec(NLIST, nprobe=32, train_vectors=39 * NLIST)
    asked = queries(spread)
    with make_store(tmp_path / "store", spec, keys) as store:
        gate, sample, nearest = choose_nprobe(store, asked, K, seed=4)
        assert len(sample.keys) == GATE_QUERIES
        need_sample = asked.take(torch.randperm(600, generator=torch.Generator().manual_seed(4))[:GATE_QUERIES])
        assert torch.equal(sample.keys, need_sample.keys)
        stored = keys.astype(np.float16).astype(np.float64)
        every = ((sample.keys.double().numpy()[:, None] - stored[None]) ** 2).sum(axis=2)
        exact_ids = np.argsort(every, axis=1, kind="stable")[:, :K]
        assert np.array_equal(nearest.entry_ids.numpy(), exact_ids)

        def measured(nprobe: int) -> tuple[float, float, float]:
            """recall@32, recall@K and perplexity over that of exact search, the slow way."""
            hits = store.search(sample.keys, K, nprobe=nprobe)
            ids = hits.entry_ids.numpy()
            shares = [
                np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(ids, exact_ids, strict=True)])
                for k in (32, K)
            ]
            exact = Evidence(
                sample.base, store.search_exact(sample.keys, K), sample.targets, sample.blocks, sample.signals
            )
            best = fit(exact, K)
            here = Evidence(sample.base, hits, sample.targets, sample.blocks, sample.signals)
            nll = [Known.of(e, best.knn_temperature).nll(best.lmbda) for e in (here, exact)]
            return float(shares[0]), float(shares[1]), math.exp(nll[0] - nll[1])

        nprobe = FIRST_NPROBE
        while True:
            need = measured(nprobe)
            if need[0] >= 0.95 and need[1] >= 0.90 and abs(need[2] - 1) <= 0.005:
                break
            nprobe *= 2
        assert gate.nprobe == nprobe
        assert gate.passes
        assert (gate.recall_at_32, gate.recall_at_k) == pytest.approx(need[:2], abs=1e-3)
        assert gate.perplexity_ratio == pytest.approx(need[2], abs=1e-5)


def test_the_gate_has_something_to_choose_between(tmp_path: Path) -> None:
    chosen = []
    for spread in (0.1, 3.0):
        keys = clustered(np.random.default_rng(3), ENTRIES, spread)
        spec = ivf_spec(NLIST, nprobe=32, train_vectors=39 * NLIST)
        with make_store(tmp_path / str(spread), spec, keys) as store:
            chosen.append(choose_nprobe(store, queries(spread), K, seed=4).gate.nprobe)
    assert chosen[0] == FIRST_NPROBE < chosen[1] <= NLIST


def test_an_exact_store_passes_as_it_is(tmp_path: Path) -> None:
    keys = clustered(np.random.default_rng(3), ENTRIES, 1.0)
    with make_store(tmp_path / "store", choose_index(ENTRIES, DIM, K), keys) as store:
        gate, sample, _ = choose_nprobe(store, queries(1.0, count=100), K, seed=0)
    assert (gate.nprobe, gate.recall_at_32, gate.recall_at_k, len(sample.keys)) == (0, 1.0, 1.0, 100)
    assert gate.perplexity_ratio == pytest.approx(1.0, abs=1e-6)
    assert gate.passes
