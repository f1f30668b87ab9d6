"""A token's trace as JSON, and log-probabilities that JSON can carry."""

from __future__ import annotations

import math
from typing import Any

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_server.engine.events import TokenTrace

# JSON has no infinity; a token of probability zero is reported as vLLM does.
LOWEST = -9999.0


def json_log_prob(value: float) -> float:
    """A log-probability that JSON can carry."""
    return value if value > -math.inf else LOWEST


def render_trace(tokenizer: Tokenizer, datastore: Datastore | None, token_id: int, trace: TokenTrace) -> dict[str, Any]:
    """How a token came about, with where its neighbours stand."""
    near = trace.neighbors
    places = datastore.locate([n.entry_id for n in near]) if datastore is not None and near else []
    return {
        "token_id": token_id,
        "token": tokenizer.token_text(token_id),
        "searched": trace.searched,
        "decision": trace.decision,
        "lambda": trace.lmbda,
        "p_lm": trace.p_lm,
        "p_knn": trace.p_knn,
        "p": trace.p,
        "neighbors": [
            {
                "entry_id": neighbor.entry_id,
                "distance": neighbor.distance,
                "weight": neighbor.weight,
                "token": tokenizer.token_text(neighbor.token_id),
                "document_id": place.document_id,
                "uri": place.uri,
                "title": place.title,
                "licence": place.licence,
                "char_start": place.char_start,
                "char_end": place.char_end,
            }
            for neighbor, place in zip(near, places, strict=True)
        ],
    }
