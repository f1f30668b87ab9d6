"""A completion request inside the engine, and the choices that it generates."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar

from knnlm_core.drafts import NO_LEADS, NO_OUTLOOK, Guess, Leads, Outlook
from knnlm_core.lm.protocol import SequenceId
from knnlm_core.retrieval import Retrieval
from knnlm_core.walks import Walks
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.events import Event, FinishReason, RetrievalCounts
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher
from knnlm_server.telemetry.timeline import Timeline


@dataclass(slots=True)
class Choice:
    """One completion of a request's prompt.

    Attributes:
        walks: where its retrieval stands, if a gate follows; they begin where the prompt ends.
        leads: entries that may hold its next token.
        outlook: the tokens along its leads as of the last step.
        guesses: what was thought likely to come in the last step, drafted or not.
        streak: how many guesses came true in a row, up to its last token.
    """

    index: int
    detokenizer: IncrementalDetokenizer
    stops: StopMatcher
    sequence: SequenceId | None = None
    walks: Walks = ()
    leads: Leads = NO_LEADS
    outlook: Outlook = NO_OUTLOOK
    guesses: list[Guess] = field(default_factory=list)
    streak: int = 0
    token_ids: list[int] = field(default_factory=list)
    last_token_s: float = 0.0  # monotonic clock
    num_chars: int = 0  # of the text that the tokens make, held back or not
    finish_reason: FinishReason | None = None

    def advance(
        self, token_id: int, params: SamplingParams, eos_token_ids: Collection[int]
    ) -> tuple[str, FinishReason | None]:
        """Append a token; returns the text that can be shown now and whether this token ends the choice.

        An EOS or stop token counts as a token but shows no text.
        """
        self.token_ids.append(token_id)
        is_end = token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)
        text = ""
        if not is_end:
            delta = self.detokenizer.push(token_id)
            self.num_chars += len(delta)
            result = self.stops.push(delta)
            if result.stopped:
                self.finish_reason = "stop"
                return result.emit, self.finish_reason
            text = result.emit
            if len(self.token_ids) < params.max_tokens:
                return text, None
        # The end: what was held back for an unfinished character or a possible stop string comes out.
        result = self.stops.push(self.detokenizer.flush())
        self.finish_reason = "stop" if is_end or result.stopped else "length"
        return text + result.emit + ("" if result.stopped else self.stops.flush()), self.finish_reason


@dataclass(slots=True, eq=False)
class CompletionRequest:
    """What the engine needs to know to complete one prompt ``params.n`` times.

    Attributes:
        emit: called on the engine's thread with each event; must not block.
        on_end: called exactly once when the request leaves the engine, however it leaves: gives the lease back.
        seed: of the sampling noise; given by the caller or drawn at admission.
        trace_neighbors: neighbours reported per token; 0 for no trace.
        attribute: report with the trace which entries each token's probability came from.
        prompt_logprobs: alternatives to report with each prompt token; None does not score the prompt.
        num_cached: prompt tokens that the prefix cache spared.
        timeline: when it was where.
        prompt_walks: of a prompt that is scored; they begin where it begins and end with it.
        drafts: whether drafts are read for it; false where it wants none, or one could not be read.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    retrieval: Retrieval | None
    choices: list[Choice]
    seed: int
    emit: Callable[[Event], None]
    on_end: Callable[[], None]
    trace_neighbors: int = 0
    attribute: bool = False
    prompt_logprobs: int | None = None
    has_begun: bool = False
    num_prefilled: int = 0
    num_cached: int = 0
    prompt_walks: Walks = ()
    drafts: bool = True
    counts: RetrievalCounts = field(default_factory=RetrievalCounts)
    timeline: Timeline = field(default_factory=Timeline)
    kind: ClassVar[str] = "completion"  # as metrics call it

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the KV cache."""
        return self.num_prefilled == len(self.prompt_ids)

    @property
    def live_choices(self) -> list[Choice]:
        """Choices that still generate."""
        return [choice for choice in self.choices if choice.finish_reason is None]

    @property
    def num_generated(self) -> int:
        """Completion tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)
