"""The engine's promises: one end for every request, nothing left behind, the same answer in any company."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import Run, prompts, running_engine
from live_server import Brake, slowed, wait_until

from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import EngineFailure, InvalidParameter, Overloaded, RequestCancelled, ShuttingDown
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.retrieval import Retrieval, Source
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.events import Finished, TokenEvent
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.scoring import ScoreRequest

SLOTS = 4
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Engine, HuggingFaceLM]]:
    """One engine with few slots and small steps, so that requests queue and prompts come in chunks."""
    with running_engine("llama", slots=SLOTS, step_tokens=16) as running:
        yield running


def is_idle(engine: Engine, lm: HuggingFaceLM) -> bool:
    return not any(engine.load()) and lm.num_free_sequences == lm.num_sequences


class Scores:
    """A scoring request that remembers its end."""

    def __init__(self, texts: list[list[int]], retrieval: Retrieval | None = None) -> None:
        self.ends: list[Exception | None] = []
        self.done = threading.Event()
        self.request = ScoreRequest("test", texts, retrieval, 64, 32, lambda index, scores: None, self._end)

    def _end(self, error: Exception | None) -> None:
        self.ends.append(error)
        self.done.set()


# -- cancellation ----------------------------------------------------------------------------------------------------


def test_abort_frees_a_request_that_waits(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    ahead, waiting = Run(lm, [5] * 8, SamplingParams(n=SLOTS, max_tokens=5)), Run(lm, [6] * 8, GREEDY)
    with Brake(lm, allowed=2) as brake:
        engine.submit(ahead.request)
        engine.submit(waiting.request)
        brake.wait_held()
        engine.abort(waiting.request)
        brake.release()
        waiting.wait_end()
        assert isinstance(waiting.error, RequestCancelled)
        assert waiting.tokens() == []
        ahead.wait()
    wait_until(lambda: is_idle(engine, lm))
    assert (ahead.ends, waiting.ends) == (1, 1)


def test_abort_frees_a_request_in_prefill(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    run = Run(lm, [7] * 100, SamplingParams(n=3, max_tokens=5))
    with Brake(lm, allowed=2) as brake:
        engine.submit(run.request)
        brake.wait_held()  # 32 of 100 tokens are in the cache, 16 more on their way
        assert lm.num_free_sequences == SLOTS - 1
        engine.abort(run.request)
        brake.release()
        run.wait_end()
    assert isinstance(run.error, RequestCancelled)
    assert run.request.num_prefilled == 48
    assert run.tokens() == []
    wait_until(lambda: is_idle(engine, lm))
    assert run.ends == 1


def test_abort_frees_a_request_in_decode_at_once(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    run = Run(lm, [7] * 3, SamplingParams(n=2, max_tokens=200, ignore_eos=True))
    with Brake(lm, allowed=6) as brake:
        engine.submit(run.request)
        brake.wait_held()
        engine.abort(run.request)
        engine.abort(run.request)
        brake.release()
        run.wait_end()
    assert isinstance(run.error, RequestCancelled)
    assert len(run.tokens()) == 7  # the step that was under way was the last
    wait_until(lambda: is_idle(engine, lm))
    engine.abort(run.request)
    Run(lm, [7], GREEDY)
    wait_until(lambda: is_idle(engine, lm))
    assert run.ends == 1


def test_abort_ends_a_scoring_request_between_windows(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    scores = Scores([[3] * 250] * 200)
    engine.submit(scores.request)
    engine.abort(scores.request)
    assert scores.done.wait(30)
    assert [type(error) for error in scores.ends] == [RequestCancelled]
    wait_until(lambda: is_idle(engine, lm))


def test_fifty_aborts_at_any_moment_leave_nothing_behind(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    draw = np.random.default_rng(0)
    sampled = SamplingParams(n=1, max_tokens=60, temperature=1.0, ignore_eos=True)
    twice = SamplingParams(n=2, max_tokens=60, temperature=1.0, ignore_eos=True)
    runs = [Run(lm, prompt, twice if i % 3 == 0 else sampled) for i, prompt in enumerate(prompts(50))]
    kept = Run(lm, [9] * 30, GREEDY)
    alone = Run(lm, [9] * 30, GREEDY)
    for run in (*runs[:25], kept, *runs[25:]):
        engine.submit(run.request)
    for i in draw.permutation(50):
        runs[i].wait_end() if i % 10 == 0 else engine.abort(runs[i].request)
    for run in runs:
        run.wait_end()
    assert len(kept.wait().tokens()) == 10
    engine.submit(alone.request)
    assert kept.tokens() == alone.wait().tokens()
    wait_until(lambda: is_idle(engine, lm))
    assert [run.ends for run in runs] == [1] * 50
    assert Counter(type(run.error) for run in runs)[RequestCancelled] > 20


def test_scoring_requests_take_turns(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, _ = running
    long, short = Scores([[3] * 250] * 300), Scores([[4] * 30])
    engine.submit(long.request)
    engine.submit(short.request)
    assert short.done.wait(30)
    assert not long.done.is_set()
    engine.abort(long.request)
    assert long.done.wait(30)


# -- the same answer in any company ----------------------------------------------------------------------------------


def test_chunked_prefill_is_the_same_as_prefill_in_one_piece() -> None:
    long_prompts = [np.random.default_rng(i).integers(1, 400, 90 + i).tolist() for i in range(4)]
    answers = []
    for step_tokens in (512, 7, 1):
        with running_engine("llama", step_tokens=step_tokens) as (engine, lm):
            runs = [Run(lm, prompt, GREEDY) for prompt in long_prompts]
            for run in runs:
                engine.submit(run.request)
            answers.append([(run.wait().tokens(), run.log_probs()) for run in runs])
    whole, *chunked = answers
    for other in chunked:
        for (need, need_log_probs), (have, have_log_probs) in zip(whole, other, strict=True):
            assert have == need
            assert have_log_probs == pytest.approx(need_log_probs, abs=1e-4)


def test_choices_of_one_prompt_are_forks_of_one_prefill(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    prompt = prompts(1, seed=3)[0]
    greedy = Run(lm, prompt, SamplingParams(n=3, max_tokens=12, temperature=0, ignore_eos=True))
    sampled = Run(lm, prompt, SamplingParams(n=3, max_tokens=12, seed=4, ignore_eos=True))
    for run in (greedy, sampled):
        engine.submit(run.request)
    assert greedy.wait().tokens(0) == greedy.tokens(1) == greedy.tokens(2)
    assert len({tuple(sampled.wait().tokens(i)) for i in range(3)}) == 3
    for run in (greedy, sampled):
        for i in range(3):
            # Each choice's probabilities are those of its own text, read without a cache.
            ids = prompt + run.tokens(i)
            rows = lm.encode([ids[:-1]], [len(prompt) - 1])
            need = torch.log_softmax(lm.logits(rows.hidden), dim=1)[range(12), run.tokens(i)]
            assert run.log_probs(i) == pytest.approx(need.tolist(), abs=1e-3)


def test_a_batch_changes_no_result(law: Datastore, lm: HuggingFaceLM) -> None:
    retrieval = Retrieval((Source(law, k=8, knn_temperature=10.0, lmbda=0.5),))
    bigger = Retrieval((Source(law, k=40, knn_temperature=10.0, lmbda=0.5),))
    params = SamplingParams(max_tokens=12, seed=8, ignore_eos=True)
    with running_engine("llama", slots=8, step_tokens=64) as (engine, own):
        assert own.identity.model_fingerprint == lm.identity.model_fingerprint
        cases = [(prompt, (None, retrieval, bigger)[i % 3]) for i, prompt in enumerate(prompts(24, seed=5))]
        alone = []
        for prompt, how in cases:
            run = Run(own, prompt, params, how)
            engine.submit(run.request)
            alone.append(run.wait())
        together = [Run(own, prompt, params, how) for prompt, how in cases]
        for run in together:
            engine.submit(run.request)
        for run, need in zip(together, alone, strict=True):
            assert run.wait().tokens() == need.tokens()
            assert run.log_probs() == pytest.approx(need.log_probs(), abs=1e-4)


# -- failures --------------------------------------------------------------------------------------------------------


def test_more_choices_than_slots_are_refused(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    run = Run(lm, [1], SamplingParams(n=SLOTS + 1))
    with pytest.raises(InvalidParameter, match=r"`n` must be at most 4.* got 5"):
        engine.submit(run.request)
    assert (run.ends, run.events) == (0, [])


def test_one_request_too_many_is_refused_and_never_told_anything() -> None:
    with running_engine("llama", slots=1, max_queued=1) as (engine, lm):
        runs = [Run(lm, [5], GREEDY) for _ in range(3)]
        with Brake(lm) as brake:
            engine.submit(runs[0].request)
            engine.submit(runs[1].request)
            brake.wait_held()
            with pytest.raises(Overloaded, match="at most 2 requests"):
                engine.submit(runs[2].request)
            with pytest.raises(Overloaded):
                engine.submit(Scores([[1, 2]]).request)
            brake.release()
        for run in runs[:2]:
            run.wait()
        assert (runs[2].ends, runs[2].events) == (0, [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_leaves_nobody_waiting() -> None:
    def disturb() -> None:
        raise ValueError("an owner that must not raise does")

    with running_engine("llama", slots=2) as (engine, lm):
        runs = [Run(lm, [5], LONG) for _ in range(4)]
        bad, scores = Run(lm, [5], GREEDY), Scores([[1, 2, 3]] * 3)
        bad.request.on_end = disturb
        with Brake(lm) as brake:
            for request in (*(run.request for run in runs), bad.request, scores.request):
                engine.submit(request)
            brake.wait_held()
            engine.abort(bad.request)
            brake.release()
            for run in runs:
                run.wait_end()
        assert scores.done.wait(10)
        wait_until(lambda: not engine.is_alive)
        assert [(run.ends, type(run.error)) for run in runs] == [(1, EngineFailure)] * 4
        assert [type(error) for error in scores.ends] == [EngineFailure]
        with pytest.raises(EngineFailure, match="has died"):
            engine.submit(Run(lm, [5], GREEDY).request)


# -- stopping --------------------------------------------------------------------------------------------------------


def test_stop_lets_what_runs_and_waits_finish() -> None:
    with running_engine("llama", slots=2) as (engine, lm):
        runs, scores = [Run(lm, [5, 6], GREEDY) for _ in range(6)], Scores([[1, 2, 3] * 30] * 4)
        with Brake(lm) as brake:
            for run in runs:
                engine.submit(run.request)
            engine.submit(scores.request)
            brake.wait_held()
            stopping = threading.Thread(target=engine.stop, args=(30.0,))
            stopping.start()
            wait_until(lambda: engine._closing)
            with pytest.raises(ShuttingDown):
                engine.submit(Run(lm, [5], GREEDY).request)
            brake.release()
            stopping.join(30)
        assert not engine.is_alive
        for run in runs:
            assert len(run.wait().tokens()) == GREEDY.max_tokens
            assert run.ends == 1
        assert scores.ends == [None]


def test_stop_cancels_what_is_left_after_its_timeout() -> None:
    with running_engine("llama", slots=1) as (engine, lm), slowed(lm, 0.02):
        runs, scores = [Run(lm, [5, 6], LONG) for _ in range(3)], Scores([[1, 2, 3]])
        for run in runs:
            engine.submit(run.request)
        engine.submit(scores.request)
        wait_until(lambda: bool(runs[0].events))
        engine.stop(drain_timeout_s=0.1)
        assert not engine.is_alive
        assert [(run.ends, type(run.error)) for run in runs] == [(1, ShuttingDown)] * 3
        assert len(scores.ends) == 1
        assert lm.num_free_sequences == 1


@pytest.mark.parametrize("first", range(5))
def test_every_request_accepted_while_the_engine_stops_gets_exactly_one_end(first: int) -> None:
    with running_engine("llama", slots=2) as (engine, lm):
        runs = [Run(lm, [5, 6], GREEDY) for _ in range(60)]
        accepted: list[Run] = []
        go = threading.Barrier(4)

        def submit(mine: list[Run]) -> None:
            go.wait()
            for run in mine:
                try:
                    engine.submit(run.request)
                except ShuttingDown:
                    continue
                accepted.append(run)

        threads = [threading.Thread(target=submit, args=(runs[i::3],)) for i in range(3)]
        for thread in threads:
            thread.start()
        go.wait()
        wait_until(lambda: len(accepted) >= first)
        engine.stop(drain_timeout_s=0)
        for thread in threads:
            thread.join()
        for run in runs:
            assert run.ends == (run in accepted)
            assert sum(not isinstance(event, TokenEvent) for event in run.events) == run.ends
        assert lm.num_free_sequences == lm.num_sequences


class SlowCommands:
    """The engine's command queue, whose first `put` dawdles until the engine has had every chance to stop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands = engine._commands
        self.entered = threading.Event()

    def get(self, block: bool) -> Any:
        return self._commands.get(block=block)

    def put(self, command: Any) -> None:
        if not self.entered.is_set():
            self.entered.set()
            self._engine._thread.join(0.5)
        self._commands.put(command)


