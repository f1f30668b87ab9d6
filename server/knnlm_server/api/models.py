"""``/v1/models``: the LM, and one entry per loaded datastore, as adapters are listed elsewhere."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from knnlm_core.errors import ModelNotFound
from knnlm_server.api.schemas.models import ModelCard, ModelList
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import SEPARATOR
from knnlm_server.api.state import Backend, backend

router = APIRouter(dependencies=[KeyRequired])


@router.get("/v1/models", summary="List models", response_model=None, responses={200: {"model": ModelList}})
async def list_models(request: Request) -> dict[str, Any]:
    """The base LM and its combinations with loaded datastores, by their names and by their aliases."""
    return {"object": "list", "data": _cards(backend(request))}


@router.get(
    "/v1/models/{model}", summary="Describe a model", response_model=None, responses={200: {"model": ModelCard}}
)
async def get_model(model: str, request: Request) -> dict[str, Any]:
    """One of the models listed."""
    for card in _cards(backend(request)):
        if card["id"] == model:
            return card
    raise ModelNotFound(f"model {model!r} is not served here", param="model")


def _cards(state: Backend) -> list[dict[str, Any]]:
    words = {word: status.name for status in state.registry.statuses() for word in (status.name, *status.aliases)}
    base = _card(state, state.model_name, None)
    return [base, *(_card(state, f"{state.model_name}{SEPARATOR}{word}", name) for word, name in sorted(words.items()))]


def _card(state: Backend, model: str, datastore: str | None) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": state.created,
        "owned_by": "knnlm",
        "root": state.model_name,
        "parent": state.model_name if datastore is not None else None,
        "max_model_len": state.lm.max_length,
        "datastore": datastore,
    }
