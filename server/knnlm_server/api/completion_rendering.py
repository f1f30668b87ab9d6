"""From a job's events to OpenAI's completion and its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from knnlm_core.lm.tokenizer import Encoding, Tokenizer
from knnlm_server.api.attribution_rendering import AnswerAttribution
from knnlm_server.api.generation import GenerationJob, JobEvent
from knnlm_server.api.trace_rendering import TraceRenderer, json_log_prob
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.events import Finished, FinishReason, PromptEvent, TokenEvent, TopTokens

KIND = "text_completion"


class Echo(NamedTuple):
    """A prompt as it is given back."""

    text: str
    starts: Sequence[int]  # the character at which each prompt token begins


def echo_of_text(text: str, encoding: Encoding) -> Echo:
    """A text is echoed as it was given."""
    return Echo(text, encoding.char_spans[:, 0].tolist())


def echo_of_ids(token_ids: Sequence[int], tokenizer: Tokenizer, skip_special_tokens: bool) -> Echo:
    """Token ids are echoed decoded; where they end inside a character, the completion begins with the whole of it."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    text, detokenizer = decode(token_ids), IncrementalDetokenizer(decode)
    starts, seen = [], 0
    for token_id in token_ids:
        starts.append(min(seen, len(text)))
        seen += len(detokenizer.push(token_id))
    return Echo(text, starts)


@dataclass(slots=True)
class _PromptScores:
    """Log-probabilities of one prompt's tokens, from the second on."""

    log_probs: list[float] = field(default_factory=list)
    tops: list[TopTokens] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    """What a choice has to tell and has not told yet."""

    prompt: int
    echo: Echo | None  # until it is told
    offset: int  # of the completion in the choice's text
    attribution: AnswerAttribution
    text: list[str] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    total_log_prob: float = 0.0
    num_tokens: int = 0

    def add(self, event: TokenEvent) -> None:
        self.text.append(event.text)
        self.events.append(event)
        self.finish_reason = event.finish_reason
        self.total_log_prob += event.log_prob
        self.num_tokens += 1

    @property
    def mean_log_prob(self) -> float:
        return self.total_log_prob / max(1, self.num_tokens)


