"""The engine's loop: one thread owns the language model; everybody else sends it commands."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from knnlm_core.errors import EngineFailure, KnnlmError, Overloaded, RequestCancelled, ShuttingDown
from knnlm_core.lm.head import LOGIT_ELEMENTS_PER_CHUNK
from knnlm_core.lm.protocol import CausalLM
from knnlm_server.engine.accounting import count_step, requests_of
from knnlm_server.engine.events import Failed, Finished, TokenEvent
from knnlm_server.engine.next_tokens import NextToken, StepFailure
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.scheduler import Scheduler
from knnlm_server.engine.speculation import Speculator
from knnlm_server.engine.step import Outcome, PromptRead, PromptScores, run_step
from knnlm_server.engine.window_work import WindowWork
from knnlm_server.telemetry.metrics import EngineMetrics

logger = logging.getLogger(__name__)

Request = CompletionRequest | WindowWork


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of the engine.

    Attributes:
        step_tokens: tokens of decoding, prefill and drafts per step.
        score_tokens: padded tokens per scoring pass while nothing is being generated.
        draft_tokens: tokens of one draft at most; 0 for no drafts.
        max_queued: requests that may wait; one more is refused.
        check_integrity: verify the bookkeeping after every step; for tests.
    """

    step_tokens: int = 512
    score_tokens: int = 4096
    draft_tokens: int = 8
    max_queued: int = 256
    check_integrity: bool = False


class Load(NamedTuple):
    """How busy the engine is, in requests; those that only look up neighbours count as scoring."""

    running: int
    waiting: int
    scoring: int


