"""Which requests run in the next step. Pure bookkeeping: no tensors, no clock, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from knnlm_core.errors import InvalidParameter
from knnlm_server.engine.request import Choice, CompletionRequest


class Chunk(NamedTuple):
    """The next piece ``prompt_ids[start:stop]`` of a prompt."""

    request: CompletionRequest
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete after this piece."""
        return self.stop == len(self.request.prompt_ids)


class Decode(NamedTuple):
    """One more token of one choice, and as many more as its draft is right about."""

    request: CompletionRequest
    choice: Choice
    draft: Sequence[int] = ()


class Batch(NamedTuple):
    """The work of one step: every running choice decodes, and prompts advance within the token budget."""

    chunks: list[Chunk]
    decodes: list[Decode]

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, drafts included."""
        read = sum(chunk.stop - chunk.start for chunk in self.chunks)
        return read + sum(1 + len(decode.draft) for decode in self.decodes)


class Scheduler:
    """First come, first served; a request starts only when all its choices have a slot, so nothing is ever preempted.

    Args:
        num_slots: sequences that the LM can hold.
        step_tokens: prompt and completion tokens per step; what decoding leaves over goes to prompts, in order, and
            what they leave over to drafts (`speculation.py`).
        begin: called when a request's prompt is about to be read; returns how many of its tokens are known already,
            fewer than all.
    """

    def __init__(self, num_slots: int, step_tokens: int, begin: Callable[[CompletionRequest], int]) -> None:
        self._begin = begin
        self.num_slots = num_slots
        self.step_tokens = step_tokens
        self.waiting: deque[CompletionRequest] = deque()
        self.running: list[CompletionRequest] = []
        self._free_slots = num_slots

    def check(self, request: CompletionRequest) -> None:
        """Raises InvalidParameter when the request could never run."""
        if len(request.choices) > self.num_slots:
            raise InvalidParameter(
                f"`n` must be at most {self.num_slots}, the number of sequences served at once, "
                f"got {len(request.choices)}",
                param="n",
            )

    def add(self, request: CompletionRequest) -> None:
        """Queue a request that passed `check`."""
        self.waiting.append(request)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting)

    def next_batch(self) -> Batch:
        """Admit what fits, then plan one step."""
        while self.waiting and len(self.waiting[0].choices) <= self._free_slots:
            request = self.waiting.popleft()
            self._free_slots -= len(request.choices)
            self.running.append(request)
        decodes = [
            Decode(request, choice)
            for request in self.running
            if request.is_prefilled
            for choice in request.live_choices
        ]
        budget = max(1, self.step_tokens - len(decodes))
        chunks = []
        for request in self.running:
            if budget and not request.is_prefilled:
                if not request.has_begun:
                    # As late as can be: a request just before it may share its prompt.
                    request.has_begun, request.num_prefilled = True, self._begin(request)
                stop = min(len(request.prompt_ids), request.num_prefilled + budget)
                chunks.append(Chunk(request, request.num_prefilled, stop))
                budget -= stop - request.num_prefilled
        return Batch(chunks, decodes)

    def release_slot(self, request: CompletionRequest) -> None:
        """One choice of the request is finished: its slot is free for the next request, if it had one."""
        if request in self.running:
            self._free_slots += 1

    def remove(self, request: CompletionRequest) -> None:
        """Forget a request, waiting or running, all of whose slots are released."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def check_integrity(self) -> None:
        """The slots that are not free are exactly those reserved by running requests' unfinished choices."""
        reserved = sum(len(request.live_choices) for request in self.running)
        assert self._free_slots + reserved == self.num_slots, (
            f"{self._free_slots} free + {reserved} reserved ≠ {self.num_slots} slots. This is a bug."
        )
