"""One HTTP request that scores: its engine request, its search for overlaps, and the texts that are done."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from knnlm_core.datastore.overlap import longest_matches
from knnlm_core.errors import KnnlmError
from knnlm_core.walks import FOLLOWED, SEARCHED, SKIPPED
from knnlm_core.windows import WindowSizes
from knnlm_server.api.checkpoint import Checkpoint
from knnlm_server.api.engine_call import EngineCall
from knnlm_server.api.score_inputs import TextToScore
from knnlm_server.api.selection import Selection
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.state import Backend
from knnlm_server.engine.scoring import ScoreRequest, TokenScores, no_scores
from knnlm_server.telemetry.record import WorkReport

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OUTCOMES = {SEARCHED: "searched", FOLLOWED: "followed", SKIPPED: "skipped"}


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """What to score.

    Attributes:
        overlap: also look for the longest match of each token in the datastore, of which there must be one.
        attribution: also find out which entries the tokens' probabilities came from.
    """

    texts: Sequence[TextToScore]
    windows: WindowSizes
    overlap: bool
    attribution: bool
    request_id: str


class ScoredText(NamedTuple):
    """A text that is done, and its position in the plan."""

    position: int
    scores: TokenScores
    longest_match: NDArray[np.uint8] | None  # of the scored tokens


class Progress(NamedTuple):
    """How far a job has come; tokens are those to be scored."""

    texts: int
    texts_done: int
    tokens: int
    tokens_done: int


class ScoreJob:
    """Submits a plan and hands out its texts as they are done; owns the lease's first share.

    Lives on the event loop. A text waits for its scores and, where overlaps are wanted, for those of all texts.

    Raises: Overloaded, ShuttingDown: the engine does not take it; nothing runs then, and the share is the caller's.
    """

    def __init__(self, backend: Backend, selection: Selection, lease: SharedLease, plan: ScorePlan) -> None:
        self.selection = selection
        self._labels = selection.labels  # now: when all is over, a datastore may be closed
        self.plan = plan
        self._lease = lease
        self._threads = backend.threads
        self._call = EngineCall(backend.engine, lease, self._ended)
        self._scored = [index for index, text in enumerate(plan.texts) if text.num_scored]
        self._num_tokens = sum(text.num_scored for text in plan.texts)
        self._request = ScoreRequest(
            request_id=plan.request_id,
            texts=[plan.texts[index].token_ids for index in self._scored],
            retrieval=selection.retrieval,
            window=plan.windows.window,
            stride=plan.windows.stride,
            on_text=lambda position, scores: self._call.report(self._take, self._scored[position], scores),
            on_end=self._call.end,
            own=[plan.texts[index].own for index in self._scored],
            attribute=plan.attribution,
            firsts=[plan.texts[index].first for index in self._scored],
        )
        self._ready: deque[tuple[int, TokenScores]] = deque()
        self._matches: list[NDArray[np.uint8]] | None = None
        self._num_done = 0
        self._error: KnnlmError | None = None
        self._retrievals = dict.fromkeys(_OUTCOMES, 0)
        self._changed = asyncio.Event()
        self._is_open = True
        self._checkpoint = Checkpoint()
        self._ready.extend((index, no_scores()) for index, text in enumerate(plan.texts) if not text.num_scored)
        if self._scored:
            self._call.submit(self._request)
        self._search = asyncio.ensure_future(self._find_overlaps()) if plan.overlap else None

    def _take(self, index: int, scores: TokenScores) -> None:
        for outcome in self._retrievals:
            self._retrievals[outcome] += int((scores.outcomes == outcome).sum())
        self._ready.append((index, scores))
        self._changed.set()

    def _ended(self, error: KnnlmError | None) -> None:
        self._error = self._error or error
        self._changed.set()

    async def _find_overlaps(self) -> None:
        try:
            self._matches = await self._lease.in_thread(self._longest_matches, executor=self._threads.overlap)
        except KnnlmError as error:
            self._ended(error)
        except Exception:
            logger.exception("overlap failed request=%s", self.plan.request_id)
            self._ended(KnnlmError("internal error"))
        else:
            self._ended(None)

    def _longest_matches(self) -> list[NDArray[np.uint8]]:
        """On a thread; ends early once the job is closed."""
        texts, retrieval = self.plan.texts, self.selection.retrieval
        assert retrieval is not None
        (datastore,) = self.selection.stores
        self._checkpoint()  # the client may have left while this waited for its turn
        return longest_matches(
            datastore,
            [text.token_ids for text in texts],
            exclude=retrieval.only.exclude,
            own=[text.own for text in texts],
            checkpoint=self._checkpoint,
        )

    @property
    def progress(self) -> Progress:
        """How far it has come by now."""
        return Progress(len(self.plan.texts), self._num_done, self._num_tokens, self._request.tokens_done)

    def report(self) -> WorkReport:
        """For log, metrics and spans; at any time. What was done for the tokens is known text by text."""
        retrievals = {name: self._retrievals[outcome] for outcome, name in _OUTCOMES.items()}
        return WorkReport(
            model=self.selection.model,
            datastores=self._labels,
            prompt_tokens=0,
            tokens=self._request.tokens_done,
            retrievals=retrievals if self.selection.retrieval is not None else {},
            working="score",
            timelines=[self._request.timeline],
            error=None if self._error is None else self._error.code,
        )

    async def texts(self, tick_s: float | None = None) -> AsyncIterator[ScoredText | None]:
        """Each text once, as soon as it is done, in any order; None when ``tick_s`` seconds have passed without one.

        Raises: KnnlmError: what made it fail.
        """
        while self._num_done < len(self.plan.texts):
            if self._error is not None:
                raise self._error
            if self._ready and (self._matches is not None or not self.plan.overlap):
                index, scores = self._ready.popleft()
                self._num_done += 1
                first = self.plan.texts[index].first
                yield ScoredText(index, scores, None if self._matches is None else self._matches[index][first:])
                continue
            self._changed.clear()
            try:
                async with asyncio.timeout(tick_s):
                    await self._changed.wait()
            except TimeoutError:
                yield None

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Call a function on a thread that may read the datastores until it returns."""
        return await self._lease.in_thread(function, executor=self._threads.reading)

    def close(self) -> None:
        """End what still runs and give the lease's share back; closing again does nothing."""
        if self._is_open:
            self._is_open = False
            self._checkpoint.close()
            self._call.abort()
            self._lease.drop()
