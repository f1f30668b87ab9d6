"""One HTTP request that generates: its engine requests, the lease that they share, and the way to its answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response

from knnlm_core.errors import InvalidParameter, KnnlmError, PromptTooLong
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.retrieval import Retrieval
from knnlm_server.api.attribution_rendering import check_attributed
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.engine_call import EngineCall
from knnlm_server.api.errors import error_event
from knnlm_server.api.prompt_weights import settle_weights
from knnlm_server.api.schemas.generation import GenerationBody
from knnlm_server.api.selection import Selection
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.sse import DONE, sse, sse_response, to_json
from knnlm_server.api.state import Backend
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.events import Event, Failed, Finished, RetrievalCounts, TokenEvent
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher
from knnlm_server.telemetry.record import WorkReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRACE_NEIGHBORS = 5


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """What to generate.

    Attributes:
        prompts: token ids, at least one each.
        detokenizers: of each prompt, see `detokenizer_after`; every choice gets a copy.
        params: of every prompt, checked.
        with_trace: report per token how its probability came about.
        with_attribution: also report which documents its probability came from; needs the trace.
        prompt_logprobs: alternatives to report with each prompt token; None does not score prompts.
    """

    prompts: Sequence[list[int]]
    detokenizers: Sequence[IncrementalDetokenizer]
    params: SamplingParams
    with_trace: bool = False
    with_attribution: bool = False
    prompt_logprobs: int | None = None

    @property
    def num_choices(self) -> int:
        """Of all prompts."""
        return self.params.n * len(self.prompts)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event of one of the job's prompts."""

    prompt: int
    event: Event


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a job retrieves from.

    Attributes:
        lease: of the selection; the job gets its first share.
        retrievals: one per prompt.
    """

    selection: Selection
    lease: SharedLease
    retrievals: Sequence[Retrieval | None]


async def begin_job(
    request: Request, backend: Backend, selection: Selection, plan: GenerationPlan, answer_id: str
) -> GenerationJob:
    """Settle how each prompt retrieves, then submit all of them; releases the selection if that fails.

    Args:
        answer_id: what the answer calls itself, such as ``cmpl-…``.
    Raises: as `GenerationJob`; RequestCancelled: the client left meanwhile.
        InvalidParameter: more would be attributed than a server can be asked to hold.
    """
    lease = SharedLease(selection)
    try:
        if plan.with_attribution:
            check_attributed(plan.num_choices * plan.params.max_tokens, selection.retrieval)
        settling = settle_weights(backend, selection, lease, plan.prompts, answer_id)
        retrievals = await (until_disconnect(request, settling) if selection.weighs_by_prompt else settling)
    except BaseException:
        lease.drop()
        raise
    job = GenerationJob(backend, Chosen(selection, lease, retrievals), plan, answer_id)
    request.state.record.work = job.report
    return job


class GenerationJob:
    """Submits a plan and hands out its events; owns the first share of the selection's leases.

    They are shared: by this job, until its answer is rendered, and by every engine request that has not ended.

    Raises: Overloaded, ShuttingDown, InvalidParameter: the engine does not take it; nothing runs then.
    """

    def __init__(self, backend: Backend, chosen: Chosen, plan: GenerationPlan, answer_id: str) -> None:
        self.backend = backend
        self.selection = chosen.selection
        self._labels = chosen.selection.labels  # now: when all is over, a datastore may be closed
        self._retrievals = chosen.retrievals
        self.plan = plan
        self.id = answer_id
        self._created = int(time.time())
        self._events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._num_finished = self._completion_tokens = 0
        self._requests: list[CompletionRequest] = []
        self._calls: list[EngineCall] = []
        self._lease = chosen.lease
        self._error: str | None = None
        self._is_open = True
        try:
            self._submit()
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        """All prompts are accepted or none."""
        params = self.plan.params
        stops = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._calls = [EngineCall(self.backend.engine, self._lease, lambda error: None) for _ in self.plan.prompts]
        self._requests = [self._request(index, call, stops) for index, call in enumerate(self._calls)]
        for call, request in zip(self._calls, self._requests, strict=True):
            call.submit(request)

    def _request(self, index: int, call: EngineCall, stops: StopMatcher) -> CompletionRequest:
        params = self.plan.params
        return CompletionRequest(
            request_id=f"{self.id}-{index}",
            prompt_ids=self.plan.prompts[index],
            params=params,
            retrieval=self._retrievals[index],
            choices=[Choice(i, self.plan.detokenizers[index].copy(), stops.copy()) for i in range(params.n)],
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            emit=lambda event: call.report(self._events.put_nowait, JobEvent(index, event)),
            on_end=lambda: call.end(None),
            trace_neighbors=TRACE_NEIGHBORS if self.plan.with_trace else 0,
            attribute=self.plan.with_attribution,
            prompt_logprobs=self.plan.prompt_logprobs,
            drafts=self.selection.drafts,
        )

    def close(self) -> None:
        """End what still runs and give the lease back; closing again does nothing."""
        if self._is_open:
            self._is_open = False
            for call in self._calls:
                call.abort()
            self._lease.drop()

    async def in_thread(self, render: Callable[[], T]) -> T:
        """Render on a thread: many tokens with many alternatives take a while, and streams must not wait for them."""
        return await self._lease.in_thread(render)

    async def events(self) -> AsyncIterator[JobEvent]:
        """Events of all prompts, until each has finished. Raises what made one fail."""
        while self._num_finished < len(self._requests):
            item = await self._events.get()
            if isinstance(item.event, Failed):
                self._error = item.event.error.code
                raise item.event.error
            self._num_finished += isinstance(item.event, Finished)
            self._completion_tokens += isinstance(item.event, TokenEvent)
            yield item

    def header(self, kind: str) -> dict[str, Any]:
        """What every answer and every chunk of it begins with.

        Args:   kind: the value of ``object``.
        """
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.selection.model,
            "system_fingerprint": self.selection.system_fingerprint,
        }

    def usage(self) -> dict[str, Any]:
        """Token counts so far; of the whole HTTP request once all events are out."""
        prompt_tokens = sum(map(len, self.plan.prompts))
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(r.num_cached for r in self._requests)},
        }
        if self.selection.retrieval is not None:
            usage["knn"] = self._counts()
        return usage

    def _counts(self) -> dict[str, int]:
        fields = RetrievalCounts.__slots__
        return {name: sum(getattr(r.counts, name) for r in self._requests) for name in fields}

    def report(self) -> WorkReport:
        """For log, metrics and spans; at any time."""
        return WorkReport(
            model=self.selection.model,
            datastores=self._labels,
            prompt_tokens=sum(map(len, self.plan.prompts)),
            tokens=self._completion_tokens,
            retrievals=self._counts() if self.selection.retrieval is not None else {},
            working="prefill",
            timelines=[request.timeline for request in self._requests],
            error=self._error,
        )


class Renderer(Protocol):
    """Turns a job's events into the JSON of one API."""

    def add(self, item: JobEvent) -> None:
        """Take in an event."""
        ...

    def chunks(self) -> Iterable[dict[str, Any]]:
        """What a stream can tell since it was last asked."""
        ...

    def tail(self) -> dict[str, Any]:
        """The chunk without choices that carries the usage."""
        ...

    @property
    def has_much(self) -> bool:
        """Whether `chunks` would take long, as for a long prompt's echo."""
        ...

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, once all events are in."""
        ...


async def respond(
    request: Request, body: GenerationBody, job: GenerationJob, make_renderer: Callable[[], Renderer]
) -> Response:
    """Answer with a stream or in one piece, as the body asks; the job is closed however that ends."""
    try:
        renderer = make_renderer()
    except BaseException:
        job.close()
        raise
    if body.stream:
        return sse_response(_stream(body, job, renderer), on_close=job.close)
    try:
        await until_disconnect(request, _collect(job, renderer))
        return Response(await job.in_thread(lambda: to_json(renderer.whole())), media_type="application/json")
    finally:
        job.close()


async def _collect(job: GenerationJob, renderer: Renderer) -> None:
    async for item in job.events():
        renderer.add(item)


async def _stream(body: GenerationBody, job: GenerationJob, renderer: Renderer) -> AsyncIterator[str]:
    try:
        async for item in job.events():
            renderer.add(item)
            usage = _chunk_usage(body, job)
            if renderer.has_much:
                for event in await job.in_thread(lambda: [sse(chunk | usage) for chunk in renderer.chunks()]):  # noqa: B023
                    yield event
            else:
                for chunk in renderer.chunks():
                    yield sse(chunk | usage)
    except KnnlmError as error:
        yield error_event(error)
    except Exception:
        logger.exception("stream failed answer=%s", job.id)
        yield error_event(KnnlmError("internal error"))
    else:
        if body.wants_usage:
            yield sse(renderer.tail())
    yield DONE


def _chunk_usage(body: GenerationBody, job: GenerationJob) -> dict[str, Any]:
    """``usage`` is null in all but the last chunk, once it was asked for."""
    if body.wants_running_usage:
        return {"usage": job.usage()}
    return {"usage": None} if body.wants_usage else {}


def detokenizer_after(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams
) -> IncrementalDetokenizer:
    """What makes text of the tokens that follow a prompt."""

    def decode(token_ids: list[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)

    return IncrementalDetokenizer(decode, prompt_ids)


def check_params(backend: Backend, params: SamplingParams, *, n_field: str = "n") -> None:
    """Raises InvalidParameter: a field is out of bounds, for this model or at all."""
    params.check(backend.lm.identity.vocab_size)
    most = backend.lm.num_sequences
    if params.n > most:
        raise InvalidParameter(
            f"`{n_field}` must be at most {most}, the number of sequences served at once, got {params.n}",
            param=n_field,
        )


def check_length(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    max_length: int,
    *,
    prompt_field: str = "prompt",
    length_field: str = "max_tokens",
) -> None:
    """Raises PromptTooLong: prompt and completion cannot fit the context together."""
    total = len(prompt_ids) + params.max_tokens
    if total > max_length:
        raise PromptTooLong(
            f"prompt and `{length_field}` must be at most {max_length} tokens together, "
            f"got {len(prompt_ids)} + {params.max_tokens} = {total}",
            param=prompt_field if len(prompt_ids) >= max_length else length_field,
        )
