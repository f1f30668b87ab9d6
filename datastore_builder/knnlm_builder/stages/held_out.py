"""Gather evidence: held-out windows through the LM and one search each, cached for every fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_builder.progress import Reporter
from knnlm_builder.stages.encode import encode_windows
from knnlm_builder.stages.fit import Evidence
from knnlm_builder.stages.plan import Plan, PlannedDocument
from knnlm_core.lm.head import targets_and_signals
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.signals import LMSignals, join_signals
from knnlm_core.types import Neighbors

Search = Callable[[Tensor], Neighbors]

SEARCH_ROWS = 512
# Tokens drawn together in the bootstrap: neighbouring tokens are not independent.
BLOCK_TOKENS = 128


class Queries(NamedTuple):
    """Held-out tokens before any search: what the LM knows of them."""

    keys: Tensor  # (N, D)
    base: Tensor  # (N,) log p_lm of the token
    targets: Tensor  # (N,)
    blocks: Tensor  # (N,)
    documents: Tensor  # (N,) int64, position of the document in the list
    signals: LMSignals

    def take(self, rows: Tensor) -> Queries:
        """Some of the tokens."""
        columns = (column[rows] for column in self[:-1])
        return Queries(*columns, self.signals.take(rows))  # type: ignore[call-arg, arg-type]


def encode_held_out(
    lm: CausalLM,
    plan: Plan,
    documents: Sequence[PlannedDocument],
    *,
    batch_tokens: int,
    reporter: Reporter,
    title: str = "Encode held-out text",
) -> Queries:
    """Run held-out documents through the LM, each token once, with left context as at build and in scoring."""
    windows = [(d, w) for d in documents for w in plan.windows(d)]
    order = {id(document): i for i, document in enumerate(documents)}
    sizes = [-(-document.num_entries // BLOCK_TOKENS) for document in documents]
    first_block = [0, *accumulate(sizes)]
    columns: list[tuple[Tensor, ...]] = []
    signals: list[LMSignals] = []
    with reporter.stage(title, sum(w.num_targets for _, w in windows), "tokens") as advance:
        for part in encode_windows(lm, plan, windows, batch_tokens, advance):
            targets = torch.from_numpy(part.values.astype("int64"))
            count, document = len(targets), order[id(part.document)]
            positions = part.window.first_target - 1 + torch.arange(count)
            base, signals_here = targets_and_signals(lm, part.hidden, targets.to(part.hidden.device))
            signals.append(LMSignals(*(column.cpu() for column in signals_here)))
            columns.append(
                (
                    part.keys.cpu(),
                    base.cpu(),
                    targets,
                    first_block[document] + positions // BLOCK_TOKENS,
                    torch.full((count,), document),
                )
            )
    joined = [torch.cat(column) for column in zip(*columns, strict=True)]
    return Queries(*joined, join_signals(signals))  # type: ignore[call-arg, arg-type]


def search_all(queries: Queries, search: Search, reporter: Reporter, title: str = "Search held-out") -> Evidence:
    """One search per held-out token."""
    parts = []
    with reporter.stage(title, len(queries.keys), "tokens") as advance:
        for keys in torch.split(queries.keys, SEARCH_ROWS):
            parts.append(search(keys))
            advance(len(keys))
    neighbors = Neighbors(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return Evidence(queries.base, neighbors, queries.targets, queries.blocks, queries.signals)
