"""Small real datastores for tests, built by the same functions as large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from knnlm_core.datastore import layout
from knnlm_core.datastore.checksums import record_files
from knnlm_core.datastore.documents import Document, DocumentsWriter
from knnlm_core.datastore.index import build_shard_index, choose_index, train_index
from knnlm_core.datastore.manifest import (
    ContextSection,
    DocumentsSection,
    IndexSpec,
    KeySection,
    LMSection,
    Manifest,
    ShardSection,
    version_of,
)
from knnlm_core.datastore.publish import publish
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.writer import ShardWriter
from knnlm_core.types import EntryRange, LMIdentity

WORD = "abcdefg "  # every token of the test documents is one such word


def identity(dim: int) -> LMIdentity:
    return LMIdentity("f" * 32, "0" * 32, "tiny", 512, "last_ffn_input", dim)


@dataclass
class Plan:
    """What to build: by default every entry is of one document, in one shard."""

    keys: npt.NDArray[np.float16]
    values: npt.NDArray[np.int64] | None = None
    cuts: Sequence[int] = ()  # where new shards begin
    document_sizes: Sequence[int] | None = None  # entries of each document
    spec: IndexSpec | None = None
    held_out: Sequence[Document] = ()
    bos_token_ids: tuple[int, ...] = ()
    name: str = "law"
    salt: int = 0
    quality: dict[str, int | float | str | bool] = field(default_factory=lambda: {"recall_at_32": 1.0})


def document(number: int, entries: int) -> Document:
    tags = ("even",) if number % 2 == 0 else ()
    text = "".join(f"{(number + i) % 10}{WORD[1:]}" for i in range(entries + 1))
    return Document(f"doc/{number}", text, f"https://example.org/{number}", None, "CC0", tags)


def build(root: Path, plan: Plan) -> str:
    """Build into the .tmp folder, manifest included, and return the version; `publish` is the caller's."""
    n, dim = plan.keys.shape
    values = np.arange(n) % 500 if plan.values is None else plan.values
    sizes = [n] if plan.document_sizes is None else plan.document_sizes
    spec = plan.spec or choose_index(n, dim, 8)
    inputs = {"salt": plan.salt, "entries": n}
    version = version_of(inputs)
    folder = layout.building_folder(root, plan.name, version)
    folder.mkdir(parents=True)
    unscored = 0 if plan.bos_token_ids else 1
    spans = np.empty((n, 2), dtype=np.int64)
    with DocumentsWriter(folder / layout.DOCUMENTS) as documents:
        for number, size in enumerate(sizes):
            made = documents.add(document(number, size), size)
            starts = (np.arange(size) + unscored) * len(WORD)
            spans[made.first : made.stop] = np.stack([starts, starts + len(WORD)], axis=1)
    if plan.held_out:
        with DocumentsWriter(folder / layout.HELD_OUT) as held_out:
            for left_out in plan.held_out:
                held_out.add(left_out, 0)
    trained = folder / layout.TRAINED if spec.is_trained else None
    if trained is not None:
        train_index(spec, plan.keys[: spec.train_vectors], trained)
    shards = []
    for number, (first, stop) in enumerate(pairwise([0, *plan.cuts, n])):
        shard = folder / layout.shard_name(number)
        with ShardWriter(shard, dim) as writer:
            writer.append(plan.keys[first:stop], values[first:stop], spans[first:stop])
            assert writer.finish() == stop - first
        build_shard_index(trained, spec, shard, dim=dim, entries=stop - first)
        shards.append(ShardSection(name=shard.name, first_entry=first, entries=stop - first))
    Manifest(
        name=plan.name,
        version=version,
        lm=LMSection.of(identity(dim)),
        key=KeySection(tap="last_ffn_input", dim=dim),
        context=ContextSection(window=16, stride=8, bos_token_ids=plan.bos_token_ids),
        entries=n,
        shards=tuple(shards),
        index=spec,
        documents=DocumentsSection(count=len(sizes)),
        build=inputs,
        quality=plan.quality,
        files=record_files(folder),
    ).write(folder / layout.MANIFEST)
    return version


def open_new(root: Path, plan: Plan) -> Datastore:
    """Build, publish and open."""
    publish(root, plan.name, build(root, plan))
    return Datastore.open(root, plan.name, checksums=True)


def random_keys(n: int, dim: int, seed: int = 0, duplicates: int = 0) -> npt.NDArray[np.float16]:
    """Keys with the large shared mean that hidden states have; some of them several times."""
    rng = np.random.default_rng(seed)
    keys = (rng.standard_normal((n, dim)) + 3 * rng.standard_normal(dim)).astype(np.float16)
    if duplicates:
        keys[rng.integers(0, n, duplicates)] = keys[rng.integers(0, n, duplicates)]
    return keys


def reference(
    keys: npt.NDArray[np.float16], queries: npt.NDArray[np.float32], k: int, excluded: set[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Slow and obvious: every distance in float64, sorted by (distance, id)."""
    ids = np.full((len(queries), k), -1)
    distances = np.full((len(queries), k), np.inf)
    for row, query in enumerate(queries):
        every = ((keys.astype(np.float64) - query.astype(np.float64)) ** 2).sum(axis=1)
        order = sorted((i for i in range(len(keys)) if i not in excluded), key=lambda i: (every[i], i))[:k]
        ids[row, : len(order)], distances[row, : len(order)] = order, every[order]
    return ids, distances


class GridCase(NamedTuple):
    """Few distinct keys on a small grid: ties everywhere, across every shard border and every k-boundary."""

    keys: npt.NDArray[np.float16]
    trained: bool
    cuts: list[int]
    k: int
    exclude: tuple[EntryRange, ...]

    @property
    def excluded(self) -> set[int]:
        """The entries that `exclude` covers."""
        return {i for r in self.exclude for i in range(r.first, r.stop)}


def draw_grid_case(data: st.DataObject) -> GridCase:
    """Small integers: every distance is exact in float32, so even ties must come out in the reference's order."""
    n = data.draw(st.integers(170, 260), "entries")
    trained = data.draw(st.booleans(), "trained")
    keys = np.random.default_rng(data.draw(st.integers(0, 99), "seed")).integers(0, 3, (n, 3)).astype(np.float16)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4), "cuts"))
    k = data.draw(st.integers(1, n + 20), "k")
    bounds = st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda p: EntryRange(*sorted(p)))
    return GridCase(keys, trained, cuts, k, tuple(data.draw(st.lists(bounds, max_size=3), "exclude")))
