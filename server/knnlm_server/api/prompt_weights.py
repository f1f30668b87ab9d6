"""How each prompt of a request retrieves, where its own words decide between datastores."""

from __future__ import annotations

from collections.abc import Sequence

from knnlm_core.retrieval import Retrieval
from knnlm_server.api.engine_work import run_to_end
from knnlm_server.api.selection import Selection
from knnlm_server.api.shared_lease import SharedLease
from knnlm_server.api.state import Backend
from knnlm_server.engine.prompt_weights import PromptWeightsRequest


async def settle_weights(
    backend: Backend, selection: Selection, lease: SharedLease, prompts: Sequence[list[int]], request_id: str
) -> list[Retrieval | None]:
    """The retrieval of each prompt, in their order.

    Raises: Overloaded, ShuttingDown, EngineFailure, and what made a search fail.
    """
    retrieval = selection.retrieval
    if retrieval is None or not selection.weighs_by_prompt:
        return [retrieval] * len(prompts)
    weights: list[list[float]] = []
    await run_to_end(
        backend.engine,
        lease,
        lambda call: PromptWeightsRequest(request_id, prompts, retrieval, weights, call.end),
    )
    return [retrieval.with_weights(of_prompt) for of_prompt in weights]