def test_a_request_accepted_just_before_the_stop_begins_before_it_ends() -> None:
    with running_engine("llama", slots=1) as (engine, lm):
        first = Run(lm, [5, 6], GREEDY)
        engine.submit(first.request)
        first.wait()
        run, commands = Run(lm, [5, 6], GREEDY), SlowCommands(engine)
        engine._commands = commands  # type: ignore[assignment]
        commands._commands.put(lambda: None)  # the engine looks up its queue anew
        submitting = threading.Thread(target=engine.submit, args=(run.request,))
        submitting.start()
        assert commands.entered.wait(10)
        engine.stop(drain_timeout_s=0)
        submitting.join()
        assert (run.ends, type(run.error)) in ((1, ShuttingDown), (1, type(None)))
        assert lm.num_free_sequences == 1


def test_events_are_tokens_and_then_one_end(running: tuple[Engine, HuggingFaceLM]) -> None:
    engine, lm = running
    run = Run(lm, [5, 6, 7], SamplingParams(n=2, max_tokens=9, ignore_eos=True))
    engine.submit(run.request)
    *tokens, end = run.wait().events
    assert all(isinstance(event, TokenEvent) for event in tokens)
    assert end == Finished(prompt_tokens=3, completion_tokens=18)
    reasons = [event.finish_reason for event in tokens if isinstance(event, TokenEvent)]
    assert Counter(reasons) == {None: 16, "length": 2}
