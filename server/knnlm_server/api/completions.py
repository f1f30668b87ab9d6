"""``POST /v1/completions``: prompts in, engine requests out, events back."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from knnlm_core.errors import InvalidParameter
from knnlm_server.api.completion_rendering import CompletionRenderer, Echo, echo_of_ids, echo_of_text
from knnlm_server.api.generation import (
    GenerationPlan,
    begin_job,
    check_length,
    check_params,
    detokenizer_after,
    respond,
)
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.common import TokenIds
from knnlm_server.api.schemas.completions import MAX_PROMPTS, RESPONSES, CompletionBody
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import select
from knnlm_server.api.state import Backend, service
from knnlm_server.engine.detokenizer import IncrementalDetokenizer
from knnlm_server.engine.sampling_params import SamplingParams

# Of one answer, over all prompts and choices: some hundred bytes each while it is put together.
MAX_REPORTED_LOGPROBS = 2_000_000

router = APIRouter(route_class=JsonRoute, dependencies=[KeyRequired])


class _Prompt(NamedTuple):
    token_ids: list[int]
    detokenizer: IncrementalDetokenizer
    echo: Echo | None


@router.post("/v1/completions", summary="Complete prompts", response_model=None, responses=RESPONSES)
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Complete each prompt ``n`` times with the LM, mixed with datastores where some are named."""
    state = service(request)
    body.log_unknown()
    body.refuse_unsupported()
    backend = state.require()
    params = body.params()
    check_params(backend, params, n_field="n" if body.best_of is None else "best_of")
    # Long prompts take a while: streams must not wait for them.
    prompts = await asyncio.to_thread(_read_prompts, backend, body, params)
    plan = GenerationPlan(
        prompts=[prompt.token_ids for prompt in prompts],
        detokenizers=[prompt.detokenizer for prompt in prompts],
        params=params,
        with_trace=body.wants_trace,
        with_attribution=body.wants_attribution,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    selection = select(state, body.model, body.knn, has_prompt=True)
    job = await begin_job(request, backend, selection, plan, f"cmpl-{request.state.request_id}")
    echoes = [prompt.echo for prompt in prompts]
    return await respond(request, body, job, lambda: CompletionRenderer(job, echoes, returned_n=body.returned_n))


def _read_prompts(backend: Backend, body: CompletionBody, params: SamplingParams) -> list[_Prompt]:
    prompts, most = body.prompts(), min(MAX_PROMPTS, backend.engine.max_requests)
    if not 1 <= len(prompts) <= most:
        raise InvalidParameter(f"`prompt` must hold 1 … {most} prompts, got {len(prompts)}", param="prompt")
    read = [_read_prompt(backend, body, params, prompt) for prompt in prompts]
    _check_reported(body, params, sum(len(prompt.token_ids) for prompt in read), len(read))
    return read


def _check_reported(body: CompletionBody, params: SamplingParams, prompt_tokens: int, prompts: int) -> None:
    """Raises InvalidParameter: the answer would hold more log-probabilities than a server can be asked to hold."""
    if params.logprobs is None:
        return
    tokens = params.n * (prompts * params.max_tokens + (prompt_tokens if body.echo else 0))
    if (count := tokens * (params.logprobs + 1)) > MAX_REPORTED_LOGPROBS:
        raise InvalidParameter(
            f"`logprobs` may report at most {MAX_REPORTED_LOGPROBS} log-probabilities in one answer, "
            f"got {tokens} tokens × {params.logprobs + 1} = {count}",
            param="logprobs",
        )


def _read_prompt(backend: Backend, body: CompletionBody, params: SamplingParams, prompt: str | TokenIds) -> _Prompt:
    tokenizer = backend.tokenizer
    echo = None
    if isinstance(prompt, str):
        encoding = tokenizer.encode_with_spans(prompt)
        prompt_ids = encoding.token_ids.tolist()
        if body.echo:
            echo = echo_of_text(prompt, encoding)
    else:
        tokenizer.check_ids(prompt, backend.lm.identity.vocab_size, param="prompt")
        prompt_ids = prompt
        if body.echo:
            echo = echo_of_ids(prompt, tokenizer, params.skip_special_tokens)
    if not prompt_ids:
        raise InvalidParameter("`prompt` must hold at least 1 token, got 0", param="prompt")
    check_length(prompt_ids, params, backend.lm.max_length)
    return _Prompt(prompt_ids, detokenizer_after(tokenizer, prompt_ids, params), echo)
