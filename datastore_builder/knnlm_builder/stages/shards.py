"""Build shards: the unit of work and of resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knnlm_builder.progress import Advance, Reporter
from knnlm_builder.stages.encode import encode_windows
from knnlm_builder.stages.plan import Plan, ShardPlan
from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import map_keys
from knnlm_core.datastore.index import build_shard_index, train_index
from knnlm_core.datastore.manifest import IndexSpec
from knnlm_core.datastore.writer import ShardWriter, is_finished
from knnlm_core.lm.protocol import CausalLM


def build_shard(lm: CausalLM, plan: Plan, shard: ShardPlan, folder: Path, batch_tokens: int, advance: Advance) -> None:
    """Encode one shard into its folder.

    Idempotent: a finished shard is left as it is, a half-written one is discarded and redone.
    """
    if is_finished(folder):
        advance(shard.entries.stop - shard.entries.first)
        return
    with ShardWriter(folder, lm.identity.key_dim) as writer:
        for part in encode_windows(lm, plan, shard.windows, batch_tokens, advance):
            writer.append(part.keys, part.values, part.spans)
        writer.finish()


def build_indexes(
    folder: Path, shards: Sequence[ShardPlan], spec: IndexSpec, dim: int, seed: int, reporter: Reporter
) -> None:
    """Train the lists once, on a sample of all shards, and add every shard's keys to its own index."""
    trained = folder / layout.TRAINED if spec.is_trained else None
    total = shards[-1].entries.stop
    if trained is not None and not trained.exists():
        with reporter.stage("Train index", spec.train_vectors, "vectors") as advance:
            train_index(spec, _sample(folder, shards, spec.train_vectors, dim, seed), trained)
            advance(spec.train_vectors)
    with reporter.stage("Add to index", total, "entries") as advance:
        for shard in shards:
            entries = shard.entries.stop - shard.entries.first
            shard_folder = folder / layout.shard_name(shard.number)
            if not (shard_folder / layout.INDEX).exists():
                build_shard_index(trained, spec, shard_folder, dim=dim, entries=entries)
            advance(entries)


def _sample(folder: Path, shards: Sequence[ShardPlan], count: int, dim: int, seed: int) -> NDArray[np.float16]:
    """Keys of entries drawn evenly from the whole store, in the order of their ids."""
    total = shards[-1].entries.stop
    ids = np.sort(np.random.default_rng(seed).choice(total, size=count, replace=False))
    parts = []
    for shard in shards:
        first, stop = shard.entries
        rows = ids[(ids >= first) & (ids < stop)] - first
        keys = map_keys(folder / layout.shard_name(shard.number) / layout.KEYS, dim, stop - first)
        parts.append(keys[rows])
    return np.concatenate(parts)
