"""``POST /v1/score``: how well the base LM and the mixture predict given texts, side by side."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Request

from knnlm_core.errors import InvalidParameter, KnnlmError
from knnlm_server.api.disconnect import until_disconnect
from knnlm_server.api.schemas.common import TokenIds
from knnlm_server.api.schemas.score import MAX_TEXTS, ScoreBody, Windows
from knnlm_server.api.security import KeyRequired
from knnlm_server.api.selection import Selection, select
from knnlm_server.api.state import Backend, service
from knnlm_server.api.trace_rendering import json_log_prob
from knnlm_server.engine.scoring import ScoreRequest, TokenScores

router = APIRouter(dependencies=[KeyRequired])

LN2 = math.log(2)


@router.post("/v1/score", summary="Score texts", response_model=None)
async def score(body: ScoreBody, request: Request) -> dict[str, Any]:
    """Score each token of each text once, by rolling windows, with the base LM and with the mixture.

    A document that is in the datastore must be excluded by its id, or it retrieves itself.
    """
    state = service(request)
    body.log_unknown()
    backend = state.require()
    windows = body.windows(backend.lm.max_length)
    given = _checked_texts(body)
    # Thousands of long texts take seconds: streams must not wait for them.
    texts = await asyncio.to_thread(lambda: [_tokenise(backend, text) for text in given])
    selection = select(state, body.model, body.knn, body.exclude_documents)
    job = _Job(backend, selection, texts, windows, request.state.request_id)
    try:
        scores = await until_disconnect(request, job.scores())
    finally:
        job.close()
    return await asyncio.to_thread(_render, backend, selection, texts, scores, body.per_token)


class _Text(NamedTuple):
    """A text ready to be scored."""

    token_ids: list[int]
    starts: list[int] | None  # character offset of each token, where the input was text
    num_bytes: int  # UTF-8 bytes of the scored tokens


class _Job:
    """One HTTP request: its engine request, and the lease that is given back when that ends."""

    def __init__(
        self, backend: Backend, selection: Selection, texts: list[_Text], windows: Windows, request_id: str
    ) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[KnnlmError | None] = self._loop.create_future()
        self._scores: dict[int, TokenScores] = {}
        self._scored = [index for index, text in enumerate(texts) if len(text.token_ids) > 1]
        self._selection = selection
        self._request = ScoreRequest(
            request_id=request_id,
            texts=[texts[index].token_ids for index in self._scored],
            retrieval=selection.retrieval,
            window=windows.window,
            stride=windows.stride,
            on_text=lambda position, scores: self._scores.__setitem__(self._scored[position], scores),
            on_end=self._ended,
        )
        if not self._scored:
            self._ended(None)
            return
        try:
            backend.engine.submit(self._request)
        except KnnlmError:
            selection.release()
            raise

    def _ended(self, error: KnnlmError | None) -> None:
        self._selection.release()
        with suppress(RuntimeError):  # the event loop is gone: the server is shutting down
            self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: KnnlmError | None) -> None:
        if not self._done.done():
            self._done.set_result(error)

    async def scores(self) -> dict[int, TokenScores]:
        """Scores by position of the text; texts without a scored token are absent. Raises what made it fail."""
        error = await self._done
        if error is not None:
            raise error
        return self._scores

    def close(self) -> None:
        """End what still runs; what has ended is left alone."""
        self._backend.engine.abort(self._request)


def _checked_texts(body: ScoreBody) -> list[str | TokenIds]:
    texts = body.texts()
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise InvalidParameter(f"`input` must hold 1 … {MAX_TEXTS} texts, got {len(texts)}", param="input")
    return texts


def _tokenise(backend: Backend, text: str | TokenIds) -> _Text:
    tokenizer = backend.tokenizer
    if isinstance(text, str):
        encoding = tokenizer.encode_with_spans(text)
        starts = encoding.char_spans[:, 0].tolist()
        first_scored = starts[1] if len(starts) > 1 else len(text)
        return _Text(encoding.token_ids.tolist(), starts, len(text[first_scored:].encode()))
    tokenizer.check_ids(text, backend.lm.identity.vocab_size, param="input")
    num_bytes = len(tokenizer.decode(text).encode()) - len(tokenizer.decode(text[:1]).encode())
    return _Text(text, None, max(0, num_bytes))


def _render(
    backend: Backend, selection: Selection, texts: list[_Text], scores: dict[int, TokenScores], per_token: bool
) -> dict[str, Any]:
    results = []
    total = {"tokens": 0, "bytes": 0, "searched": 0, "base": 0.0, "mixed": 0.0}
    for index, text in enumerate(texts):
        found = scores.get(index)
        # Summed in float64: a long text has many small terms.
        sums = {
            "tokens": 0 if found is None else len(found.base),
            "bytes": 0 if found is None else text.num_bytes,
            "searched": 0 if found is None else int(found.searched.sum()),
            "base": 0.0 if found is None else -float(found.base.sum(dtype=np.float64)),
            "mixed": 0.0 if found is None else -float(found.mixed.sum(dtype=np.float64)),
        }
        for name, value in sums.items():
            total[name] += value
        result = {"index": index, **_measures(sums)}
        if per_token:
            result["per_token"] = [] if found is None else _per_token(backend, selection, text, found)
        results.append(result)
    return {
        "object": "score",
        "model": selection.model,
        "system_fingerprint": selection.system_fingerprint,
        "results": results,
        "total": _measures(total),
    }


def _measures(sums: dict[str, Any]) -> dict[str, Any]:
    """Counts, and for base and mixed: nll in nats (summed), perplexity per token, bits per byte."""
    tokens, num_bytes = sums["tokens"], sums["bytes"]

    def of(nll: float) -> dict[str, float | None]:
        return {
            # JSON has no infinity: λ = 1 can give a token probability zero
            "nll": nll if math.isfinite(nll) else None,
            "perplexity": math.exp(min(nll / tokens, 700.0)) if tokens and math.isfinite(nll) else None,
            "bits_per_byte": nll / LN2 / num_bytes if num_bytes and math.isfinite(nll) else None,
        }

    counts = {name: sums[name] for name in ("tokens", "bytes", "searched")}
    return {**counts, "base": of(sums["base"]), "mixed": of(sums["mixed"])}


def _per_token(backend: Backend, selection: Selection, text: _Text, found: TokenScores) -> list[dict[str, Any]]:
    gate = selection.retrieval.gate.value if selection.retrieval is not None else "base"
    columns = zip(text.token_ids[1:], found.base.tolist(), found.mixed.tolist(), found.lmbda.tolist(), strict=True)
    return [
        {
            "id": token_id,
            "token": backend.tokenizer.token_text(token_id),
            "offset": text.starts[position] if text.starts is not None else None,
            "base": json_log_prob(base),
            "mixed": json_log_prob(mixed),
            "lambda": selection.retrieval.lmbda if selection.retrieval is not None and lmbda > 0 else 0.0,
            "decision": gate,
        }
        for position, (token_id, base, mixed, lmbda) in enumerate(columns, start=1)
    ]
