"""Canaries: held-out queries kept with a version, and what an exact search found for them when it was built.

Whoever holds the version can ask them again and learn whether its index still finds what it did, without the text or
the language model that they came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import map_batch, write_batch
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import row_recall
from knnlm_core.errors import BuildError, DatastoreCorrupt, InvalidParameter
from knnlm_core.types import Neighbors

MAX_CANARIES = 512
MAX_NEIGHBORS = 32
RECORDED_RECALL = "recall_at_32"  # in the manifest's `quality`

# Which lists a query visits last is decided by the last bits of distances to centroids, which differ between machines
# and batch sizes. A query that gets another list loses a few of its 32 neighbours, if any: 1 in 500 allows for two
# exchanged lists in each hundred queries, and is far below what a damaged index loses.
RECALL_TOLERANCE = 0.002
# Distances are sums of D rounded squares: float32 keeps them to about √D · 10⁻⁷ of themselves, and to that of ‖q‖²
# where they are computed as ‖q‖² − 2q·x + ‖x‖². A wrong key is off by orders of magnitude more.
RELATIVE_TOLERANCE = 1e-3
NORM_TOLERANCE = 1e-6
_BLOCK_QUERIES = 64  # whose neighbours' keys are held at a time


class Canaries(NamedTuple):
    """Queries and their exact nearest entries, nearest first; a missing entry has id −1 and distance +inf."""

    queries: Tensor  # (C, D) float32
    entry_ids: Tensor  # (C, K) int64, K = min(32, N)
    distances: Tensor  # (C, K) float32, squared L2
    documents: tuple[str, ...]  # (C,) ids of the held-out documents that the queries are from

    def take(self, rows: Tensor) -> Canaries:
        """Some of the queries."""
        documents = tuple(self.documents[row] for row in rows.tolist())
        return Canaries(self.queries[rows], self.entry_ids[rows], self.distances[rows], documents)


class SelfTest(NamedTuple):
    """A self-test that was passed."""

    queries: int  # that were asked; 0 for a version without canaries, of which nothing is known
    recall_at_32: float | None
    needed: float | None  # the recall below which it fails


def write_canaries(path: Path, queries: Tensor, exact: Neighbors, documents: Sequence[str]) -> None:
    """Write queries (C, D), 1 ≤ C ≤ 512, with what `search_exact` found for them, in one step.

    Args:     exact: (C, …), all entries considered; the nearest 32, or all that there are, are kept.
              documents: per query, the id of the held-out document that it is from.
    Raises:   BuildError: no query, more than 512, or columns of different length.
    """
    count = len(queries)
    if not 1 <= count <= MAX_CANARIES or len(exact.entry_ids) != count or len(documents) != count:
        raise BuildError(
            f"{path.name} holds 1 … {MAX_CANARIES} queries with their neighbours and documents; got {count} queries, "
            f"{len(exact.entry_ids)} rows of neighbours and {len(documents)} documents"
        )
    width = min(MAX_NEIGHBORS, int((exact.entry_ids >= 0).any(dim=0).sum()))  # a smaller version fills up with −1
    entry_ids, distances = exact.entry_ids[:, :width], exact.distances[:, :width]
    schema = _schema(queries.shape[1], entry_ids.shape[1])
    numbers = (queries.to(torch.float32), entry_ids, distances)
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(column.contiguous().view(-1).numpy()), type=field.type)
        for column, field in zip(numbers, schema, strict=False)
    ]
    columns.append(pa.array(documents, type=pa.string()))
    write_batch(path, pa.RecordBatch.from_arrays(columns, schema=schema))


def read_canaries(path: Path, *, dim: int, entries: int) -> Canaries:
    """Read the canaries of a version with ``entries`` keys of ``dim`` numbers.

    Raises: DatastoreCorrupt: not a file of canaries, or not for such a version.
    """
    width = min(MAX_NEIGHBORS, entries)
    batch = map_batch(path, _schema(dim, width))
    if not 1 <= batch.num_rows <= MAX_CANARIES:
        raise DatastoreCorrupt(f"{path} has {batch.num_rows} queries, needs 1 … {MAX_CANARIES}")
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DatastoreCorrupt(f"{path}: {error}") from error
    # Copied: a few MB at most, and the file need not stay mapped.
    queries, entry_ids, distances = (
        torch.from_numpy(column.flatten().to_numpy().reshape(batch.num_rows, -1).copy()) for column in batch.columns[:3]
    )
    canaries = Canaries(queries, entry_ids, distances, tuple(batch.column(3).to_pylist()))
    _check(path, canaries, entries)
    return canaries


def canaries_of(datastore: Datastore) -> Canaries | None:
    """The canaries of an open version; None if it was built without. Raises DatastoreCorrupt."""
    if layout.CANARIES not in datastore.manifest.files:
        return None
    return read_canaries(datastore.folder / layout.CANARIES, dim=datastore.dim, entries=datastore.entries)


def self_test(datastore: Datastore, *, queries: int | None = None) -> SelfTest:
    """Ask the canaries again: does the index find what it found when the version was built?

    Documents that were deleted since then do not matter: this is about the version, whole as it was published.

    Args:     queries: how many canaries to ask, evenly spread over all of them; None for all.
    Raises:
        DatastoreCorrupt: recall@32 is below the recorded one (below 1 for an index that looks at every entry), a
            distance is not that of the stored key, or entries are not in order.
        InvalidParameter: ``queries`` is below 1.
    """
    if queries is not None and queries < 1:
        raise InvalidParameter(f"`queries` must be at least 1, got {queries}", param="queries")
    canaries = canaries_of(datastore)
    if canaries is None:
        return SelfTest(0, None, None)
    if all(part.shard.hidden is None for part in datastore._parts()):
        return _ask(datastore, canaries, queries)
    with Datastore.open_folder(datastore.folder) as whole:
        return _ask(whole, canaries, queries)


def _ask(datastore: Datastore, canaries: Canaries, queries: int | None) -> SelfTest:
    total = len(canaries.queries)
    asked = min(total, queries or total)
    canaries = canaries.take(torch.arange(asked) * total // asked)
    found = datastore.search(canaries.queries, canaries.entry_ids.shape[1])
    exact = Neighbors(canaries.entry_ids, canaries.distances, canaries.entry_ids)
    what = f"datastore {datastore.name!r} version {datastore.version}: self-test with {asked} queries:"
    _check_distances(f"{what} stored", datastore, canaries.queries, exact)
    _check_distances(f"{what} found", datastore, canaries.queries, found)
    _check_order(what, found)
    recall = float(row_recall(found, exact, MAX_NEIGHBORS).double().mean())
    needed = _needed_recall(datastore.manifest, asked, total)
    if recall < needed:
        raise DatastoreCorrupt(f"{what} recall@{MAX_NEIGHBORS} is {recall:.4f}, at least {needed:.4f} is needed")
    return SelfTest(asked, recall, needed)


def _needed_recall(manifest: Manifest, asked: int, total: int) -> float:
    """The recorded recall r, less the tolerance, less four standard deviations of the mean over a part of the queries.

    σ² ≤ r(1 − r)/n · (M − n)/(M − 1) for n of M values in 0 … 1 whose mean is r; nothing where all are asked.
    """
    if not manifest.index.is_trained:
        return 1.0
    recorded = manifest.quality.get(RECORDED_RECALL)
    if isinstance(recorded, str | bool) or recorded is None or not 0 <= recorded <= 1:
        raise DatastoreCorrupt(
            f"datastore {manifest.name!r} version {manifest.version}: quality.{RECORDED_RECALL} must be a number in "
            f"0 … 1 where there are canaries, it is {recorded!r}"
        )
    deviation = math.sqrt(recorded * (1 - recorded) / asked * (total - asked) / max(1, total - 1))
    return max(0.0, recorded - RECALL_TOLERANCE - 4 * deviation)


def _check_distances(what: str, datastore: Datastore, queries: Tensor, neighbors: Neighbors) -> None:
    """Whoever says how far an entry is must mean the key that is stored under its id."""
    parts = zip(*(torch.split(column, _BLOCK_QUERIES) for column in (queries, *neighbors[:2])), strict=True)
    for block, entry_ids, distances in parts:
        keys = datastore.keys(entry_ids.clamp(min=0))  # (c, K, D)
        direct = (keys - block[:, None]).square().sum(dim=2)
        allowed = RELATIVE_TOLERANCE * direct + NORM_TOLERANCE * block.square().sum(dim=1, keepdim=True)
        wrong = (entry_ids >= 0) & ~((distances - direct).abs() <= allowed)
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise DatastoreCorrupt(
                f"{what} distance of entry {int(entry_ids[row, column])} is {float(distances[row, column]):.6g}, "
                f"its stored key needs {float(direct[row, column]):.6g}"
            )


def _check_order(what: str, found: Neighbors) -> None:
    present = found.entry_ids[:, 1:] >= 0
    nearer, farther = found.distances[:, :-1], found.distances[:, 1:]
    in_order = (nearer < farther) | ((nearer == farther) & (found.entry_ids[:, :-1] < found.entry_ids[:, 1:]))
    if not bool((in_order | ~present).all()):
        raise DatastoreCorrupt(f"{what} entries found are not in the order of distance and id")


def _check(path: Path, canaries: Canaries, entries: int) -> None:
    if not bool(torch.isfinite(canaries.queries).all()):
        raise DatastoreCorrupt(f"{path} has a query that is not finite")
    ids, distances = canaries.entry_ids, canaries.distances
    if int(ids.min()) < -1 or int(ids.max()) >= entries:
        raise DatastoreCorrupt(f"{path} has entries {int(ids.min())} … {int(ids.max())}, needs −1 … {entries - 1}")
    is_distance = torch.where(ids < 0, distances == math.inf, torch.isfinite(distances) & (distances >= 0))
    if not bool(is_distance.all()):
        raise DatastoreCorrupt(f"{path} has a distance that is none; a missing entry has +inf, any other is ≥ 0")


def _schema(dim: int, neighbors: int) -> pa.Schema:
    def numbers(name: str, kind: pa.DataType, count: int) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("item", kind, nullable=False), count), nullable=False)

    return pa.schema(
        [
            numbers("query", pa.float32(), dim),
            numbers("entry_ids", pa.int64(), neighbors),
            numbers("distances", pa.float32(), neighbors),
            pa.field("document", pa.string(), nullable=False),
        ]
    )
