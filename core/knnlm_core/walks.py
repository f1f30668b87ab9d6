"""What a sequence carries from step to step, so that what was found once can be followed without another search.

search            neighbours  ──those that hold the token that came──►  the entries after them: pointers
next step         pointers, at their exact distances to the new key: features of the gate, and neighbours if it follows
follow            pointers    ──those that hold the token that came──►  the entries after them: pointers
neither           no pointers

A walk is of one sequence and one datastore, begins where a prompt ends or a text begins, and forks with its sequence.
Entries after a document's last one, or deleted ones, are no pointers, so that a walk ends with a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_core.knn.distribution import neighbor_log_weights
from knnlm_core.knn.gates import MAX_POINTERS, Context, Decisions, Pointers
from knnlm_core.retrieval import Searchable, Source
from knnlm_core.types import Neighbors

SKIPPED, SEARCHED, FOLLOWED = 0, 1, 2  # what was done for a row

_MAX_STEPS = 20  # since the last search; beyond it all are the same
_NOTHING = np.empty(0, np.int64)


class Walk(NamedTuple):
    """Never changed, so that forks share it until they part."""

    pointers: npt.NDArray[np.int64]  # (P,) entries, P ≤ MAX_POINTERS
    nearest: float  # squared distance of the nearest neighbour or pointer of the step before; −1 for none
    steps: int  # since the last search
    hit: float  # whether that nearest one held the token that came: 1 or 0; −1 for none


START = Walk(_NOTHING, -1.0, _MAX_STEPS, -1.0)
Walks = tuple[Walk, ...]  # of one row, one for each source of its retrieval


class Asked(NamedTuple):
    """What a gate that follows decided for B rows."""

    decisions: Decisions
    pointers: Pointers  # of the same rows

    @property
    def outcomes(self) -> Tensor:
        """(B,) int8."""
        followed = (self.pointers.counts > 0).to(torch.int8) * FOLLOWED
        return torch.where(self.decisions.search, SEARCHED, followed).to(torch.int8)


def ask(source: Source, keys: Tensor, context: Context | None, walks: Sequence[Walk]) -> Asked:
    """Look the pointers up and ask the gate.

    Args:
        keys: (B, D) float32.
        walks: B of them.
    Raises: KnnlmError: the datastore could not be read.
    """
    width = max(1, max(len(walk.pointers) for walk in walks))
    ids = np.full((len(walks), width), -1, np.int64)
    for row, walk in enumerate(walks):
        ids[row, : len(walk.pointers)] = walk.pointers
    found = source.datastore.lookup(keys, torch.from_numpy(ids), exclude=source.exclude)
    neighbors = Neighbors(*(column.to(keys.device) for column in found))
    history = torch.tensor(
        [(math.log1p(walk.nearest) if walk.nearest >= 0 else -1.0, walk.steps, walk.hit) for walk in walks],
        dtype=torch.float64,
        device=keys.device,
    )
    tau = torch.full((len(walks),), source.knn_temperature, device=keys.device)
    pointers = Pointers(neighbors, neighbor_log_weights(neighbors, tau), history)
    return Asked(source.gate(keys, context, pointers), pointers)


def advance(
    walks: Sequence[Walk], outcomes: Sequence[int], neighbors: Neighbors, tokens: Sequence[int], datastore: Searchable
) -> list[Walk]:
    """The walks of B rows after their tokens came.

    Args:
        outcomes: B of them.
        neighbors: (B, K), nearest first: what was found for the rows that were searched, the pointers of those that
            followed; what it holds for others is ignored.
        tokens: B of them.
    Raises: KnnlmError: the datastore could not be read.
    """
    ids, distances, values = (column.cpu().numpy() for column in neighbors)
    came = np.asarray(tokens, np.int64)[:, None]
    used = np.asarray(outcomes)[:, None] != SKIPPED
    holds = used & (ids >= 0) & (values == came)
    row, column = np.nonzero(holds & (holds.cumsum(axis=1) <= MAX_POINTERS))
    following = datastore.next_entry(torch.from_numpy(ids[row, column])).numpy()
    row, following = row[following >= 0], following[following >= 0]
    ends = np.cumsum(np.bincount(row, minlength=len(walks)))
    advanced = []
    for i, (walk, outcome) in enumerate(zip(walks, outcomes, strict=True)):
        steps = 0 if outcome == SEARCHED else min(walk.steps + 1, _MAX_STEPS)
        if outcome == SKIPPED:  # what was seen last stays the last that was seen
            advanced.append(Walk(_NOTHING, walk.nearest, steps, -1.0))
        elif ids[i, 0] < 0:
            advanced.append(Walk(_NOTHING, -1.0, steps, -1.0))
        else:
            pointers = following[ends[i - 1] if i else 0 : ends[i]]
            advanced.append(Walk(pointers, float(distances[i, 0]), steps, float(values[i, 0] == tokens[i])))
    return advanced
