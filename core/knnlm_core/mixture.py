"""The one place where language model and datastores meet: gate → search → fusion → distribution → interpolate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple, cast

import torch
from torch import Tensor

from knnlm_core.errors import KnnlmError
from knnlm_core.knn.distribution import neighbor_log_weights, target_log_mass, token_log_probs
from knnlm_core.knn.fusion import Fusion, Part, fuse
from knnlm_core.knn.gates import ALWAYS, Context
from knnlm_core.knn.interpolation import interpolate, interpolate_targets
from knnlm_core.knn.lambdas import LambdaRule
from knnlm_core.retrieval import Retrieval, Searchable, Source
from knnlm_core.signals import lm_signals
from knnlm_core.types import EntryRange, Neighbors
from knnlm_core.walks import FOLLOWED, SEARCHED, SKIPPED, START, Walk, Walks, advance, ask


class Timings(NamedTuple):
    """Seconds that some rows took together; where tensors are on a GPU, until the work was handed to it."""

    gate: float = 0.0  # deciding, with what it looks at
    search: float = 0.0  # 0 where nothing was to be searched
    mix: float = 0.0  # weighing, fusing, interpolating

    def plus(self, gate: float = 0.0, search: float = 0.0, mix: float = 0.0) -> Timings:
        """With some seconds more."""
        return Timings(self.gate + gate, self.search + search, self.mix + mix)


class Found(NamedTuple):
    """What was decided and found for the rows of a step: W neighbours at most, source after source."""

    outcomes: Tensor  # (B, S) int8, SKIPPED, SEARCHED or FOLLOWED, by source
    lmbda: Tensor  # (B,) float64, the λ applied; 0 where nothing was found
    neighbors: Neighbors  # (B, W), nearest first within a source; found, or the pointers that were followed
    log_weights: Tensor  # (B, W) float32, of each neighbour's share of p_knn
    sources: Tensor  # (W,) int64, which source of its row's retrieval a column belongs to
    shares: Tensor  # (B, S) float64, of each source's share of p_knn; 0 where it found nothing
    lambdas: Tensor  # (B, S) float64, λ of each source; of those that found something
    gates: GateReport
    failures: Mapping[int, KnnlmError]  # rows of which a datastore could not be searched, and why
    timings: Timings = Timings()

    @property
    def searched(self) -> Tensor:
        """(B,) bool: whether any source was searched."""
        return (self.outcomes == SEARCHED).any(dim=1)

    @property
    def followed(self) -> Tensor:
        """(B,) bool: whether pointers were followed instead, and nothing was searched."""
        return (self.outcomes == FOLLOWED).any(dim=1) & ~self.searched


class GateReport(NamedTuple):
    """What the gates of B rows looked at, by source."""

    scores: Tensor  # (B, S) float32, what was held against the threshold; NaN for gates without one
    pointers: Tensor  # (B, S) int64, how many there were; 0 for gates that do not follow


class MixedRows(NamedTuple):
    """Log-probabilities of the mixture and how they came about."""

    log_probs: Tensor  # (B, V) float32
    found: Found


class Use(NamedTuple):
    """A source, and the rows that use it as their number ``slot``."""

    slot: int
    source: Source
    rows: Sequence[int]
    pointers: Neighbors | None = None  # of the rows, where they follow instead of being searched


class Gated(NamedTuple):
    """What the gates decided."""

    uses: Sequence[Use]
    outcomes: Tensor  # (B, S) int8
    report: GateReport
    failures: Mapping[int, KnnlmError]


Retrieving = Sequence[tuple[Retrieval, Sequence[int]]]  # each retrieval once, with the rows that share it


def find(
    keys: Tensor,
    retrievals: Sequence[Retrieval | None],
    context: Context | None = None,
    walks: Sequence[Walks] | None = None,
) -> Found:
    """Gate and search: one call per snapshot and exclusion for all the rows that share them.

    A datastore that fails takes only its own rows along: they are reported in ``failures``.

    Args:
        keys: (B, D) float32.
        retrievals: per row, None for a row of the plain LM.
        context: of the rows; None only where no retrieval needs it.
        walks: of the rows, empty for those without gates that follow; None where no row has one.
    """
    begun = perf_counter()
    retrieving = by_retrieval(retrievals)
    assert walks is not None or not any(start_walks(retrieval) for retrieval, _ in retrieving), (
        "a gate that follows was asked without the walks. This is a bug."
    )
    gated = gate_rows(keys, retrieving, context, walks)
    decided = perf_counter()
    blocks, failures = search_uses(keys, gated.uses, len(retrievals), slots=gated.outcomes.shape[1])
    failures.update(gated.failures)
    searched = perf_counter()
    found = assemble(gated._replace(failures=failures), blocks, retrieving, context)
    searching = searched - decided if any(use.pointers is None for use in gated.uses) else 0.0
    return found._replace(timings=Timings(decided - begun, searching, perf_counter() - searched))


def by_retrieval(retrievals: Sequence[Retrieval | None]) -> Retrieving:
    """The rows of a request share its retrieval, which is looked at once, not once per row."""
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, retrieval in enumerate(retrievals):
        if retrieval is not None:
            rows_of[id(retrieval)].append(row)
    return [(retrieval, rows) for rows in rows_of.values() if (retrieval := retrievals[rows[0]]) is not None]


def assemble(gated: Gated, blocks: Sequence[Neighbors], retrieving: Retrieving, context: Context | None) -> Found:
    """Weigh and fuse what was found.

    Args:   blocks: for each slot, the neighbours (B, K) of all rows.
    """
    uses, outcomes, report, failures = gated
    device, batch = outcomes.device, len(outcomes)
    parts = [_part(block, [use for use in uses if use.slot == slot], context) for slot, block in enumerate(blocks)]
    merged = [row for retrieval, rows in retrieving if retrieval.fusion is Fusion.NEIGHBORS for row in rows]
    fused = fuse(parts, _marked(merged, batch, device) if merged else None)
    widths = torch.tensor([block.entry_ids.shape[1] for block in blocks], device=device)
    sources = torch.repeat_interleave(torch.arange(len(blocks), device=device), widths)
    lambdas = torch.stack([part.lmbda for part in parts], dim=1)
    return Found(
        outcomes, fused.lmbda, fused.neighbors, fused.log_weights, sources, fused.shares, lambdas, report, failures
    )


def gate_rows(keys: Tensor, retrieving: Retrieving, context: Context | None, walks: Sequence[Walks] | None) -> Gated:
    """Ask every gate for its rows.

    Args:   walks: None leaves out gates that follow.
    """
    slots = max((len(retrieval.sources) for retrieval, _ in retrieving), default=1)
    shape, device = (len(keys), slots), keys.device
    scores, pointers = torch.full(shape, math.nan, device=device), torch.zeros(shape, dtype=torch.int64, device=device)
    outcomes = torch.full(shape, SKIPPED, dtype=torch.int8, device=device)
    uses: list[Use] = []
    failures: dict[int, KnnlmError] = {}
    for slot, members in _asked_together(retrieving):
        (source, _), rows = members[0], [row for _, of_member in members for row in of_member]
        if source.gate is ALWAYS:  # as most are
            uses += [Use(slot, member, of_member) for member, of_member in members]
            outcomes[rows, slot] = SEARCHED
            continue
        if source.gate.follows and walks is None:
            continue
        index = torch.tensor(rows, device=device)
        known = context.take(index) if context is not None else None
        near: Neighbors | None = None
        if walks is None or not source.gate.follows:
            decisions = source.gate(keys[index], known)
            done = decisions.search.to(torch.int8) * SEARCHED
        else:
            try:
                asked = ask(source, keys[index], known, [walks[row][slot] for row in rows])
            except KnnlmError as error:
                failures.update(dict.fromkeys(rows, error))
                continue
            decisions, done, near = asked.decisions, asked.outcomes, asked.pointers.neighbors
            pointers[index, slot] = asked.pointers.counts
        outcomes[index, slot], scores[index, slot] = done, decisions.scores
        start = 0
        for member, of_member in members:
            here = slice(start, start + len(of_member))
            uses += _uses(Use(slot, member, of_member), done[here], near and Neighbors(*(part[here] for part in near)))
            start = here.stop
    return Gated(uses, outcomes, GateReport(scores, pointers), failures)


def _asked_together(retrieving: Retrieving) -> list[tuple[int, list[tuple[Source, Sequence[int]]]]]:
    """Sources of a slot with their rows, those together of which a gate is asked the same."""
    groups: defaultdict[tuple[object, ...], list[tuple[Source, Sequence[int]]]] = defaultdict(list)
    for retrieval, rows in retrieving:
        for slot, source in enumerate(retrieval.sources):
            key = (slot, source.datastore, source.exclude, source.knn_temperature, source.gate)
            groups[key].append((source, rows))
    return [(cast(int, key[0]), members) for key, members in groups.items()]


def _uses(use: Use, outcomes: Tensor, pointers: Neighbors | None) -> list[Use]:
    """What the rows of a use come to: those that are searched, and those that follow their pointers.

    Args:   outcomes, pointers: of the rows; None where nothing can be followed.
    """
    parts = []
    if pointers is not None and bool((follow := outcomes == FOLLOWED).any()):
        rows = [row for row, follows in zip(use.rows, follow.tolist(), strict=True) if follows]
        parts.append(use._replace(rows=rows, pointers=Neighbors(*(column[follow] for column in pointers))))
    if rows := [row for row, done in zip(use.rows, outcomes.tolist(), strict=True) if done == SEARCHED]:
        parts.append(use._replace(rows=rows))
    return parts


def _marked(rows: Sequence[int], batch: int, device: torch.device) -> Tensor:
    marked = torch.zeros(batch, dtype=torch.bool, device=device)
    marked[rows] = True
    return marked


def search_uses(
    keys: Tensor, uses: Sequence[Use], batch: int, slots: int
) -> tuple[list[Neighbors], dict[int, KnnlmError]]:
    """What each slot's sources found for all rows, and the rows that could not be searched for."""
    groups: defaultdict[tuple[Searchable, tuple[EntryRange, ...]], list[Use]] = defaultdict(list)
    widths = [1] * slots
    for use in uses:
        if use.pointers is None:
            groups[use.source.datastore, use.source.exclude].append(use)
        widths[use.slot] = max(widths[use.slot], use.source.k if use.pointers is None else use.pointers.values.shape[1])
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
            continue
        start = 0
        for use in group:
            stop = start + len(use.rows)
            _put(Neighbors(*(column[start:stop, : use.source.k] for column in found)), use, blocks, widths, batch)
            start = stop
    for use in uses:
        if use.pointers is not None:
            _put(use.pointers, use, blocks, widths, batch)
    return [block or no_neighbors(batch, k, keys.device) for block, k in zip(blocks, widths, strict=True)], failures


