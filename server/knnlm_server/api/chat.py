"""``POST /v1/chat/completions``: a conversation in, by the model's chat template one prompt, events back."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from knnlm_core.errors import InvalidParameter
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_server.api.chat_rendering import ChatRenderer
from knnlm_server.api.generation import (
    GenerationPlan,
    begin_job,
    check_length,
    check_params,
    detokenizer_after,
    respond,
)
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.chat import ChatBody, Message, TemplateBody, template_messages
from knnlm_server.api.schemas.chat_answers import RESPONSES
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import select
from knnlm_server.api.state import service

router = APIRouter(route_class=JsonRoute, dependencies=[KeyRequired])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=None,
    responses=RESPONSES,
)
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Go on with a conversation ``n`` times with the LM, mixed with datastores where some are named."""
    state = service(request)
    body.log_unknown()
    body.refuse_unsupported()
    backend = state.require()
    # Long conversations take a while: streams must not wait for them.
    prompt_ids = await asyncio.to_thread(encode_conversation, backend.tokenizer, body.messages, body)
    params = body.params(room=backend.lm.max_length - len(prompt_ids))
    check_params(backend, params)
    check_length(prompt_ids, params, backend.lm.max_length, prompt_field="messages", length_field=body.length_field)
    plan = GenerationPlan(
        prompts=[prompt_ids],
        detokenizers=[detokenizer_after(backend.tokenizer, prompt_ids, params)],
        params=params,
        with_trace=body.wants_trace,
        with_attribution=body.wants_attribution,
    )
    selection = select(state, body.model, body.knn, has_prompt=True)
    job = await begin_job(request, backend, selection, plan, f"chatcmpl-{request.state.request_id}")
    return await respond(request, body, job, lambda: ChatRenderer(job))


def encode_conversation(tokenizer: Tokenizer, messages: list[Message], body: TemplateBody) -> list[int]:
    """Token ids of the prompt that the chat template makes.

    Raises: UnsupportedFeature, InvalidParameter: the model has no template, or it does not take these messages.
    """
    text = tokenizer.apply_chat_template(template_messages(messages), **body.template_options())
    token_ids = tokenizer.encode(text, add_bos=False)
    if not token_ids:
        raise InvalidParameter("the chat template makes no token of `messages`; at least 1 is needed", param="messages")
    return token_ids
