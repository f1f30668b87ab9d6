"""One HTTP request that generates: its engine requests, the lease that they share, and the way to its answer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from knnlm_core.errors import InvalidParameter, KnnlmError, PromptTooLong
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.errors import error_event
from knnlm_server.api.schemas.generation import GenerationBody
from knnlm_server.api.selection import Selection
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.sse import DONE, sse, sse_response
from knnlm_server.api.state import Backend
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.events import Event, Failed, Finished, RetrievalCounts, TokenEvent
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher

logger = logging.getLogger(__name__)

TRACE_NEIGHBORS = 5


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """What to generate.

    Attributes:
        prompts: token ids, at least one each.
        params: of every prompt, checked.
        with_trace: report per token how its probability came about.
        prompt_logprobs: alternatives to report with each prompt token; None does not score prompts.
    """

    prompts: Sequence[list[int]]
    params: SamplingParams
    with_trace: bool = False
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event of one of the job's prompts."""

    prompt: int
    event: Event


class GenerationJob:
    """Submits a plan and hands out its events; owns the selection's lease from the moment it is made.

    The lease is shared: by this job, until its answer is rendered, and by every engine request that has not ended.

    Args:
        answer_id: what the answer calls itself, such as ``cmpl-…``.
    Raises: Overloaded, ShuttingDown, InvalidParameter: the engine does not take it; nothing runs then.
    """

    def __init__(self, backend: Backend, selection: Selection, plan: GenerationPlan, answer_id: str) -> None:
        self.backend = backend
        self.selection = selection
        self.plan = plan
        self.id = answer_id
        self._created = int(time.time())
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._requests = [self._request(index, prompt_ids) for index, prompt_ids in enumerate(plan.prompts)]
        self._finished: list[Finished] = []
        self._completion_tokens = 0
        self._lease = SharedLease(selection)
        self._is_open = True
        self._submit()

    def _request(self, index: int, prompt_ids: list[int]) -> CompletionRequest:
        params = self.plan.params
        stops = StopMatcher(params.stop, params.include_stop_str_in_output)
        return CompletionRequest(
            request_id=f"{self.id}-{index}",
            prompt_ids=prompt_ids,
            params=params,
            retrieval=self.selection.retrieval,
            choices=[_choice(self.backend, params, prompt_ids, stops, i) for i in range(params.n)],
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            emit=lambda event: self._call(self._events.put_nowait, JobEvent(index, event)),
            on_end=self._ended,
            trace_neighbors=TRACE_NEIGHBORS if self.plan.with_trace else 0,
            prompt_logprobs=self.plan.prompt_logprobs,
        )

    def _submit(self) -> None:
        """All prompts are accepted or none."""
        try:
            for request in self._requests:
                self.backend.engine.submit(request)
                self._lease.hold()
        except BaseException:
            self.close()
            raise

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """From the engine's thread to the event loop, which may be gone at shutdown."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _ended(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._lease.drop)
        except RuntimeError:
            self._lease.drop()

    def close(self) -> None:
        """End what still runs and give the lease back; closing again does nothing."""
        if self._is_open:
            self._is_open = False
            for request in self._requests:
                self.backend.engine.abort(request)
            self._lease.drop()

    async def in_thread(self, render: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Render on a thread: many tokens with many alternatives take a while, and streams must not wait for them."""
        return await self._lease.in_thread(render)

    async def events(self) -> AsyncIterator[JobEvent]:
        """Events of all prompts, until each has finished. Raises what made one fail."""
        while len(self._finished) < len(self._requests):
            item = await self._events.get()
            if isinstance(item.event, Failed):
                raise item.event.error
            if isinstance(item.event, Finished):
                self._finished.append(item.event)
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
            "prompt_tokens_details": {"cached_tokens": sum(f.cached_tokens for f in self._finished)},
        }
        if self.selection.retrieval is not None:
            fields = RetrievalCounts.__slots__
            usage["knn"] = {name: sum(getattr(f.counts, name) for f in self._finished) for name in fields}
        return usage


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

    def whole(self) -> dict[str, Any]:
        """The answer in one piece, once all events are in."""
        ...


async def respond(request: Request, body: GenerationBody, job: GenerationJob, renderer: Renderer) -> Response:
    """Answer with a stream or in one piece, as the body asks; the job is closed however that ends."""
    if body.stream:
        return sse_response(_stream(body, job, renderer), on_close=job.close)
    try:
        await until_disconnect(request, _collect(job, renderer))
        return JSONResponse(await job.in_thread(renderer.whole))
    finally:
        job.close()


async def _collect(job: GenerationJob, renderer: Renderer) -> None:
    async for item in job.events():
        renderer.add(item)


async def _stream(body: GenerationBody, job: GenerationJob, renderer: Renderer) -> AsyncIterator[str]:
    try:
        async for item in job.events():
            renderer.add(item)
            for chunk in renderer.chunks():
                yield sse(chunk | _chunk_usage(body, job))
    except KnnlmError as error:
        yield error_event(error)
    except Exception:
        logger.exception("stream failed id=%s", job.id)
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


def _choice(backend: Backend, params: SamplingParams, prompt_ids: list[int], stops: StopMatcher, index: int) -> Choice:
    def decode(token_ids: list[int]) -> str:
        return backend.tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)

    return Choice(index=index, detokenizer=IncrementalDetokenizer(decode, prompt_ids), stops=stops.copy())


def check_params(backend: Backend, params: SamplingParams) -> None:
    """Raises InvalidParameter: a field is out of bounds, for this model or at all."""
    params.check(backend.lm.identity.vocab_size)
    most = backend.lm.num_sequences
    if params.n > most:
        raise InvalidParameter(
            f"`n` must be at most {most}, the number of sequences served at once, got {params.n}", param="n"
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
