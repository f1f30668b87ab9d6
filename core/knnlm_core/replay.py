"""Retrieval for known tokens exactly as generation would have done it, token by token, with one search for all.

Whether a gate that follows searches depends on what was found for the tokens before, so generation asks it step by
step. What a search finds does not: here all rows are searched together, which costs a fraction of single searches, and
then the gate's decisions are replayed in order. Searches that it would have skipped were made for nothing; what is
reported is what it decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from knnlm_core.knn.gates import HISTORY_FEATURES, MAX_POINTERS, Context, Pointers
from knnlm_core.mixture import Found, Gated, Timings, Use, assemble, by_retrieval, gate_rows, no_neighbors, search_uses
from knnlm_core.retrieval import Retrieval, Source
from knnlm_core.types import Neighbors
from knnlm_core.walks import FOLLOWED, SEARCHED, SKIPPED, Walk, Walks, advance, ask


class Run(NamedTuple):
    """Rows of one sequence, each one token after the one before."""

    rows: range
    walks: Walks  # before the first of them


class Replayed(NamedTuple):
    """What was decided and found, and where each run's walks have come to."""

    found: Found
    walks: list[Walks]


def replay(
    keys: Tensor,
    targets: Tensor,
    retrievals: Sequence[Retrieval | None],
    context: Context | None,
    runs: Sequence[Run],
) -> Replayed:
    """`find` for the rows of some sequences whose tokens are known; the same where no gate follows.

    Args:
        keys: (B, D) float32.
        targets: (B,) int64, the tokens that came.
        retrievals: per row; all rows of a run have the same one.
        context: of the rows; None only where no retrieval needs it.
        runs: all rows, each in exactly one run.
    Raises: KnnlmError: a datastore could not be searched.
    """
    started = perf_counter()
    retrieving = by_retrieval(retrievals)
    gated = gate_rows(keys, retrieving, context, walks=None)
    decided = perf_counter()
    following = [
        Use(slot, source, rows)
        for retrieval, rows in retrieving
        for slot, source in enumerate(retrieval.sources)
        if source.gate.follows
    ]
    blocks, failures = search_uses(keys, [*gated.uses, *following], len(keys), slots=gated.outcomes.shape[1])
    for error in failures.values():
        raise error
    searched = perf_counter()
    for slot in {use.slot for use in following}:
        blocks[slot] = _widened(blocks[slot], MAX_POINTERS)
    walks = [list(run.walks) for run in runs]
    uses = list(gated.uses)
    for use in following:
        of_use = set(use.rows)
        members = [i for i, run in enumerate(runs) if run.rows and run.rows[0] in of_use]
        # Only the rows of this source: texts that each exclude themselves are sources of their own.
        rows = torch.tensor([row for i in members for row in runs[i].rows], device=keys.device)
        known = context.take(rows) if context is not None else None
        near = Neighbors(*(column[rows, : use.source.k] for column in blocks[use.slot]))
        begun = [(run, walks[i][use.slot]) for i, run in zip(members, _side_by_side(runs, members), strict=True)]
        trail = follow(use.source, begun, keys[rows], targets[rows], known, near)
        for i, walk in zip(members, trail.walks, strict=True):
            walks[i][use.slot] = walk
        uses += _put_trail(trail, use._replace(rows=rows.tolist()), gated, blocks[use.slot])
    walked = perf_counter()
    found = assemble(gated._replace(uses=uses), blocks, retrieving, context)
    timings = Timings(decided - started + walked - searched, searched - decided, perf_counter() - walked)
    return Replayed(found._replace(timings=timings), [tuple(each) for each in walks])


class Trail(NamedTuple):
    """Where walks over B rows have led; rows that no walk went over are as they would be without pointers."""

    outcomes: Tensor  # (B,) int8
    scores: Tensor  # (B,) float32, of the gate
    pointers: Pointers  # (B, MAX_POINTERS), what the gate saw
    walks: list[Walk]  # where each run ends


