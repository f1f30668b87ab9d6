"""What a datastore would retrieve after some contexts, and what that makes of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm_core.errors import KnnlmError
from knnlm_core.knn.distribution import token_log_probs
from knnlm_core.knn.gates import Context
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.mixture import Found, find
from knnlm_core.retrieval import Retrieval
from knnlm_core.signals import lm_signals
from knnlm_server.engine.step import rows_at_once
from knnlm_server.engine.tracing import ranked
from knnlm_server.engine.window_work import Searches
from knnlm_server.telemetry.timeline import Timeline


class NearestEntries(NamedTuple):
    """The nearest entries of one context, nearest first; of several datastores in the order of `ranked`."""

    sources: NDArray[np.int64]  # (K,) which source of the retrieval
    entry_ids: NDArray[np.int64]  # (K,)
    distances: NDArray[np.float32]  # (K,) squared L2
    values: NDArray[np.int64]  # (K,) token ids
    weights: NDArray[np.float32]  # (K,) shares of p_knn


class NextTokens(NamedTuple):
    """The tokens with the largest p_knn after one context, largest first."""

    token_ids: NDArray[np.int64]  # (U,)
    p_knn: NDArray[np.float64]  # (U,)
    p_lm: NDArray[np.float64]  # (U,)
    p: NDArray[np.float64]  # (U,) of the mixture


class ContextNeighbors(NamedTuple):
    """What was found for one context; nothing at all where no entry may be found."""

    nearest: NearestEntries
    next_tokens: NextTokens


@dataclass(slots=True, eq=False)
class NeighborsRequest:
    """Contexts to search after; always searched, whatever the retrieval's gate would decide.

    Attributes:
        contexts: token ids, 1 … `CausalLM.max_length` each.
        limit: how many of the ``retrieval.k`` neighbours, and of the tokens that they hold, are handed out.
        on_context: called on the engine's thread with the context's position and what was found, in order.
        on_end: called exactly once when the request leaves the engine: with None, or with why it failed.
    """

    request_id: str
    contexts: Sequence[Sequence[int]]
    retrieval: Retrieval
    limit: int
    on_context: Callable[[int, ContextNeighbors], None]
    on_end: Callable[[KnnlmError | None], None]
    timeline: Timeline = field(default_factory=Timeline)
    kind: ClassVar[str] = "neighbors"  # as metrics call it
    _num_done: int = field(init=False, default=0)

    @property
    def is_done(self) -> bool:
        """Whether every context has been searched after."""
        return self._num_done == len(self.contexts)

    def run(self, lm: CausalLM, token_budget: int) -> Searches:
        """Search after the next contexts. Raises KnnlmError: the datastore could not be searched."""
        first = self._num_done
        taken = self._take(token_budget, most=rows_at_once(lm, self.retrieval))
        for position, found in enumerate(find_neighbors(lm, taken, self.retrieval, self.limit), start=first):
            self.on_context(position, found)
        self._num_done += len(taken)
        return Searches(len(taken), followed=0, skipped=0)

    def _take(self, token_budget: int, most: int) -> Sequence[Sequence[int]]:
        left = self.contexts[self._num_done : self._num_done + most]
        count = widest = 0
        for context in left:
            widest = max(widest, len(context))
            if count and widest * (count + 1) > token_budget:
                break
            count += 1
        return left[:count]


def find_neighbors(
    lm: CausalLM, contexts: Sequence[Sequence[int]], retrieval: Retrieval, limit: int
) -> list[ContextNeighbors]:
    """Search after the last token of each context.

    Raises: KnnlmError: the datastore could not be searched.
    """
    rows = lm.encode(contexts, [len(context) - 1 for context in contexts])
    lm_log_probs = torch.log_softmax(lm.logits(rows.hidden), dim=1)  # (B, V)
    positions = torch.tensor([len(context) for context in contexts], device=rows.keys.device)
    known = Context(lm_signals(lm_log_probs), positions)
    found = find(rows.keys, [retrieval] * len(contexts), known)
    for error in found.failures.values():
        raise error
    by_token = token_log_probs(found.neighbors.values, found.log_weights)
    log_probs, at = by_token.log_probs.topk(min(limit, by_token.log_probs.shape[1]), dim=1)
    token_ids = by_token.token_ids.gather(1, at)  # (B, U)
    p_lm = lm_log_probs.gather(1, token_ids).double().exp().cpu().numpy()
    p_knn = log_probs.double().exp().cpu().numpy()
    lmbda = found.lmbda.cpu().numpy()[:, None]
    columns = (token_ids.cpu().numpy(), p_knn, p_lm, lmbda * p_knn + (1 - lmbda) * p_lm)
    nearest = _nearest(found, ranked(found, retrieval.fusion)[:, :limit])
    return [
        ContextNeighbors(nearest[row], NextTokens(*(column[row][p_knn[row] > 0] for column in columns)))
        for row in range(len(contexts))
    ]


def _nearest(found: Found, order: torch.Tensor) -> list[NearestEntries]:
    """The neighbours of each row in some order (B, L); missing ones are left out."""
    sources = found.sources.expand(found.log_weights.shape)
    weights = found.log_weights.exp()
    columns = [c.gather(1, order).cpu().numpy() for c in (sources, *found.neighbors, weights)]
    present = columns[1] >= 0
    return [NearestEntries(*(column[row][present[row]] for column in columns)) for row in range(len(order))]
