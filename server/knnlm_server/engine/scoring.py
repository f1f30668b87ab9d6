"""Scoring a batch of texts by rolling windows: each token once, base and mixed side by side, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm_core.datastore.exclusion import merge_ranges
from knnlm_core.errors import KnnlmError
from knnlm_core.knn.gates import Context, join_contexts
from knnlm_core.lm.head import log_probs_of_targets, targets_and_signals
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.mixture import mix_targets
from knnlm_core.retrieval import NEIGHBORS_AT_ONCE, Retrieval
from knnlm_core.types import EntryRange
from knnlm_server.engine.attribution import Attributions, attribute, join
from knnlm_server.engine.window_queue import WindowOfText, WindowQueue
from knnlm_server.engine.window_work import Searches

# Many rows at once are searched much faster than few: they wait for each other, up to this many.
ROWS_AT_ONCE = 8192

TokenIds = Sequence[int] | NDArray[np.int32]


class TokenScores(NamedTuple):
    """Log-probabilities (natural log) of the scored tokens of a text, position 1 onwards; T − 1 of each."""

    base: NDArray[np.float32]
    mixed: NDArray[np.float32]
    lmbda: NDArray[np.float64]
    searched: NDArray[np.bool_]
    attribution: Attributions | None = None  # where it was asked for

    @property
    def columns(self) -> tuple[NDArray[Any], ...]:
        """One row per token each."""
        return self.base, self.mixed, self.lmbda, self.searched


def no_scores(count: int = 0) -> TokenScores:
    """Of ``count`` tokens that are still to be scored."""
    base, mixed = (np.zeros(count, np.float32) for _ in range(2))
    return TokenScores(base, mixed, np.zeros(count), np.zeros(count, np.bool_))


@dataclass(slots=True)
class _TextInWork:
    token_ids: NDArray[np.int32]
    retrieval: Retrieval | None
    scores: TokenScores
    targets_left: int
    attributions: list[Attributions] = field(default_factory=list)

    def put(self, into: slice, scores: TokenScores) -> None:
        """Fill in some tokens, those after the ones before."""
        for whole, part in zip(self.scores.columns, scores.columns, strict=True):
            whole[into] = part
        if scores.attribution is not None:
            self.attributions.append(scores.attribution)
        self.targets_left -= into.stop - into.start

    def finished(self) -> TokenScores:
        """All of them."""
        return self.scores._replace(attribution=join(self.attributions)) if self.attributions else self.scores


class _Encoded(NamedTuple):
    """Windows that the LM has seen and that are still to be mixed; R rows in all."""

    taken: Sequence[WindowOfText]
    keys: Tensor  # (R, D)
    targets: Tensor  # (R,) token ids
    base: Tensor  # (R,) log p_lm of the targets
    context: Context | None  # where the retrieval looks at it


@dataclass(slots=True, eq=False)
class ScoreRequest:
    """A batch of tokenised texts to score.

    Attributes:
        texts: token ids, at least two each; position 0 is context only.
        window, stride: in tokens, see `rolling_windows`.
        on_text: called on the engine's thread when a text is done, in the order of completion.
        on_end: called exactly once when the request leaves the engine: with None, or with why it failed.
        own: per text, entries that only this text must not find, such as those that it made itself; for a retrieval
            from one datastore.
        attribute: also say which entries each token's probability came from.
        tokens_done: seen by the LM so far; any thread may look.
    """

    request_id: str
    texts: Sequence[TokenIds]
    retrieval: Retrieval | None
    window: int
    stride: int
    on_text: Callable[[int, TokenScores], None]
    on_end: Callable[[KnnlmError | None], None]
    own: Sequence[EntryRange | None] | None = None
    attribute: bool = False
    submitted_s: float = field(default_factory=time.monotonic)
    kind: ClassVar[str] = "score"  # as metrics call it
    tokens_done: int = field(init=False, default=0)
    _queue: WindowQueue = field(init=False)
    _encoded: list[_Encoded] = field(init=False, default_factory=list)
    _in_work: dict[int, _TextInWork] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._queue = WindowQueue([len(token_ids) for token_ids in self.texts], self.window, self.stride)

    def _retrieval_of(self, index: int) -> Retrieval | None:
        own = self.own[index] if self.own is not None else None
        if self.retrieval is None or own is None:
            return self.retrieval
        source = self.retrieval.only
        return replace(self.retrieval, sources=(replace(source, exclude=merge_ranges([*source.exclude, own])),))

    @property
    def is_done(self) -> bool:
        """Whether every window has been scored."""
        return self._queue.is_empty and not self._in_work

    def run(self, lm: CausalLM, token_budget: int) -> Searches:
        """Encode the next windows, and once many rows have come together, search for all of them and report.

        Raises: KnnlmError: a datastore could not be searched.
        """
        self.encode(lm, self.take(token_budget))
        enough = self.retrieval is None or sum(len(part.targets) for part in self._encoded) >= ROWS_AT_ONCE
        return self.mix() if enough or self._queue.is_empty else Searches(0, 0)

    def take(self, token_budget: int) -> list[WindowOfText]:
        """The next windows, at least one, of together at most ``token_budget`` padded tokens if possible."""
        taken = self._queue.take(token_budget)
        for index in {index for index, _ in taken}.difference(self._in_work):
            count = len(self.texts[index])
            self._in_work[index] = _TextInWork(
                np.asarray(self.texts[index], np.int32), self._retrieval_of(index), no_scores(count - 1), count - 1
            )
        return taken

    def encode(self, lm: CausalLM, taken: Sequence[WindowOfText]) -> None:
        """Run the LM over windows that `take` handed out."""
        cut = [self._in_work[index].token_ids[window.begin : window.end] for index, window in taken]
        firsts = [window.first_target - window.begin for _, window in taken]
        # The row at position t predicts token t + 1, so the last token is never an input.
        rows = lm.encode([ids[:-1].tolist() for ids in cut], [first - 1 for first in firsts])
        known = np.concatenate([ids[first:] for ids, first in zip(cut, firsts, strict=True)])
        targets = torch.from_numpy(known).to(rows.keys.device, torch.long)
        context = None
        if self.retrieval is not None and self.retrieval.needs_context:
            base, signals = targets_and_signals(lm, rows.hidden, targets)
            positions = np.concatenate([np.arange(window.first_target, window.end) for _, window in taken])
            context = Context(signals, torch.from_numpy(positions).to(base.device))
        else:
            base = log_probs_of_targets(lm, rows.hidden, targets)
        self._encoded.append(_Encoded(taken, rows.keys, targets, base, context))
        self.tokens_done += len(targets)

    def mix(self) -> Searches:
        """Mix what was encoded and report the texts that it completes."""
        taken = [item for part in self._encoded for item in part.taken]
        keys, targets, base = (torch.cat(column) for column in list(zip(*self._encoded, strict=True))[1:4])
        contexts = [part.context for part in self._encoded if part.context is not None]
        context = join_contexts(contexts) if contexts else None
        self._encoded.clear()
        retrievals = [self._in_work[index].retrieval for index, w in taken for _ in range(w.num_targets)]
        scores = _mix(keys, targets, base, retrievals, context, self.attribute)
        start = 0
        for index, window in taken:
            work = self._in_work[index]
            work.put(slice(window.first_target - 1, window.end - 1), _part(scores, start, start + window.num_targets))
            start += window.num_targets
            if not work.targets_left:
                del self._in_work[index]
                self.on_text(index, work.finished())
        searched = int(scores.searched.sum())
        return Searches(searched, skipped=start - searched if self.retrieval is not None else 0)


def _mix(
    keys: Tensor,
    targets: Tensor,
    base: Tensor,
    retrievals: Sequence[Retrieval | None],
    context: Context | None,
    attributed: bool,
) -> TokenScores:
    """Scores of known tokens from their rows: (R, D) keys, (R,) targets and their log p_lm, R retrievals."""
    parts, attributions = [], []
    step = NEIGHBORS_AT_ONCE // max((retrieval.k for retrieval in retrievals if retrieval is not None), default=1)
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        known = context.take(here) if context is not None else None
        log_probs, found = mix_targets(base[here], keys[here], targets[here], retrievals[here], known)
        parts.append((log_probs, found.lmbda, found.searched))
        if attributed:
            attributions.append(attribute(found, targets[here], base[here]))
    mixed, lmbda, searched = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return TokenScores(base.cpu().numpy(), mixed, lmbda, searched, join(attributions) if attributions else None)


def _part(scores: TokenScores, start: int, stop: int) -> TokenScores:
    base, mixed, lmbda, searched = (column[start:stop] for column in scores.columns)
    attribution = scores.attribution.part(start, stop) if scores.attribution is not None else None
    return TokenScores(base, mixed, lmbda, searched, attribution)
