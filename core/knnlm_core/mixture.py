"""The one place where language model and datastore meet: gate → search → distribution → interpolate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from knnlm_core.errors import InvalidKnnParams, KnnlmError
from knnlm_core.knn.distribution import has_neighbors, knn_log_probs, target_log_probs
from knnlm_core.knn.gates import Gate
from knnlm_core.knn.interpolation import interpolate, interpolate_targets
from knnlm_core.types import EntryRange, Neighbors

MAX_K = 4096
# Far inside float32, in which τ is applied; distances of real models lie between 1 and 10⁴.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e9


class Searchable(Protocol):
    """What can be searched: a datastore in this process, or later one elsewhere."""

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """The k nearest entries of each query (B, D), nearest first, none of them excluded."""
        ...


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How one row retrieves.

    Attributes:
        datastore: the snapshot that the row's request has leased.
        k: neighbours per query, 1 … MAX_K.
        knn_temperature: τ, in units of squared distance.
        lmbda: λ in [0, 1], weight of p_knn.
        gate: when to search.
        exclude: entries that must not be found, such as those of the document being scored.
    """

    datastore: Searchable
    k: int
    knn_temperature: float
    lmbda: float
    gate: Gate = Gate.ALWAYS
    exclude: tuple[EntryRange, ...] = ()

    def check(self) -> None:
        """Raises InvalidKnnParams: naming the field, its limits and its value."""
        if not 1 <= self.k <= MAX_K:
            raise InvalidKnnParams(f"`knn.k` must be in 1 … {MAX_K}, got {self.k}", param="knn.k")
        if not MIN_TEMPERATURE <= self.knn_temperature <= MAX_TEMPERATURE:
            raise InvalidKnnParams(
                f"`knn.temperature` must be in {MIN_TEMPERATURE:g} … {MAX_TEMPERATURE:g}, got {self.knn_temperature:g}",
                param="knn.temperature",
            )
        if not 0 <= self.lmbda <= 1:
            raise InvalidKnnParams(f"`knn.lambda` must be in 0 … 1, got {self.lmbda:g}", param="knn.lambda")


class Found(NamedTuple):
    """What was decided and found for the rows of a step."""

    searched: Tensor  # (B,) bool
    lmbda: Tensor  # (B,) float32, the λ applied; 0 where nothing was searched or found
    neighbors: Neighbors  # (B, K), all missing where nothing was searched
    knn_temperature: Tensor  # (B,) float32
    failures: Mapping[int, KnnlmError]  # rows whose datastore could not be searched, and why


class MixedRows(NamedTuple):
    """Log-probabilities of the mixture and how they came about."""

    log_probs: Tensor  # (B, V) float32
    found: Found


class MixedTargets(NamedTuple):
    """`MixedRows` for one known token per row."""

    log_probs: Tensor  # (B,) float32
    found: Found


def find(keys: Tensor, retrievals: Sequence[Retrieval | None]) -> Found:
    """Gate and search: one call per snapshot and exclusion for all the rows that share them.

    A datastore that fails takes only its own rows along: they are reported in ``failures`` and have no neighbours.

    Args:
        keys: (B, D) float32.
        retrievals: per row, None for a row of the plain LM.
    """
    groups = _groups(retrievals)
    device, batch = keys.device, len(retrievals)
    searched_rows = [row for rows in groups.values() for row in rows]
    ks = torch.tensor([r.k if r else 0 for r in retrievals], device=device)
    width = max((retrievals[row].k for row in searched_rows), default=1)  # type: ignore[union-attr]
    neighbors: Neighbors | None = None
    failures: dict[int, KnnlmError] = {}
    for (_, exclude), rows in groups.items():
        retrieval = retrievals[rows[0]]
        assert retrieval is not None
        k = int(ks[rows].max())
        everything = len(rows) == batch
        try:
            parts = retrieval.datastore.search(keys if everything else keys[rows], k, exclude=exclude)
        except KnnlmError as error:
            failures.update(dict.fromkeys(rows, error))
            continue
        if everything:  # as in scoring: nothing to put together
            neighbors = Neighbors(*(part.to(device) for part in parts))
            break
        neighbors = neighbors or _no_neighbors(batch, width, device)
        for into, part in zip(neighbors, parts, strict=True):
            into[rows, :k] = part.to(device)
    neighbors = neighbors or _no_neighbors(batch, width, device)
    if bool((ks < width).any()):
        # A row that asked for fewer neighbours than its group sees only its own.
        beyond = torch.arange(width, device=device)[None] >= ks[:, None]
        neighbors = neighbors._replace(entry_ids=neighbors.entry_ids.masked_fill(beyond, -1))

    searched = torch.zeros(batch, dtype=torch.bool, device=device)
    searched[searched_rows] = True
    lmbda = torch.tensor([r.lmbda if r else 0.0 for r in retrievals], device=device)
    tau = torch.tensor([r.knn_temperature if r else 1.0 for r in retrievals], device=device)
    return Found(searched, torch.where(has_neighbors(neighbors), lmbda, 0.0), neighbors, tau, failures)


def _groups(retrievals: Sequence[Retrieval | None]) -> Mapping[tuple[int, tuple[EntryRange, ...]], list[int]]:
    """Rows to search for, by snapshot and exclusion."""
    # The rows of a request share its retrieval: an exclusion of many documents is hashed once, not once per row.
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, retrieval in enumerate(retrievals):
        if retrieval is not None and retrieval.gate is Gate.ALWAYS:
            rows_of[id(retrieval)].append(row)
    groups: defaultdict[tuple[int, tuple[EntryRange, ...]], list[int]] = defaultdict(list)
    for rows in rows_of.values():
        retrieval = retrievals[rows[0]]
        assert retrieval is not None
        groups[id(retrieval.datastore), retrieval.exclude].extend(rows)
    return groups


def _no_neighbors(batch: int, width: int, device: torch.device) -> Neighbors:
    return Neighbors(
        torch.full((batch, width), -1, dtype=torch.int64, device=device),
        torch.full((batch, width), math.inf, device=device),
        torch.full((batch, width), -1, dtype=torch.int64, device=device),
    )


def mix_rows(lm_log_probs: Tensor, keys: Tensor, retrievals: Sequence[Retrieval | None]) -> MixedRows:
    """The mixture's whole distribution for each row, as generation needs it.

    Args:
        lm_log_probs: (B, V) float32, log-softmaxed.
        keys: (B, D) float32.
    """
    found = find(keys, retrievals)
    if not bool((found.lmbda > 0).any()):
        return MixedRows(lm_log_probs, found)
    sparse = knn_log_probs(found.neighbors, knn_temperature=found.knn_temperature)
    return MixedRows(interpolate(lm_log_probs, sparse, found.lmbda), found)


def mix_targets(
    lm_log_probs: Tensor, keys: Tensor, targets: Tensor, retrievals: Sequence[Retrieval | None]
) -> MixedTargets:
    """The mixture's log-probability of one known token per row, as scoring needs it.

    Args:
        lm_log_probs: (B,) float32, the LM's log-probability of each target.
        keys: (B, D) float32.
        targets: (B,) int64.
    Raises: KnnlmError: a datastore could not be searched.
    """
    found = find(keys, retrievals)
    for error in found.failures.values():
        raise error
    knn = target_log_probs(found.neighbors, targets, knn_temperature=found.knn_temperature)
    return MixedTargets(interpolate_targets(lm_log_probs, knn, found.lmbda), found)
