"""``POST /v1/completions``: prompts in, engine requests out, events back."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from knnlm_core.errors import InvalidParameter, KnnlmError, PromptTooLong
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.errors import error_event
from knnlm_server.api.rendering import ChoiceText, render_chunk, render_usage
from knnlm_server.api.schemas import MAX_PROMPTS, CompletionBody, TokenIds
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import select
from knnlm_server.api.sse import DONE, sse, sse_response
from knnlm_server.api.state import Backend, Service, service
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.events import Event, Failed, Finished, TokenEvent
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampling_params import SamplingParams
from knnlm_server.engine.stopping import StopMatcher

logger = logging.getLogger(__name__)

router = APIRouter(dependencies=[KeyRequired])

TRACE_NEIGHBORS = 5


@router.post("/v1/completions", summary="Complete prompts", response_model=None)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Complete each prompt ``n`` times with the LM, mixed with a datastore where one is named."""
    state = service(request)
    body.log_unknown()
    body.refuse_unsupported()
    backend = state.require()
    params = _checked_params(backend, body)
    # Long prompts take a while: streams must not wait for them.
    prompts = await asyncio.to_thread(_tokenised_prompts, backend, body, params)
    job = _Job(state, body, params, prompts, request.state.request_id)
    if body.stream:
        return sse_response(job.stream(), on_close=job.close)
    try:
        return JSONResponse(await until_disconnect(request, job.complete()))
    finally:
        job.close()


@dataclass(frozen=True, slots=True)
class _PromptEvent:
    prompt: int
    event: Event