def follow(
    source: Source,
    begun: Sequence[tuple[range, Walk]],
    keys: Tensor,
    targets: Tensor,
    context: Context | None,
    searched: Neighbors,
) -> Trail:
    """Walk over some runs of rows side by side, where what a search finds for each row is known.

    Args:
        source: with a gate that follows.
        begun: the rows of each run, and its walk before the first of them.
        keys, targets, context: of all B rows, as for `replay`.
        searched: (B, K), K ≥ ``source.k``.
    Raises: KnnlmError: the datastore could not be read.
    """
    device, batch = keys.device, len(keys)
    trail = Trail(
        torch.full((batch,), SKIPPED, dtype=torch.int8, device=device),
        torch.full((batch,), math.nan, device=device),
        Pointers(
            no_neighbors(batch, MAX_POINTERS, device),
            torch.full((batch, MAX_POINTERS), -math.inf, device=device),
            torch.zeros((batch, len(HISTORY_FEATURES)), dtype=torch.float64, device=device),
        ),
        [walk for _, walk in begun],
    )
    tokens = targets.tolist()
    for depth in range(max((len(rows) for rows, _ in begun), default=0)):
        active = [i for i, (rows, _) in enumerate(begun) if depth < len(rows)]
        numbers = [begun[i][0][depth] for i in active]
        rows = torch.tensor(numbers, device=device)
        known = context.take(rows) if context is not None else None
        walks = [trail.walks[i] for i in active]
        asked = ask(source, keys[rows], known, walks)
        outcomes, pointers = asked.outcomes, asked.pointers
        width = pointers.log_weights.shape[1]
        trail.outcomes[rows], trail.scores[rows] = outcomes, asked.decisions.scores
        for into, column in zip(trail.pointers.neighbors, pointers.neighbors, strict=True):
            into[rows, :width] = column
        trail.pointers.log_weights[rows, :width] = pointers.log_weights
        trail.pointers.history[rows] = pointers.history
        used = _widened(Neighbors(*(column[rows, : source.k] for column in searched)), width)
        other = (outcomes != SEARCHED).nonzero()[:, 0]
        _overwrite(used, other, Neighbors(*(column[other] for column in pointers.neighbors)))
        moved = advance(walks, outcomes.tolist(), used, [tokens[n] for n in numbers], source.datastore)
        for i, walk in zip(active, moved, strict=True):
            trail.walks[i] = walk
    return trail


def _overwrite(block: Neighbors, rows: Tensor, by: Neighbors) -> None:
    """Put the neighbours (R, P) in place of whatever some rows (R,) of a block hold."""
    for column, near, missing in zip(block, by, _MISSING, strict=True):
        column[rows] = missing
        column[rows, : near.shape[1]] = near


def _side_by_side(runs: Sequence[Run], members: Sequence[int]) -> list[range]:
    """Where the rows of some runs are once they alone are left."""
    ends = list(accumulate((len(runs[i].rows) for i in members), initial=0))
    return [range(start, stop) for start, stop in pairwise(ends)]


def _put_trail(trail: Trail, use: Use, gated: Gated, block: Neighbors) -> list[Use]:
    """Let what was decided for a use's rows stand in ``gated`` and in the block; returns the uses that it comes to."""
    rows, outcomes = torch.tensor(use.rows, device=trail.outcomes.device), trail.outcomes
    gated.outcomes[rows, use.slot] = outcomes
    gated.report.scores[rows, use.slot] = trail.scores
    gated.report.pointers[rows, use.slot] = trail.pointers.counts
    changed = outcomes != SEARCHED
    _overwrite(block, rows[changed], Neighbors(*(column[changed] for column in trail.pointers.neighbors)))
    parts = []
    if searched := rows[~changed].tolist():
        parts.append(use._replace(rows=searched))
    if bool((followed := outcomes == FOLLOWED).any()):
        near = Neighbors(*(column[followed] for column in trail.pointers.neighbors))
        parts.append(use._replace(rows=rows[followed].tolist(), pointers=near))
    return parts


_MISSING = (-1, math.inf, -1)  # id, distance and value where there is no neighbour


def _widened(block: Neighbors, width: int) -> Neighbors:
    """With room for pointers."""
    missing = width - block.entry_ids.shape[1]
    if missing <= 0:
        return block
    return Neighbors(*(pad(column, (0, missing), value=value) for column, value in zip(block, _MISSING, strict=True)))