class Engine:
    """Continuous batching over a `CausalLM`, with retrieval mixed in for the rows that ask for it.

    `submit`, `abort` and `load` may be called from any thread; every accepted request gets exactly one end.
    """

    def __init__(self, lm: CausalLM, eos_token_ids: Iterable[int], config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.metrics = EngineMetrics()
        self._lm = lm
        self._eos = tuple(eos_token_ids)
        self._scheduler = Scheduler(lm.num_sequences, self.config.step_tokens, self._begin_prompt)
        self._speculator = Speculator(
            self.config.draft_tokens, LOGIT_ELEMENTS_PER_CHUNK // lm.identity.vocab_size, self.config.step_tokens
        )
        self._scoring: deque[WindowWork] = deque()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._accepted: set[Request] = set()  # submitted and not yet ended
        self._closing = False
        self._dead = False
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises, and then neither `emit` nor `on_end` is ever called:
            Overloaded: the queue is full.
            EngineFailure: the engine has died.
            ShuttingDown: no request is taken any more.
            InvalidParameter: more choices than sequences.
        """
        try:
            self._admit(request)
        except KnnlmError as error:
            self.metrics.of_requests.rejected.labels(error.code).inc()
            raise

    def _admit(self, request: Request) -> None:
        if isinstance(request, CompletionRequest):
            self._scheduler.check(request)
        with self._lock:
            if self._dead:
                raise EngineFailure("the engine has died; the log says why")
            if self._closing:
                raise ShuttingDown("the server is shutting down")
            limit = self.max_requests
            if len(self._accepted) >= limit:
                raise Overloaded(f"at most {limit} requests are handled at once, running and queued; try again later")
            self._accepted.add(request)
            # Under the lock, so that `stop` never ends what has not begun.
            self._commands.put(lambda: self._begin(request))

    def abort(self, request: Request) -> None:
        """End a request now if it has not ended; its owner is told RequestCancelled."""
        self._commands.put(lambda: self._end(request, RequestCancelled("the request was cancelled")))

    def load(self) -> Load:
        """A glance at the queues."""
        return Load(len(self._scheduler.running), len(self._scheduler.waiting), len(self._scoring))

    @property
    def max_requests(self) -> int:
        """Requests that can be accepted at once, running and queued."""
        return self.config.max_queued + self._lm.num_sequences

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def stop(self, drain_timeout_s: float) -> None:
        """Take no more requests, wait for those under way, cancel what is left after the timeout."""
        with self._lock:
            self._closing = True
            self._ended.wait_for(lambda: not self._accepted, timeout=drain_timeout_s)
            left = list(self._accepted)
        for request in left:
            self._commands.put(lambda r=request: self._end(r, ShuttingDown("the server shut down")))  # type: ignore[misc]
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                self._generate()
                self._score()
                if self.config.check_integrity:
                    self._scheduler.check_integrity()
        except BaseException:
            self._die()
            raise

    def _die(self) -> None:
        """A defect of ours ends the thread: nobody may be left waiting."""
        logger.critical("engine dies accepted=%d", len(self._accepted), exc_info=True)
        with self._lock:
            self._closing = self._dead = True
            left, self._accepted = self._accepted, set()
            self._ended.notify_all()
        for request in left:
            with suppress(Exception):
                _tell(request, EngineFailure("the engine has died"))

    def _obey(self) -> bool:
        """Carry out waiting commands; with nothing else to do, wait for one. False to stop."""
        while True:
            is_idle = not (self._scheduler.has_work() or self._scoring)
            try:
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _begin(self, request: Request) -> None:
        if isinstance(request, CompletionRequest):
            self._scheduler.add(request)
        else:
            self._scoring.append(request)

    def _generate(self) -> None:
        """Schedule, run, emit. A step that fails takes its own requests with it and nothing else."""
        batch = self._scheduler.next_batch()
        if not batch.chunks and not batch.decodes:
            return
        speculator, before = self._speculator, [len(decode.choice.token_ids) for decode in batch.decodes]
        try:
            batch = speculator.draft(batch, self._eos)
            step = run_step(self._lm, batch, self._eos, speculator.most > 0)
            count_step(self.metrics.of_passes, batch, step)
            for chunk in batch.chunks:
                if chunk.is_last:  # before anything can free the sequence
                    self._keep(chunk.request, chunk.request.choices[0])
            # All of them before one can end its request: what lies behind it was done too.
            for outcome in step.outcomes:
                self._count_decisions(outcome)
            for outcome in step.outcomes:
                self._take(outcome)
            speculator.learn_cost(batch, step.pass_seconds, step.draw_seconds)
            for decode, count in zip(batch.decodes, before, strict=True):
                speculator.learn(decode.choice, decode.choice.token_ids[count:])
        except Exception as error:
            requests = requests_of(batch)
            logger.exception("step failed requests=%s", ",".join(request.request_id for request in requests))
            self._fail(requests, error)

    def _begin_prompt(self, request: CompletionRequest) -> int:
        """Give a prompt its sequence; returns how many tokens of it the prefix cache spares."""
        self.metrics.of_requests.count_start(request.kind, request.timeline)
        sequence = request.choices[0].sequence = self._lm.allocate()
        if request.prompt_logprobs is None:  # a prompt to be scored needs all its rows
            try:
                # The last token is always read: its row gives the first token of the completion.
                request.num_cached = self._lm.reuse_prefix(sequence, request.prompt_ids[:-1])
            except Exception:  # such as no memory left: the prompt can still be read
                request.timeline.context.run(logger.exception, "prefix cache not read request=%s", request.request_id)
        return request.num_cached

    def _keep(self, request: CompletionRequest, choice: Choice) -> None:
        assert choice.sequence is not None
        try:
            self._lm.keep_prefix(choice.sequence, [*request.prompt_ids, *choice.token_ids])
        except Exception:  # the answer does not need it
            request.timeline.context.run(logger.exception, "prefix not kept request=%s", request.request_id)

    def _take(self, outcome: Outcome) -> None:
        request = outcome.request
        if isinstance(outcome, StepFailure):
            run, message = request.timeline.context.run, outcome.error.message
            run(logger.error, "search failed request=%s %s", request.request_id, message)
            self._end(request, outcome.error)
        elif isinstance(outcome, PromptScores):
            request.emit(outcome.event)
        elif isinstance(outcome, PromptRead):
            self._end(request)
        else:
            self._emit(outcome)

    def _emit(self, token: NextToken) -> None:
        request, choice = token.request, token.choice
        if choice.finish_reason is not None:  # by a token before it in the same draft
            return
        self._time_token(request, choice)
        request.counts.drafted += token.drafted
        request.counts.accepted += token.was_drafted
        if token.drafted:
            self.metrics.drafted_tokens.inc(token.drafted)
        if token.was_drafted:
            self.metrics.accepted_tokens.inc()
        offset = choice.num_chars
        text, finish_reason = choice.advance(token.token_id, request.params, self._eos)
        request.emit(
            TokenEvent(
                choice.index, token.token_id, text, offset, token.log_prob, token.top, token.trace, finish_reason
            )
        )
        if finish_reason is None:
            return
        self._keep(request, choice)  # a conversation goes on from here
        self._free(request, [choice.index])
        if not request.live_choices:
            self._end(request)

    def _time_token(self, request: CompletionRequest, choice: Choice) -> None:
        now = time.monotonic()
        if choice.token_ids:
            self.metrics.between_tokens.observe(now - choice.last_token_s)
        elif choice.index == 0:
            request.timeline.first_token_s = now
            self.metrics.first_token.observe(now - request.timeline.submitted_s)
        choice.last_token_s = now
        self.metrics.generation_tokens.inc()

    def _count_decisions(self, outcome: Outcome) -> None:
        """Take into account for how many tokens datastores were searched, kept or not."""
        if not isinstance(outcome, PromptScores | NextToken) or outcome.request.retrieval is None:
            return
        counts, (searched, followed) = outcome.request.counts, outcome.decided
        skipped = (1 if isinstance(outcome, NextToken) else len(outcome.event.log_probs)) - searched - followed
        counts.searched += searched
        counts.followed += followed
        counts.skipped += skipped
        self.metrics.count_retrievals(searched, followed, skipped)

    @torch.inference_mode()
    def _score(self) -> None:
        """One pass of a request that works in whole windows, each in turn; a single window while others generate."""
        if not self._scoring:
            return
        request = self._scoring[0]
        self._scoring.rotate(-1)
        budget = 1 if self._scheduler.has_work() else self.config.score_tokens
        if request.timeline.begun_s is None:
            self.metrics.of_requests.count_start(request.kind, request.timeline)
        try:
            searches = request.run(self._lm, budget)
        except Exception as error:
            run = request.timeline.context.run
            run(logger.exception, "pass failed kind=%s request=%s", request.kind, request.request_id)
            self._fail([request], error)
            return
        self.metrics.count_retrievals(*searches[:3])
        if searches.forward_seconds:
            self.metrics.of_passes.count_pass(request.kind, searches.forward_seconds, searches.timings)
        if request.is_done:
            self._end(request)

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        known = error if isinstance(error, KnnlmError) else EngineFailure("a step of the engine failed")
        for request in requests:
            self._end(request, known)

    def _free(self, request: CompletionRequest, choices: Iterable[int]) -> None:
        """Give the slots of choices that will generate no more back to the LM and to the scheduler."""
        for index in choices:
            sequence, request.choices[index].sequence = request.choices[index].sequence, None
            if sequence is not None:
                self._lm.free(sequence)
            self._scheduler.release_slot(request)

    def _end(self, request: Request, error: KnnlmError | None = None) -> None:
        """The one way out: slots, queue, owner, lease; a request that has ended already is left alone."""
        with self._lock:
            if request not in self._accepted:
                return
            self._accepted.remove(request)
            self._ended.notify_all()
        if isinstance(request, CompletionRequest):
            live = request.live_choices
            for choice in live:
                choice.finish_reason = "length"
            self._free(request, [choice.index for choice in live])
            self._scheduler.remove(request)
            self.metrics.of_requests.count_read(request.num_prefilled)
        else:
            self._scoring.remove(request)
        self.metrics.of_requests.count_end(request.kind, request.timeline, error.code if error else "finished")
        if isinstance(request, CompletionRequest) and error is None:
            generated = [len(choice.token_ids) for choice in request.choices]
            self.metrics.of_requests.count_completion(request.timeline, len(request.prompt_ids), generated)
        _tell(request, error)


def _tell(request: Request, error: KnnlmError | None) -> None:
    """Tell a request's owner that it has ended."""
    if not isinstance(request, CompletionRequest):
        request.on_end(error)
        return
    tokens = Finished(len(request.prompt_ids), request.num_generated)
    request.emit(Failed(error) if error else tokens)
    request.on_end()