def _put(found: Neighbors, use: Use, blocks: list[Neighbors | None], widths: Sequence[int], batch: int) -> None:
    """Write the neighbours of a use's rows into the block of its slot."""
    block = blocks[use.slot] or no_neighbors(batch, widths[use.slot], found.entry_ids.device)
    blocks[use.slot] = block
    for into, column in zip(block, found, strict=True):
        into[use.rows, : column.shape[1]] = column


def no_neighbors(batch: int, width: int, device: torch.device) -> Neighbors:
    """(batch, width) of them, all missing."""
    return Neighbors(
        torch.full((batch, width), -1, dtype=torch.int64, device=device),
        torch.full((batch, width), math.inf, device=device),
        torch.full((batch, width), -1, dtype=torch.int64, device=device),
    )


def _part(block: Neighbors, uses: Sequence[Use], context: Context | None) -> Part:
    """A slot's neighbours (B, K) with the settings of the rows that use it."""
    device, (batch, width) = block.entry_ids.device, block.entry_ids.shape
    ks = torch.full((batch,), width, device=device)
    tau = torch.ones(batch, device=device)
    lmbda, weight = (torch.zeros(batch, dtype=torch.float64, device=device) for _ in range(2))
    for use in uses:
        rows, source = use.rows, use.source
        ks[rows] = source.k if use.pointers is None else width  # there are no more pointers than there are
        tau[rows], lmbda[rows], weight[rows] = source.knn_temperature, source.lmbda, source.weight
    if bool((ks < width).any()):
        # A row that asked for fewer neighbours than its group sees only its own.
        beyond = torch.arange(width, device=device)[None] >= ks[:, None]
        block = block._replace(entry_ids=block.entry_ids.masked_fill(beyond, -1))
    log_weights = neighbor_log_weights(block, tau)
    ruled: defaultdict[LambdaRule, list[int]] = defaultdict(list)
    for use in uses:
        rule = use.source.lambda_rule if use.pointers is None else use.source.follow_rule or use.source.lambda_rule
        if rule is not None:
            ruled[rule] += use.rows
    for rule, of_rule in ruled.items():
        assert context is not None, "a λ was asked for without what it looks at. This is a bug."
        # As in scoring: all rows are ruled by it, in order, and nothing has to be picked out.
        everything = of_rule == list(range(batch))
        index = slice(None) if everything else torch.tensor(of_rule, device=device)
        near = Neighbors(*(column[index] for column in block))
        lmbda[index] = rule(near, log_weights[index], context.signals.take(index))
    return Part(block, log_weights, tau, lmbda, weight)


