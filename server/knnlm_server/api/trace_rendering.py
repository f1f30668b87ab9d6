"""A token's trace as JSON, and log-probabilities that JSON can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from knnlm_core.datastore.entries import Entries
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_server.api.attribution_rendering import AnswerAttribution
from knnlm_server.engine.events import TokenEvent, TokenTrace, TracedNeighbor

# JSON has no infinity; a token of probability zero is reported as vLLM does.
LOWEST = -9999.0


def json_log_prob(value: float) -> float:
    """A log-probability that JSON can carry."""
    return value if value > -math.inf else LOWEST


class TraceRenderer:
    """Renders traces of a request's tokens.

    Args:   stores: in the order of the retrieval's sources; none for the plain LM.
    """

    # Of entries behind the tokens; to look up so many takes as long as other work of the event loop can wait.
    _MUCH = 256

    def __init__(self, tokenizer: Tokenizer, stores: Sequence[Entries]) -> None:
        self._tokenizer = tokenizer
        self._stores = stores

    def answer(self) -> AnswerAttribution:
        """Where the attribution of a choice is added up."""
        return AnswerAttribution(self._stores)

    def is_much(self, events: Sequence[TokenEvent]) -> bool:
        """Whether rendering these takes long."""
        attributions = [event.trace.attribution for event in events if event.trace]
        return sum(len(some.entry_ids) for some in attributions if some is not None) > self._MUCH

    def entries(self, events: Sequence[TokenEvent], answer: AnswerAttribution) -> list[dict[str, Any]]:
        """How some tokens came about, with where their neighbours stand."""
        return [self._entry(event.token_id, event.trace, answer) for event in events if event.trace]

    def _entry(self, token_id: int, trace: TokenTrace, answer: AnswerAttribution) -> dict[str, Any]:
        entry = {
            "token_id": token_id,
            "token": self._tokenizer.token_text(token_id),
            "searched": trace.searched,
            "followed": trace.followed,
            "decision": trace.decision,
            "gate_score": trace.gate_score,
            "gate_threshold": trace.gate_threshold,
            "pointers": trace.num_pointers,
            "lambda": trace.lmbda,
            "p_lm": trace.p_lm,
            "p_knn": trace.p_knn,
            "p": trace.p,
            "neighbors": self._neighbors(trace.neighbors),
        }
        if trace.sources:
            entry["datastores"] = [
                {"name": store.name, "weight": source.weight, "lambda": source.lmbda, "p_knn": source.p_knn}
                for store, source in zip(self._stores, trace.sources, strict=True)
            ]
        if trace.attribution is not None:
            (entry["attribution"],) = answer.tokens(trace.attribution)
        return entry

    def _neighbors(self, near: Sequence[TracedNeighbor]) -> list[dict[str, Any]]:
        """Those whose document has not been deleted meanwhile."""
        ids = {source: [n.entry_id for n in near if n.source == source] for source in {n.source for n in near}}
        places = {source: iter(self._stores[source].locate(some)) for source, some in ids.items()}
        return [
            {
                "datastore": self._stores[neighbor.source].name,
                "entry_id": neighbor.entry_id,
                "distance": neighbor.distance,
                "weight": neighbor.weight,
                "token": self._tokenizer.token_text(neighbor.token_id),
                "document_id": place.document_id,
                "uri": place.uri,
                "title": place.title,
                "licence": place.licence,
                "char_start": place.char_start,
                "char_end": place.char_end,
            }
            for neighbor in near
            if (place := next(places[neighbor.source])) is not None
        ]
