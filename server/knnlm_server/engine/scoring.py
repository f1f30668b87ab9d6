"""Scoring a batch of texts by rolling windows: each token once, base and mixed side by side, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from time import perf_counter
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
from knnlm_core.mixture import Found, Timings, mix_targets, start_walks
from knnlm_core.replay import Run, replay
from knnlm_core.retrieval import NEIGHBORS_AT_ONCE, Retrieval
from knnlm_core.types import EntryRange
from knnlm_core.walks import FOLLOWED, SEARCHED, SKIPPED, Walks
from knnlm_server.engine.attribution import Attributions, attribute, join
from knnlm_server.engine.mixing import wait_for
from knnlm_server.engine.window_queue import WindowOfText, WindowQueue
from knnlm_server.engine.window_work import Searches
from knnlm_server.telemetry.timeline import Timeline

# Many rows at once are searched much faster than few: they wait for each other, up to this many.
ROWS_AT_ONCE = 8192
# Where gates follow, rows are walked over one by one, up to a millisecond each, and nothing else runs meanwhile.
ROWS_WHILE_WALKING = 1024

TokenIds = Sequence[int] | NDArray[np.int32]


class TokenScores(NamedTuple):
    """Log-probabilities (natural log) of the scored tokens of a text."""

    base: NDArray[np.float32]
    mixed: NDArray[np.float32]
    lmbda: NDArray[np.float64]
    outcomes: NDArray[np.int8]  # what was done for each: SKIPPED, SEARCHED or FOLLOWED
    attribution: Attributions | None = None  # where it was asked for

    @property
    def columns(self) -> tuple[NDArray[Any], ...]:
        """One row per token each."""
        return self.base, self.mixed, self.lmbda, self.outcomes

    @property
    def searched(self) -> NDArray[np.bool_]:
        """Whether any datastore was searched, of each."""
        searched: NDArray[np.bool_] = self.outcomes == SEARCHED
        return searched

    @property
    def followed(self) -> NDArray[np.bool_]:
        """Whether pointers were followed instead, of each."""
        followed: NDArray[np.bool_] = self.outcomes == FOLLOWED
        return followed


def no_scores(count: int = 0) -> TokenScores:
    """Of ``count`` tokens that are still to be scored."""
    base, mixed = (np.zeros(count, np.float32) for _ in range(2))
    return TokenScores(base, mixed, np.zeros(count), np.zeros(count, np.int8))


@dataclass(slots=True)
class _TextInWork:
    token_ids: NDArray[np.int32]
    retrieval: Retrieval | None
    scores: TokenScores
    first: int
    targets_left: int
    walks: Walks
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
        firsts: per text, the position of the first token to score; 1 where it is not said. Gates that follow begin
            there, as they do where a prompt ends.
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
    firsts: Sequence[int] | None = None
    timeline: Timeline = field(default_factory=Timeline)
    kind: ClassVar[str] = "score"  # as metrics call it
    tokens_done: int = field(init=False, default=0)
    _queue: WindowQueue = field(init=False)
    _encoded: list[_Encoded] = field(init=False, default_factory=list)
    _in_work: dict[int, _TextInWork] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        lengths = [len(token_ids) for token_ids in self.texts]
        self._queue = WindowQueue(lengths, self.window, self.stride, self.firsts)

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
        begun = perf_counter()
        self.encode(lm, self.take(token_budget))
        forward_seconds = perf_counter() - begun
        self.timeline.prefill.add(forward_seconds, None)
        wanted = ROWS_WHILE_WALKING if start_walks(self.retrieval) else ROWS_AT_ONCE
        enough = self.retrieval is None or sum(len(part.targets) for part in self._encoded) >= wanted
        searches = self.mix() if enough or self._queue.is_empty else Searches(0, 0, 0)
        return searches._replace(forward_seconds=forward_seconds)

    def take(self, token_budget: int) -> list[WindowOfText]:
        """The next windows, at least one, of together at most ``token_budget`` padded tokens if possible."""
        taken = self._queue.take(token_budget)
        for index in {index for index, _ in taken}.difference(self._in_work):
            first = self.firsts[index] if self.firsts is not None else 1
            count = len(self.texts[index]) - first
            retrieval = self._retrieval_of(index)
            self._in_work[index] = _TextInWork(
                np.asarray(self.texts[index], np.int32),
                retrieval,
                no_scores(count),
                first,
                count,
                start_walks(retrieval),
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
        wait_for(base)
        self._encoded.append(_Encoded(taken, rows.keys, targets, base, context))
        self.tokens_done += len(targets)

    def mix(self) -> Searches:
        """Mix what was encoded and report the texts that it completes."""
        taken = [item for part in self._encoded for item in part.taken]
        keys, targets, base = (torch.cat(column) for column in list(zip(*self._encoded, strict=True))[1:4])
        contexts = [part.context for part in self._encoded if part.context is not None]
        context = join_contexts(contexts) if contexts else None
        self._encoded.clear()
        owners = [self._in_work[index] for index, w in taken for _ in range(w.num_targets)]
        scores, timings = _mix(keys, targets, base, owners, context, self.attribute)
        if self.retrieval is not None:  # before anybody is told that a text is done
            self.timeline.prefill.add_mixing(timings)
        start = 0
        for index, window in taken:
            work = self._in_work[index]
            into = slice(window.first_target - work.first, window.end - work.first)
            work.put(into, _part(scores, start, start + window.num_targets))
            start += window.num_targets
            if not work.targets_left:
                del self._in_work[index]
                self.on_text(index, work.finished())
        if self.retrieval is None:
            return Searches(0, 0, 0)
        searched, followed, skipped = (int((scores.outcomes == done).sum()) for done in (SEARCHED, FOLLOWED, SKIPPED))
        return Searches(searched, followed, skipped, timings=timings)


def _mix(
    keys: Tensor,
    targets: Tensor,
    base: Tensor,
    owners: Sequence[_TextInWork],
    context: Context | None,
    attributed: bool,
) -> tuple[TokenScores, Timings]:
    """Scores of known tokens: (R, D) keys, (R,) targets and their log p_lm, and the text that each row is of.

    The rows of a text are in the order of its tokens; its walks move on.
    """
    retrievals = [owner.retrieval for owner in owners]
    parts, attributions, timings = [], [], Timings()
    step = NEIGHBORS_AT_ONCE // max((retrieval.k for retrieval in retrievals if retrieval is not None), default=1)
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        known = context.take(here) if context is not None else None
        found = _find(keys[here], targets[here], owners[here], known)
        begun = perf_counter()
        log_probs = mix_targets(base[here], targets[here], found)
        seconds = found.timings.plus(mix=perf_counter() - begun)
        timings = timings.plus(*seconds)
        outcomes = torch.where(found.searched, SEARCHED, torch.where(found.followed, FOLLOWED, SKIPPED))
        parts.append((log_probs, found.lmbda, outcomes.to(torch.int8)))
        if attributed:
            attributions.append(attribute(found, targets[here], base[here]))
    mixed, lmbda, done = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    scores = TokenScores(base.cpu().numpy(), mixed, lmbda, done, join(attributions) if attributions else None)
    return scores, timings


def _find(keys: Tensor, targets: Tensor, owners: Sequence[_TextInWork], context: Context | None) -> Found:
    retrievals = [owner.retrieval for owner in owners]
    texts, runs, start = [], [], 0
    for _, rows in groupby(owners, key=id):
        stop = start + sum(1 for _ in rows)
        texts.append(owners[start])
        runs.append(Run(range(start, stop), owners[start].walks))
        start = stop
    replayed = replay(keys, targets, retrievals, context, runs)
    for text, walks in zip(texts, replayed.walks, strict=True):
        text.walks = walks
    return replayed.found


def _part(scores: TokenScores, start: int, stop: int) -> TokenScores:
    base, mixed, lmbda, outcomes = (column[start:stop] for column in scores.columns)
    attribution = scores.attribution.part(start, stop) if scores.attribution is not None else None
    return TokenScores(base, mixed, lmbda, outcomes, attribution)