def mix_rows(
    lm_log_probs: Tensor,
    keys: Tensor,
    retrievals: Sequence[Retrieval | None],
    positions: Tensor | None = None,
    walks: Sequence[Walks] | None = None,
) -> MixedRows:
    """The mixture's whole distribution for each row, as generation needs it.

    Args:
        lm_log_probs: (B, V) float32, log-softmaxed.
        keys: (B, D) float32.
        positions: (B,) int64, how many tokens come before each; None only where no retrieval needs a context.
        walks: as in `find`.
    """
    begun = perf_counter()
    context = context_of(lm_log_probs, retrievals, positions)
    looked = perf_counter() - begun
    found = find(keys, retrievals, context, walks)
    return mix_found(lm_log_probs, found._replace(timings=found.timings.plus(gate=looked)))


def context_of(
    lm_log_probs: Tensor, retrievals: Sequence[Retrieval | None], positions: Tensor | None
) -> Context | None:
    """What gates and λ rules look at; None where no retrieval needs it. Arguments as for `mix_rows`."""
    if not any(retrieval is not None and retrieval.needs_context for retrieval in retrievals):
        return None
    assert positions is not None, "a gate or a λ was asked for without what it looks at. This is a bug."
    return Context(lm_signals(lm_log_probs), positions)


