"""The scheduler alone, against any order of arrivals, ends and aborts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_core.errors import InvalidParameter
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.scheduler import Batch, Scheduler
from knnlm_server.engine.stopping import StopMatcher


def request_of(name: str, prompt_tokens: int, lengths: list[int]) -> CompletionRequest:
    """A request whose choices take ``lengths`` tokens each."""
    params = SamplingParams(n=len(lengths), max_tokens=max(lengths))
    return CompletionRequest(
        request_id=name,
        prompt_ids=[1] * prompt_tokens,
        params=params,
        retrieval=None,
        choices=[Choice(i, IncrementalDetokenizer(lambda ids: ""), StopMatcher(())) for i in range(len(lengths))],
        seed=0,
        emit=lambda event: None,
        on_end=lambda: None,
    )


class Simulation:
    """Plays the engine: carries out batches without a model, and checks each one."""

    def __init__(self, num_slots: int, step_tokens: int) -> None:
        self.scheduler = Scheduler(num_slots, step_tokens, lambda request: 0)
        self.lengths: dict[str, list[int]] = {}
        self.order: list[str] = []  # of arrival, aborted requests taken out
        self.started: list[str] = []

    def submit(self, prompt_tokens: int, lengths: list[int]) -> CompletionRequest:
        request = request_of(str(len(self.lengths)), prompt_tokens, lengths)
        self.scheduler.check(request)
        self.lengths[request.request_id] = lengths
        self.order.append(request.request_id)
        self.scheduler.add(request)
        return request

    def abort(self, request: CompletionRequest) -> None:
        if request.request_id not in self.started:
            self.order.remove(request.request_id)
        for choice in request.live_choices:
            choice.finish_reason = "length"
            self.scheduler.release_slot(request)
        self.scheduler.remove(request)

    def step(self) -> Batch:
        batch = self.scheduler.next_batch()
        self._note_starts()
        self._check(batch)
        tokens = [(request, choice) for request, choice, _ in batch.decodes]
        for chunk in batch.chunks:
            chunk.request.num_prefilled = chunk.stop
            if chunk.is_last:
                tokens += [(chunk.request, choice) for choice in chunk.request.choices]
        for request, choice in tokens:
            choice.token_ids.append(0)
            if len(choice.token_ids) == self.lengths[request.request_id][choice.index]:
                choice.finish_reason = "length"
                self.scheduler.release_slot(request)
                if not request.live_choices:
                    self.scheduler.remove(request)
        self.scheduler.check_integrity()
        return batch

    def _note_starts(self) -> None:
        for request in self.scheduler.running:
            if request.request_id not in self.started:
                self.started.append(request.request_id)
        # First come, first served: what runs or ran is exactly the head of the queue, in its order.
        assert self.started == self.order[: len(self.started)]

    def _check(self, batch: Batch) -> None:
        scheduler = self.scheduler
        in_use = sum(len(request.live_choices) for request in scheduler.running)
        assert 0 <= in_use <= scheduler.num_slots
        live = [(r.request_id, c.index) for r in scheduler.running if r.is_prefilled for c in r.live_choices]
        assert [(r.request_id, c.index) for r, c, _ in batch.decodes] == live  # every one of them, once
        prefilled = sum(chunk.stop - chunk.start for chunk in batch.chunks)
        assert prefilled <= max(1, scheduler.step_tokens - len(batch.decodes))
        assert batch.num_tokens == len(batch.decodes) + prefilled
        for chunk in batch.chunks:
            assert chunk.start == chunk.request.num_prefilled < chunk.stop <= len(chunk.request.prompt_ids)
        if scheduler.has_work():
            assert batch.chunks or batch.decodes
        waiting = [request for request in scheduler.running if not request.is_prefilled]
        # Prompts advance in order: all but the last one of a step become complete.
        assert [chunk.request for chunk in batch.chunks] == waiting[: len(batch.chunks)]
        assert all(chunk.is_last for chunk in batch.chunks[:-1])


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, list[int]]]]:
    """Slots, step tokens, and (steps before it comes, prompt tokens, length of each choice) of each request."""
    num_slots = draw(st.integers(1, 6))
    request = st.tuples(
        st.integers(0, 3), st.integers(1, 40), st.lists(st.integers(1, 6), min_size=1, max_size=num_slots)
    )
    return num_slots, draw(st.integers(1, 20)), draw(st.lists(request, min_size=1, max_size=12))


@given(arrivals())
def test_everything_ends_in_order_within_budget_and_slots(
    given_arrivals: tuple[int, int, list[tuple[int, int, list[int]]]],
) -> None:
    num_slots, step_tokens, coming = given_arrivals
    simulation = Simulation(num_slots, step_tokens)
    requests = []
    for steps, prompt_tokens, lengths in coming:
        for _ in range(steps):
            simulation.step()
        requests.append(simulation.submit(prompt_tokens, lengths))
    # Nobody starves: a step does at least one token of prefill or of each decoding choice.
    bound = sum(prompt_tokens + max(lengths) for _, prompt_tokens, lengths in coming)
    for _ in range(bound):
        if not simulation.scheduler.has_work():
            break
        simulation.step()
    assert not simulation.scheduler.has_work()
    assert simulation.started == simulation.order
    for request, (_, _, lengths) in zip(requests, coming, strict=True):
        assert [len(choice.token_ids) for choice in request.choices] == lengths


@given(arrivals(), st.data())
def test_aborts_at_any_moment_give_all_slots_back(
    given_arrivals: tuple[int, int, list[tuple[int, int, list[int]]]], data: st.DataObject
) -> None:
    num_slots, step_tokens, coming = given_arrivals
    simulation = Simulation(num_slots, step_tokens)
    alive: list[CompletionRequest] = []
    for steps, prompt_tokens, lengths in coming:
        alive.append(simulation.submit(prompt_tokens, lengths))
        for _ in range(steps):
            simulation.step()
        alive = [request for request in alive if request.live_choices]
        if alive and data.draw(st.booleans()):
            simulation.abort(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
            simulation.scheduler.check_integrity()
    for request in [request for request in alive if request.live_choices]:
        simulation.abort(request)
    simulation.scheduler.check_integrity()
    assert not simulation.scheduler.has_work()
    widest = simulation.submit(1, [1] * num_slots)
    simulation.step()
    assert not widest.live_choices


def test_a_wide_request_is_not_overtaken_by_narrow_ones() -> None:
    simulation = Simulation(num_slots=2, step_tokens=8)
    first = simulation.submit(1, [5])
    wide = simulation.submit(1, [1, 1])
    narrow = simulation.submit(1, [1])
    for _ in range(4):
        simulation.step()
        assert simulation.scheduler.running == [first]
    simulation.step()
    simulation.step()
    assert not wide.live_choices
    assert narrow.live_choices
    simulation.step()
    assert not narrow.live_choices


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    simulation = Simulation(num_slots=4, step_tokens=4)
    simulation.submit(1, [30, 30])
    simulation.step()
    simulation.submit(20, [1])
    for _ in range(10):
        batch = simulation.step()
        assert len(batch.decodes) == 2
        assert [chunk.stop - chunk.start for chunk in batch.chunks] == [2]


def test_more_choices_than_slots_are_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"`n` must be at most 3.* got 4"):
        Simulation(num_slots=3, step_tokens=4).submit(1, [1] * 4)
