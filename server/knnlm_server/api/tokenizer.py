"""``/tokenize``, ``/detokenize``, ``/tokenizer_info``: the model's tokenizer for clients that have no copy of it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from knnlm_server.api.chat import encode_conversation
from knnlm_server.api.json_route import JsonRoute
from knnlm_server.api.schemas.tokenizer import DetokenizeBody, Detokenized, TokenizeBody, Tokenized, TokenizerInfo
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import check_model
from knnlm_server.api.state import Backend, backend

router = APIRouter(route_class=JsonRoute, dependencies=[KeyRequired])


@router.post("/tokenize", summary="Text to tokens", response_model=None, responses={200: {"model": Tokenized}})
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Token ids of a text or of a conversation, as the model would read it."""
    state = backend(request)
    body.log_unknown()
    body.check()
    check_model(state, body.model)
    # Long texts take a while, and so do their answers: streams must not wait for them.
    return await asyncio.get_running_loop().run_in_executor(state.threads.reading, _tokenize, state, body)


def _tokenize(state: Backend, body: TokenizeBody) -> Response:
    tokenizer = state.tokenizer
    if body.messages is not None:
        token_ids = encode_conversation(tokenizer, body.messages, body)
    else:
        assert body.prompt is not None
        token_ids = tokenizer.encode(body.prompt, add_bos=body.add_special_tokens is not False)
    return JSONResponse(
        {
            "count": len(token_ids),
            "max_model_len": state.lm.max_length,
            "tokens": token_ids,
            "token_strs": tokenizer.token_strings(token_ids) if body.return_token_strs else None,
        }
    )


@router.post("/detokenize", summary="Tokens to text", response_model=None, responses={200: {"model": Detokenized}})
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Text of token ids, special tokens included."""
    state = backend(request)
    body.log_unknown()
    check_model(state, body.model)
    return await asyncio.get_running_loop().run_in_executor(state.threads.reading, _detokenize, state, body.tokens)


def _detokenize(state: Backend, token_ids: list[int]) -> Response:
    state.tokenizer.check_ids(token_ids, state.lm.identity.vocab_size, param="tokens")
    return JSONResponse({"prompt": state.tokenizer.decode(token_ids)})


@router.get(
    "/tokenizer_info",
    summary="Describe the tokenizer",
    response_model=None,
    responses={200: {"model": TokenizerInfo}},
)
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """Special tokens, chat template and limits."""
    state = backend(request)
    tokenizer, special = state.tokenizer, state.tokenizer.special_tokens
    return {
        "tokenizer_class": tokenizer.class_name,
        "vocab_size": len(tokenizer),
        "model_max_length": state.lm.max_length,
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unk,
        "chat_template": tokenizer.chat_template,
        "add_bos_token": bool(tokenizer.bos_token_ids),
    }
