"""The index of a rewritten version: lists kept or trained anew, and the recall gate on its canaries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import KeyArray, map_keys
from knnlm_core.datastore.index import build_shard_index, choose_index, train_index
from knnlm_core.datastore.maintenance.stages import StageProgress, counted
from knnlm_core.datastore.manifest import IndexSpec, Manifest, ShardSection
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import row_recall
from knnlm_core.durable import part_of, replace_file
from knnlm_core.types import Neighbors

TRAINED_ENTRIES = "trained_entries"  # in the manifest's `build`: how large the version was that the lists are from
LEAST_KEPT, MOST_KEPT = 0.80, 1.25  # of those entries; lists fit a store of about the size that they were made for
MIN_RECALL_AT_32 = 0.95
_DEFAULT_K = 1024


class ChosenIndex(NamedTuple):
    """What index a rewritten version gets."""

    spec: IndexSpec
    trained_entries: int  # of the version that the lists were trained on
    keeps_lists: bool


class Gate(NamedTuple):
    """What the recall gate chose and measured."""

    nprobe: int
    recall_at_32: float
    exact: Neighbors  # of the gate's queries


def choose(manifest: Manifest, entries: int, *, k: int | None, fresh: bool) -> ChosenIndex:
    """The index of a version with so many entries, rewritten from another.

    Args:     k: neighbours per query by default, where a calibration says so.
              fresh: use nothing that was computed from entries which may be gone: centroids are means of keys.
    """
    trained_entries = manifest.build.get(TRAINED_ENTRIES)
    if not isinstance(trained_entries, int) or isinstance(trained_entries, bool) or trained_entries < 1:
        trained_entries = manifest.entries
    fits = LEAST_KEPT * trained_entries <= entries <= MOST_KEPT * trained_entries
    if manifest.index.is_trained and fits and not fresh:
        return ChosenIndex(manifest.index, trained_entries, keeps_lists=True)
    spec = choose_index(entries, manifest.key.dim, k or _DEFAULT_K, seed=manifest.index.seed)
    return ChosenIndex(spec, entries, keeps_lists=False)


def build_index(
    folder: Path, source: Path, chosen: ChosenIndex, shards: tuple[ShardSection, ...], dim: int, progress: StageProgress
) -> None:
    """Copy or train the lists, and add every shard's keys to its own index."""
    spec = chosen.spec
    trained = folder / layout.TRAINED if spec.is_trained else None
    if trained is not None and chosen.keeps_lists:
        shutil.copyfile(source / layout.TRAINED, part_of(trained))
        replace_file(part_of(trained), trained)
    elif trained is not None:
        advance = counted(progress, "train index", spec.train_vectors)
        train_index(spec, _sample(folder, shards, spec.train_vectors, dim, spec.seed), trained)
        advance(spec.train_vectors)
    advance = counted(progress, "add to index", sum(shard.entries for shard in shards))
    for shard in shards:
        build_shard_index(trained, spec, folder / shard.name, dim=dim, entries=shard.entries)
        advance(shard.entries)


def pass_gate(store: Datastore, queries: Tensor, progress: StageProgress) -> Gate:
    """Double nprobe from the manifest's until recall@32 passes; every list is exact, so some nprobe does."""
    k = min(32, store.entries)
    nlist = store.manifest.index.nlist
    nprobe = store.manifest.index.nprobe
    advance = counted(progress, "recall gate", len(queries))
    exact = store.search_exact(queries, k)
    while True:
        found = store.search(queries, k, nprobe=nprobe or None)
        recall = float(row_recall(found, exact, k).double().mean())
        if recall >= MIN_RECALL_AT_32 or nprobe >= nlist:
            advance(len(queries))
            return Gate(nprobe, recall, exact)
        nprobe = min(2 * nprobe, nlist)


def some_entries(entries: int, count: int, seed: int) -> Tensor:
    """At most ``count`` entry ids, drawn evenly."""
    ids = np.random.default_rng(seed).choice(entries, size=min(count, entries), replace=False)
    return torch.from_numpy(np.sort(ids))


def _sample(folder: Path, shards: tuple[ShardSection, ...], count: int, dim: int, seed: int) -> KeyArray:
    total = sum(shard.entries for shard in shards)
    ids = np.sort(np.random.default_rng(seed).choice(total, size=count, replace=False))
    parts = []
    for shard in shards:
        rows = ids[(ids >= shard.first_entry) & (ids < shard.first_entry + shard.entries)] - shard.first_entry
        parts.append(map_keys(folder / shard.name / layout.KEYS, dim, shard.entries)[rows])
    return np.concatenate(parts)
