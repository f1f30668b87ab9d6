"""From engine events to the JSON that clients read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.mixture import Retrieval
from knnlm_server.engine.events import Finished, FinishReason, RetrievalCounts, TokenEvent, TokenTrace

# JSON has no infinity; a token of probability zero is reported as vLLM does.
LOWEST = -9999.0


def json_log_prob(value: float) -> float:
    """A log-probability that JSON can carry."""
    return value if value > -math.inf else LOWEST


class ChoiceText:
    """Collects one choice's events between two renderings: all of them, or those of one stream chunk."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, datastore: Datastore | None, *, with_logprobs: bool, with_trace: bool
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._datastore = datastore
        self._with_logprobs = with_logprobs
        self._with_trace = with_trace
        self._offset = 0  # characters of the tokens reported so far
        self._text: list[str] = []
        self._events: list[TokenEvent] = []
        self._finish_reason: FinishReason | None = None

    def add(self, event: TokenEvent) -> None:
        """Take in one token."""
        self._text.append(event.text)
        self._finish_reason = event.finish_reason
        self._events.append(event)

    @property
    def has_news(self) -> bool:
        """Whether a chunk rendered now would tell the client anything."""
        shows_tokens = (self._with_logprobs or self._with_trace) and self._events
        return bool(any(self._text) or self._finish_reason or shows_tokens)

    def take(self) -> dict[str, Any]:
        """Render what was collected and forget it."""
        choice: dict[str, Any] = {
            "index": self._index,
            "text": "".join(self._text),
            "logprobs": self._logprobs() if self._with_logprobs else None,
            "finish_reason": self._finish_reason,
        }
        if self._with_trace:
            choice["knn"] = [self._trace(e.token_id, e.trace) for e in self._events if e.trace]
        self._text, self._events = [], []
        return choice

    def _logprobs(self) -> dict[str, Any]:
        tokens, log_probs, tops, offsets = [], [], [], []
        for event in self._events:
            token = self._tokenizer.token_text(event.token_id)
            tokens.append(token)
            log_probs.append(json_log_prob(event.log_prob))
            # Distinct ids can decode to one string: the more probable one keeps it.
            top: dict[str, float] = {}
            for token_id, log_prob in (*event.top, (event.token_id, event.log_prob)):
                text = self._tokenizer.token_text(token_id)
                top[text] = max(json_log_prob(log_prob), top.get(text, -math.inf))
            tops.append(top)
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": tops, "text_offset": offsets}

    def _trace(self, token_id: int, trace: TokenTrace) -> dict[str, Any]:
        near = trace.neighbors
        places = self._datastore.locate([n.entry_id for n in near]) if self._datastore is not None and near else []
        return {
            "token_id": token_id,
            "token": self._tokenizer.token_text(token_id),
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
                    "token": self._tokenizer.token_text(neighbor.token_id),
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


def render_chunk(header: dict[str, Any], choice: dict[str, Any], *, usage_follows: bool) -> dict[str, Any]:
    """One stream chunk; ``usage`` is null in all but the last one, once it was asked for."""
    return {**header, "choices": [choice], **({"usage": None} if usage_follows else {})}


def render_usage(finished: Sequence[Finished], retrieval: Retrieval | None) -> dict[str, Any]:
    """Token counts of a whole HTTP request."""
    prompt_tokens = sum(f.prompt_tokens for f in finished)
    completion_tokens = sum(f.completion_tokens for f in finished)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if retrieval is not None:
        fields = RetrievalCounts.__slots__
        usage["knn"] = {name: sum(getattr(f.counts, name) for f in finished) for name in fields}
    return usage