def mix_found(lm_log_probs: Tensor, found: Found) -> MixedRows:
    """`mix_rows` with what was found already."""
    if not bool((found.lmbda > 0).any()):
        return MixedRows(lm_log_probs, found)
    begun = perf_counter()
    sparse = token_log_probs(found.neighbors.values, found.log_weights)
    log_probs = interpolate(lm_log_probs, sparse, found.lmbda.float())
    return MixedRows(log_probs, found._replace(timings=found.timings.plus(mix=perf_counter() - begun)))


def mix_targets(lm_log_probs: Tensor, targets: Tensor, found: Found) -> Tensor:
    """The mixture's log-probability of one known token per row, as scoring needs it: (B,) float32.

    Args:
        lm_log_probs: (B,) float32, the LM's log-probability of each target.
        targets: (B,) int64.
        found: for the same rows.
    Raises: KnnlmError: a datastore could not be searched.
    """
    for error in found.failures.values():
        raise error
    knn = target_log_mass(found.neighbors.values, found.log_weights, targets)
    return interpolate_targets(lm_log_probs, knn, found.lmbda.float())


def start_walks(retrieval: Retrieval | None) -> Walks:
    """Where a sequence begins; empty if no gate follows."""
    follows = retrieval is not None and any(source.gate.follows for source in retrieval.sources)
    return (START,) * len(retrieval.sources) if retrieval is not None and follows else ()


def advance_walks(
    walks: Sequence[Walks],
    retrievals: Sequence[Retrieval | None],
    found: Found,
    rows: Sequence[int],
    tokens: Sequence[int],
) -> list[Walks]:
    """The walks of R sequences after their tokens came.

    Args:
        walks, retrievals, tokens: R of them.
        rows: for each, its row in ``found``; several sequences may fork from one.
    Raises: KnnlmError: a datastore could not be read.
    """
    advanced: list[list[Walk]] = [list(walk) for walk in walks]
    groups: defaultdict[tuple[int, Searchable], list[int]] = defaultdict(list)
    for i, (walk, retrieval) in enumerate(zip(walks, retrievals, strict=True)):
        if retrieval is not None:
            for slot in range(len(walk)):
                groups[slot, retrieval.sources[slot].datastore].append(i)
    for (slot, datastore), members in groups.items():
        at = torch.tensor([rows[i] for i in members], device=found.lmbda.device)
        columns = (found.sources == slot).nonzero()[:, 0]
        neighbors = Neighbors(*(column[at][:, columns] for column in found.neighbors))
        outcomes = found.outcomes[at, slot].tolist()
        moved = advance([walks[i][slot] for i in members], outcomes, neighbors, [tokens[i] for i in members], datastore)
        for i, itself in zip(members, moved, strict=True):
            advanced[i][slot] = itself
    return [tuple(parts) for parts in advanced]


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