class CompletionRenderer:
    """One completion, whole or in chunks.

    Args:
        echoes: per prompt what is put before the completions, None for nothing.
        returned_n: choices per prompt in the answer: the best of those that the job generates.
    """

    def __init__(self, job: GenerationJob, echoes: Sequence[Echo | None], returned_n: int) -> None:
        self._job = job
        self._tokenizer = job.backend.tokenizer
        self._traces = TraceRenderer(self._tokenizer, job.selection.stores)
        self._returned_n = returned_n
        self._choices = [
            [
                _Choice(prompt, echo, len(echo.text) if echo else 0, self._traces.answer())
                for _ in range(job.plan.params.n)
            ]
            for prompt, echo in enumerate(echoes)
        ]
        self._scores = [_PromptScores() for _ in echoes]
        self._rows_of_prompt: dict[int, Sequence[_Row]] = {}
        self._news: list[tuple[int, _Choice]] = []  # position among the prompt's choices, and the choice

    def add(self, item: JobEvent) -> None:
        """Take in an event; see `Renderer`."""
        event, choices = item.event, self._choices[item.prompt]
        if isinstance(event, PromptEvent):
            self._scores[item.prompt].log_probs.extend(event.log_probs)
            self._scores[item.prompt].tops.extend(event.tops)
        elif isinstance(event, TokenEvent):
            choices[event.choice].add(event)
            self._news = [(event.choice, choices[event.choice])]
        elif isinstance(event, Finished) and not self._job.plan.params.max_tokens:
            for choice in choices:
                choice.finish_reason = "length"
            self._news = list(enumerate(choices))

    def chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream can tell since it was last asked; see `Renderer`."""
        news, self._news = self._news, []
        shows_tokens = self._job.plan.params.logprobs is not None or self._job.plan.with_trace
        for position, choice in news:
            if any(choice.text) or choice.finish_reason or choice.echo or (shows_tokens and choice.events):
                yield {**self._job.header(KIND), "choices": [self._take(position, choice)]}

    @property
    def has_much(self) -> bool:
        """Whether `chunks` would take long; see `Renderer`."""
        news = [choice for _, choice in self._news]
        has_scored_prompt = self._job.plan.prompt_logprobs is not None and any(choice.echo for choice in news)
        return has_scored_prompt or any(self._traces.is_much(choice.events) for choice in news)

    def tail(self) -> dict[str, Any]:
        """The chunk that carries the usage; see `Renderer`."""
        return {**self._job.header(KIND), "choices": [], "usage": self._job.usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece; see `Renderer`."""
        rendered = []
        for choices in self._choices:
            # A stable sort: equals stay in the order in which they were generated.
            best = sorted(choices, key=lambda choice: -choice.mean_log_prob)[: self._returned_n]
            kept = choices if self._returned_n == len(choices) else best
            rendered += [self._take(position, choice) for position, choice in enumerate(kept)]
        return {**self._job.header(KIND), "choices": rendered, "usage": self._job.usage()}

    def _take(self, position: int, choice: _Choice) -> dict[str, Any]:
        """Render what a choice has to tell and forget it."""
        echo, choice.echo = choice.echo, None
        result: dict[str, Any] = {
            "index": choice.prompt * self._returned_n + position,
            "text": (echo.text if echo else "") + "".join(choice.text),
            "logprobs": self._logprobs(choice, echo) if self._job.plan.params.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }
        if self._job.plan.with_trace:
            result["knn"] = self._traces.entries(choice.events, choice.attribution)
        if self._job.plan.with_attribution and choice.finish_reason is not None:
            result["attribution"] = choice.attribution.whole()
        choice.text, choice.events = [], []
        return result

    def _logprobs(self, choice: _Choice, echo: Echo | None) -> dict[str, Any]:
        prompt = self._prompt_rows(choice.prompt, echo) if echo else ()
        completion = [
            self._row(event.token_id, event.log_prob, event.top, choice.offset + event.text_offset)
            for event in choice.events
        ]
        rows = [*prompt, *completion]
        return {
            "tokens": [row.token for row in rows],
            "token_logprobs": [row.log_prob for row in rows],
            "top_logprobs": [row.top for row in rows],
            "text_offset": [row.offset for row in rows],
        }

    def _prompt_rows(self, prompt: int, echo: Echo) -> Sequence[_Row]:
        """Made once and shared by the prompt's choices."""
        if prompt in self._rows_of_prompt:
            return self._rows_of_prompt[prompt]
        ids, scores = self._job.plan.prompts[prompt], self._scores[prompt]
        first = _Row(self._tokenizer.token_text(ids[0]), None, None, echo.starts[0])
        columns = zip(ids[1:], scores.log_probs, scores.tops, echo.starts[1:], strict=True)
        rows = self._rows_of_prompt[prompt] = [first, *(self._row(*column) for column in columns)]
        return rows

    def _row(self, token_id: int, log_prob: float, top: TopTokens, offset: int) -> _Row:
        token = self._tokenizer.token_text(token_id)
        tops = {token: json_log_prob(log_prob)}
        for other_id, other in top:
            if other_id != token_id:
                text = self._tokenizer.token_text(other_id)
                # Distinct ids can decode to one string, such as the bytes of characters that take several tokens.
                tops[f"token_id:{other_id}" if text in tops else text] = json_log_prob(other)
        return _Row(token, json_log_prob(log_prob), tops, offset)


class _Row(NamedTuple):
    """One token in the four columns of ``logprobs``; the first prompt token has no context, so no probability."""

    token: str
    log_prob: float | None
    top: dict[str, float] | None
    offset: int