class _Job:
    """One HTTP request: its engine requests, the lease that they share, and the queue of their events."""

    def __init__(
        self, state: Service, body: CompletionBody, params: SamplingParams, prompts: list[list[int]], request_id: str
    ) -> None:
        self._backend = state.require()
        self._body = body
        self._params = params
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_PromptEvent] = asyncio.Queue()
        self._selection = select(state, body.model, body.knn)
        self._requests = [self._request(index, prompt_ids) for index, prompt_ids in enumerate(prompts)]
        # Who holds a part of the lease: this job, until its answer is rendered, and engine requests that have not
        # ended. Touched on the event loop only.
        self._holders = 1
        self._is_open = True
        self._submit()

    def _request(self, index: int, prompt_ids: list[int]) -> CompletionRequest:
        params, knn = self._params, self._body.knn
        stops = StopMatcher(params.stop, params.include_stop_str_in_output)
        return CompletionRequest(
            request_id=f"{self._id}-{index}",
            prompt_ids=prompt_ids,
            params=params,
            retrieval=self._selection.retrieval,
            choices=[_choice(self._backend, params, prompt_ids, stops, i) for i in range(params.n)],
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            emit=lambda event: self._post(_PromptEvent(index, event)),
            on_end=lambda: self._call(self._one_ended),
            trace_neighbors=TRACE_NEIGHBORS if knn is not None and knn.trace else 0,
        )

    def _submit(self) -> None:
        """All prompts are accepted or none."""
        try:
            for request in self._requests:
                self._backend.engine.submit(request)
                self._holders += 1
        except KnnlmError:
            self.close()
            raise

    def _post(self, event: _PromptEvent) -> None:
        self._call(self._events.put_nowait, event)

    def _call(self, function: Any, *args: Any) -> None:
        """From the engine's thread to the event loop, which may be gone at shutdown."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if function == self._one_ended:
                self._one_ended()

    def _one_ended(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._selection.release()

    def close(self) -> None:
        """End what still runs and give the lease back; closing again does nothing."""
        if self._is_open:
            self._is_open = False
            for request in self._requests:
                self._backend.engine.abort(request)
            self._one_ended()

    async def _all(self) -> AsyncIterator[_PromptEvent]:
        """Events of all prompts, until each has finished. Raises what made one fail."""
        left = len(self._requests)
        while left:
            item = await self._events.get()
            if isinstance(item.event, Failed):
                raise item.event.error
            left -= isinstance(item.event, Finished)
            yield item

    def _header(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._selection.model,
            "system_fingerprint": self._selection.system_fingerprint,
        }

    def _texts(self) -> dict[tuple[int, int], ChoiceText]:
        n = self._params.n
        return {
            (prompt, choice): ChoiceText(
                index=prompt * n + choice,
                tokenizer=self._backend.tokenizer,
                datastore=self._selection.lease.datastore if self._selection.lease else None,
                with_logprobs=self._params.logprobs is not None,
                with_trace=bool(self._requests[prompt].trace_neighbors),
            )
            for prompt in range(len(self._requests))
            for choice in range(n)
        }

    async def complete(self) -> dict[str, Any]:
        """The whole answer at once."""
        texts = self._texts()
        finished = []
        async for item in self._all():
            if isinstance(item.event, TokenEvent):
                texts[item.prompt, item.event.choice].add(item.event)
            elif isinstance(item.event, Finished):
                finished.append(item.event)
        choices = sorted((text.take() for text in texts.values()), key=lambda choice: choice["index"])
        return {**self._header(), "choices": choices, "usage": render_usage(finished, self._selection.retrieval)}

    async def stream(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        texts = self._texts()
        finished = []
        include_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        try:
            async for item in self._all():
                if isinstance(item.event, TokenEvent):
                    text = texts[item.prompt, item.event.choice]
                    text.add(item.event)
                    if text.has_news:
                        yield sse(render_chunk(self._header(), text.take(), usage_follows=include_usage))
                elif isinstance(item.event, Finished):
                    finished.append(item.event)
        except KnnlmError as error:
            yield error_event(error)
        except Exception:
            logger.exception("stream failed id=%s", self._id)
            yield error_event(KnnlmError("internal error"))
        else:
            if include_usage:
                usage = render_usage(finished, self._selection.retrieval)
                yield sse({**self._header(), "choices": [], "usage": usage})
        yield DONE


def _choice(backend: Backend, params: SamplingParams, prompt_ids: list[int], stops: StopMatcher, index: int) -> Choice:
    def decode(token_ids: list[int]) -> str:
        return backend.tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)

    return Choice(index=index, detokenizer=IncrementalDetokenizer(decode, prompt_ids), stops=stops.copy())


def _checked_params(backend: Backend, body: CompletionBody) -> SamplingParams:
    params = body.sampling_params()
    params.check(backend.lm.identity.vocab_size)
    most = backend.lm.num_sequences
    if params.n > most:
        raise InvalidParameter(
            f"`n` must be at most {most}, the number of sequences served at once, got {params.n}", param="n"
        )
    return params


def _tokenised_prompts(backend: Backend, body: CompletionBody, params: SamplingParams) -> list[list[int]]:
    most = min(MAX_PROMPTS, backend.engine.max_requests)
    prompts = [_prompt_ids(backend, prompt) for prompt in _checked_prompts(body, most)]
    for prompt_ids in prompts:
        _check_length(prompt_ids, params, backend.lm.max_length)
    return prompts


def _checked_prompts(body: CompletionBody, most: int) -> list[str | TokenIds]:
    prompts = body.prompts()
    if not 1 <= len(prompts) <= most:
        raise InvalidParameter(f"`prompt` must hold 1 … {most} prompts, got {len(prompts)}", param="prompt")
    return prompts


def _prompt_ids(backend: Backend, prompt: str | TokenIds) -> list[int]:
    if isinstance(prompt, str):
        prompt_ids = backend.tokenizer.encode(prompt)
    else:
        backend.tokenizer.check_ids(prompt, backend.lm.identity.vocab_size, param="prompt")
        prompt_ids = prompt
    if not prompt_ids:
        raise InvalidParameter("`prompt` must hold at least 1 token, got 0", param="prompt")
    return prompt_ids


def _check_length(prompt_ids: list[int], params: SamplingParams, max_length: int) -> None:
    total = len(prompt_ids) + params.max_tokens
    if total > max_length:
        raise PromptTooLong(
            f"prompt and `max_tokens` must be at most {max_length} tokens together, "
            f"got {len(prompt_ids)} + {params.max_tokens} = {total}",
            param="prompt" if len(prompt_ids) >= max_length else "max_tokens",
        )
