"""From a job's events to OpenAI's chat completion and its chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from knnlm_server.api.attribution_rendering import AnswerAttribution
from knnlm_server.api.generation import GenerationJob, JobEvent
from knnlm_server.api.trace_rendering import TraceRenderer, json_log_prob
from knnlm_server.engine.events import FinishReason, TokenEvent

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


@dataclass(slots=True)
class _Choice:
    """What a choice has to tell and has not told yet."""

    index: int
    attribution: AnswerAttribution
    is_begun: bool = False  # the chunk with the role is out
    events: list[TokenEvent] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self) -> list[TokenEvent]:
        """Hand out what was not told yet."""
        events, self.events = self.events, []
        return events


class ChatRenderer:
    """One chat completion, whole or in chunks."""

    def __init__(self, job: GenerationJob) -> None:
        self._job = job
        self._tokenizer = job.backend.tokenizer
        self._traces = TraceRenderer(self._tokenizer, job.selection.stores)
        self._choices = [_Choice(index, self._traces.answer()) for index in range(job.plan.params.n)]
        self._news: list[_Choice] = []

    def add(self, item: JobEvent) -> None:
        """Take in an event; see `Renderer`."""
        event = item.event
        if isinstance(event, TokenEvent):
            choice = self._choices[event.choice]
            choice.events.append(event)
            choice.finish_reason = event.finish_reason
            self._news = [choice]

    def chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream can tell since it was last asked; see `Renderer`."""
        news, self._news = self._news, []
        shows_tokens = self._job.plan.params.logprobs is not None or self._job.plan.with_trace
        for choice in news:
            if not choice.is_begun:
                choice.is_begun = True
                yield self._chunk(choice, {"role": "assistant", "content": ""})
            if shows_tokens or any(event.text for event in choice.events):
                events = choice.take()
                yield self._chunk(choice, {"content": _text(events)}, self._details(choice, events))
            if choice.finish_reason is not None:
                yield self._chunk(choice, {}, self._attribution(choice), choice.finish_reason)

    @property
    def has_much(self) -> bool:
        """Whether `chunks` would take long; see `Renderer`."""
        return any(self._traces.is_much(choice.events) for choice in self._news)

    def tail(self) -> dict[str, Any]:
        """The chunk that carries the usage; see `Renderer`."""
        return {**self._job.header(CHUNK_KIND), "choices": [], "usage": self._job.usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece; see `Renderer`."""
        choices = [self._whole_choice(choice) for choice in self._choices]
        return {**self._job.header(KIND), "choices": choices, "usage": self._job.usage()}

    def _whole_choice(self, choice: _Choice) -> dict[str, Any]:
        events = choice.take()
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": _text(events), "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            **self._details(choice, events),
            **self._attribution(choice),
        }

    def _chunk(
        self,
        choice: _Choice,
        delta: dict[str, str],
        details: dict[str, Any] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        shown = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._job.header(CHUNK_KIND), "choices": [shown | (details or {})]}

    def _details(self, choice: _Choice, events: list[TokenEvent]) -> dict[str, Any]:
        """``logprobs`` and ``knn`` of some tokens, where they were asked for."""
        details: dict[str, Any] = {}
        if self._job.plan.params.logprobs is not None:
            details["logprobs"] = {"content": [self._chosen(event) for event in events], "refusal": None}
        if self._job.plan.with_trace:
            details["knn"] = self._traces.entries(events, choice.attribution)
        return details

    def _attribution(self, choice: _Choice) -> dict[str, Any]:
        """Of the whole choice, where it was asked for."""
        return {"attribution": choice.attribution.whole()} if self._job.plan.with_attribution else {}

    def _chosen(self, event: TokenEvent) -> dict[str, Any]:
        top = [self._token(token_id, log_prob) for token_id, log_prob in event.top]
        return {**self._token(event.token_id, event.log_prob), "top_logprobs": top}

    def _token(self, token_id: int, log_prob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": json_log_prob(log_prob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)
