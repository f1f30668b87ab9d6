"""The one place where language model and datastores meet: gate → search → fusion → distribution → interpolate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.errors import KnnlmError
from knnlm_core.knn.distribution import neighbor_log_weights, target_log_mass, token_log_probs
from knnlm_core.knn.fusion import Fusion, Part, fuse
from knnlm_core.knn.gates import ALWAYS, Context
from knnlm_core.knn.interpolation import interpolate, interpolate_targets
from knnlm_core.retrieval import Retrieval, Searchable, Source
from knnlm_core.signals import lm_signals
from knnlm_core.types import EntryRange, Neighbors


class Found(NamedTuple):
    """What was decided and found for the rows of a step: W neighbours at most, source after source."""

    searched: Tensor  # (B,) bool
    lmbda: Tensor  # (B,) float64, the λ applied; 0 where nothing was searched or found
    neighbors: Neighbors  # (B, W), nearest first within a source; all missing where nothing was searched
    log_weights: Tensor  # (B, W) float32, of each neighbour's share of p_knn
    sources: Tensor  # (W,) int64, which source of its row's retrieval a column belongs to
    shares: Tensor  # (B, S) float64, of each source's share of p_knn; 0 where it found nothing
    lambdas: Tensor  # (B, S) float64, λ of each source; of those that found something
    gate_scores: Tensor  # (B, S) float32, what each source's gate held against its threshold; NaN for none
    failures: Mapping[int, KnnlmError]  # rows of which a datastore could not be searched, and why


class MixedRows(NamedTuple):
    """Log-probabilities of the mixture and how they came about."""

    log_probs: Tensor  # (B, V) float32
    found: Found


class MixedTargets(NamedTuple):
    """`MixedRows` for one known token per row."""

    log_probs: Tensor  # (B,) float32
    found: Found


class _Use(NamedTuple):
    """A source, and the rows that use it as their number ``slot``."""

    slot: int
    source: Source
    rows: Sequence[int]


def find(keys: Tensor, retrievals: Sequence[Retrieval | None], context: Context | None = None) -> Found:
    """Gate and search: one call per snapshot and exclusion for all the rows that share them.

    A datastore that fails takes only its own rows along: they are reported in ``failures``.

    Args:
        keys: (B, D) float32.
        retrievals: per row, None for a row of the plain LM.
        context: of the rows; None only where no retrieval needs it.
    """
    device, batch = keys.device, len(retrievals)
    # The rows of a request share its retrieval, which is looked at once, not once per row.
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, retrieval in enumerate(retrievals):
        if retrieval is not None:
            rows_of[id(retrieval)].append(row)
    retrieving = [(retrieval, rows) for rows in rows_of.values() if (retrieval := retrievals[rows[0]]) is not None]
    uses, gate_scores = _gate(keys, retrieving, context)
    blocks, failures = _search(keys, uses, batch, slots=gate_scores.shape[1])
    parts = [_part(block, [use for use in uses if use.slot == slot], context) for slot, block in enumerate(blocks)]
    searched = _marked([row for use in uses for row in use.rows], batch, device)
    merged = [row for retrieval, rows in retrieving if retrieval.fusion is Fusion.NEIGHBORS for row in rows]
    fused = fuse(parts, _marked(merged, batch, device) if merged else None)
    widths = torch.tensor([block.entry_ids.shape[1] for block in blocks], device=device)
    sources = torch.repeat_interleave(torch.arange(len(blocks), device=device), widths)
    lambdas = torch.stack([part.lmbda for part in parts], dim=1)
    return Found(
        searched, fused.lmbda, fused.neighbors, fused.log_weights, sources, fused.shares, lambdas,
        gate_scores, failures,
    )  # fmt: skip


def _gate(
    keys: Tensor, retrieving: Sequence[tuple[Retrieval, Sequence[int]]], context: Context | None
) -> tuple[list[_Use], Tensor]:
    """The sources to be searched with the rows to search them for, and (B, S) what the gates had to say."""
    slots = max((len(retrieval.sources) for retrieval, _ in retrieving), default=1)
    scores = torch.full((len(keys), slots), math.nan, device=keys.device)
    uses = []
    for retrieval, rows in retrieving:
        for slot, source in enumerate(retrieval.sources):
            if source.gate is ALWAYS:  # as most are
                uses.append(_Use(slot, source, rows))
                continue
            index = torch.tensor(rows, device=keys.device)
            decisions = source.gate(keys[index], context.take(index) if context is not None else None)
            scores[index, slot] = decisions.scores
            if chosen := index[decisions.search].tolist():
                uses.append(_Use(slot, source, chosen))
    return uses, scores


def _marked(rows: Sequence[int], batch: int, device: torch.device) -> Tensor:
    marked = torch.zeros(batch, dtype=torch.bool, device=device)
    marked[rows] = True
    return marked


def _search(
    keys: Tensor, uses: Sequence[_Use], batch: int, slots: int
) -> tuple[list[Neighbors], dict[int, KnnlmError]]:
    """What each slot's sources found for all rows, and the rows that could not be searched for."""
    groups: defaultdict[tuple[Searchable, tuple[EntryRange, ...]], list[_Use]] = defaultdict(list)
    for use in uses:
        groups[use.source.datastore, use.source.exclude].append(use)
    widths = [1] * slots
    for use in uses:
        widths[use.slot] = max(widths[use.slot], use.source.k)
    blocks: list[Neighbors | None] = [None] * len(widths)
    failures: dict[int, KnnlmError] = {}
    for (datastore, exclude), group in groups.items():
        rows = [row for use in group for row in use.rows]
        # As in scoring: nothing to put together.
        everything = len(rows) == batch and len({use.slot for use in group}) == 1
        k = max(use.source.k for use in group)
        try:
            found = datastore.search(keys if everything else keys[rows], k, exclude=exclude)
        except KnnlmError as error:
            failures.update(dict.fromkeys(rows, error))
            continue
        found = Neighbors(*(column.to(keys.device) for column in found))
        if everything:
            blocks[group[0].slot] = found
        else:
            _put(found, group, blocks, widths, batch)
    return [block or _no_neighbors(batch, k, keys.device) for block, k in zip(blocks, widths, strict=True)], failures


def _put(
    found: Neighbors, group: Sequence[_Use], blocks: list[Neighbors | None], widths: Sequence[int], batch: int
) -> None:
    """Write what was found for a group of uses, one after the other, into the blocks of their slots."""
    start = 0
    for use in group:
        block = blocks[use.slot] or _no_neighbors(batch, widths[use.slot], found.entry_ids.device)
        blocks[use.slot] = block
        rows, k = slice(start, start + len(use.rows)), use.source.k
        for into, column in zip(block, found, strict=True):
            into[use.rows, :k] = column[rows, :k]
        start += len(use.rows)


def _no_neighbors(batch: int, width: int, device: torch.device) -> Neighbors:
    return Neighbors(
        torch.full((batch, width), -1, dtype=torch.int64, device=device),
        torch.full((batch, width), math.inf, device=device),
        torch.full((batch, width), -1, dtype=torch.int64, device=device),
    )


def _part(block: Neighbors, uses: Sequence[_Use], context: Context | None) -> Part:
    """A slot's neighbours (B, K) with the settings of the rows that use it."""
    device, (batch, width) = block.entry_ids.device, block.entry_ids.shape
    ks = torch.full((batch,), width, device=device)
    tau = torch.ones(batch, device=device)
    lmbda, weight = (torch.zeros(batch, dtype=torch.float64, device=device) for _ in range(2))
    for _, source, rows in uses:
        ks[rows], tau[rows], lmbda[rows], weight[rows] = source.k, source.knn_temperature, source.lmbda, source.weight
    if bool((ks < width).any()):
        # A row that asked for fewer neighbours than its group sees only its own.
        beyond = torch.arange(width, device=device)[None] >= ks[:, None]
        block = block._replace(entry_ids=block.entry_ids.masked_fill(beyond, -1))
    log_weights = neighbor_log_weights(block, tau)
    for _, source, rows in uses:
        if source.lambda_rule is not None:
            assert context is not None, "a λ was asked for without what it looks at. This is a bug."
            # As in scoring: all rows are this source's, and nothing has to be picked out.
            index = slice(None) if len(rows) == batch else torch.tensor(rows, device=device)
            near = Neighbors(*(column[index] for column in block))
            lmbda[index] = source.lambda_rule(near, log_weights[index], context.signals.take(index))
    return Part(block, log_weights, tau, lmbda, weight)


def mix_rows(
    lm_log_probs: Tensor, keys: Tensor, retrievals: Sequence[Retrieval | None], positions: Tensor | None = None
) -> MixedRows:
    """The mixture's whole distribution for each row, as generation needs it.

    Args:
        lm_log_probs: (B, V) float32, log-softmaxed.
        keys: (B, D) float32.
        positions: (B,) int64, how many tokens come before each; None only where no retrieval needs a context.
    """
    context = None
    if any(retrieval is not None and retrieval.needs_context for retrieval in retrievals):
        assert positions is not None, "a gate or a λ was asked for without what it looks at. This is a bug."
        context = Context(lm_signals(lm_log_probs), positions)
    found = find(keys, retrievals, context)
    if not bool((found.lmbda > 0).any()):
        return MixedRows(lm_log_probs, found)
    sparse = token_log_probs(found.neighbors.values, found.log_weights)
    return MixedRows(interpolate(lm_log_probs, sparse, found.lmbda.float()), found)


def mix_targets(
    lm_log_probs: Tensor,
    keys: Tensor,
    targets: Tensor,
    retrievals: Sequence[Retrieval | None],
    context: Context | None = None,
) -> MixedTargets:
    """The mixture's log-probability of one known token per row, as scoring needs it.

    Args:
        lm_log_probs: (B,) float32, the LM's log-probability of each target.
        keys: (B, D) float32.
        targets: (B,) int64.
        context: as in `find`.
    Raises: KnnlmError: a datastore could not be searched.
    """
    found = find(keys, retrievals, context)
    for error in found.failures.values():
        raise error
    knn = target_log_mass(found.neighbors.values, found.log_weights, targets)
    return MixedTargets(interpolate_targets(lm_log_probs, knn, found.lmbda.float()), found)


def source_log_probs(keys: Tensor, targets: Tensor, retrieval: Retrieval) -> Tensor:
    """log p_knn,i of known tokens in each source by itself, whatever the gate says: (B, S) float32.

    Args:
        keys: (B, D) float32.
        targets: (B,) int64.
    Raises: KnnlmError: a datastore could not be searched.
    """
    columns = []
    for source in retrieval.sources:
        itself = replace(source, weight=1.0, gate=ALWAYS, lambda_rule=None)
        found = find(keys, [Retrieval((itself,))] * len(targets))
        for error in found.failures.values():
            raise error
        columns.append(target_log_mass(found.neighbors.values, found.log_weights, targets))
    return torch.stack(columns, dim=1)
