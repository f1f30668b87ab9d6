"""One step of generation: forward, mix, sample. No queues, no threads, no clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.protocol import CausalLM, Span
from knnlm_core.mixture import MixedRows, mix_rows
from knnlm_server.engine.events import TokenTrace
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampler import SampleRow, sample, top_logprobs
from knnlm_server.engine.scheduler import Batch
from knnlm_server.engine.tracing import trace_rows


class StepFailure(NamedTuple):
    """A request that the step could not serve; the others are not touched by it."""

    request: CompletionRequest
    error: KnnlmError


class NextToken(NamedTuple):
    """The token that a step chose for one choice."""

    request: CompletionRequest
    choice: Choice
    token_id: int
    log_prob: float  # of the mixture, before penalties and temperature
    top: Sequence[tuple[int, float]]
    searched: bool
    trace: TokenTrace | None


@torch.inference_mode()
def run_step(lm: CausalLM, batch: Batch, eos_token_ids: Sequence[int]) -> list[NextToken | StepFailure]:
    """Advance every decoding choice by a token and every prompt by its chunk.

    A prompt that becomes complete is forked into its choices, which all draw their first token from its last row.
    """
    output = lm.forward(_spans(lm, batch))
    rows, sources = _complete(lm, batch)
    if not rows:
        return []
    lm_log_probs = torch.log_softmax(lm.logits(output.hidden), dim=1)
    mixed = mix_rows(lm_log_probs, output.keys, [request.retrieval for request in sources])
    failures = [StepFailure(sources[row], error) for row, error in mixed.found.failures.items()]
    rows = [owner for owner in rows if owner[0] not in mixed.found.failures]
    if not rows:
        return list(failures)
    of_row = torch.tensor([row for row, _, _ in rows], device=lm_log_probs.device)
    sampling = [_sampling(request, choice) for _, request, choice in rows]
    tokens = sample(mixed.log_probs[of_row], sampling, eos_token_ids=eos_token_ids)
    return [*failures, *_collect(rows, of_row, tokens, lm_log_probs, mixed)]


_RowOwner = tuple[int, CompletionRequest, Choice]  # row of the forward pass, and whose token it gives


def _spans(lm: CausalLM, batch: Batch) -> list[Span]:
    spans = []
    for _, choice in batch.decodes:
        assert choice.sequence is not None
        spans.append(Span(choice.sequence, choice.token_ids[-1:]))
    for chunk in batch.chunks:
        first = chunk.request.choices[0]
        if first.sequence is None:
            first.sequence = lm.allocate()
        tokens = chunk.request.prompt_ids[chunk.start : chunk.stop]
        spans.append(Span(first.sequence, tokens, rows=int(chunk.is_last)))
    return spans


def _complete(lm: CausalLM, batch: Batch) -> tuple[list[_RowOwner], list[CompletionRequest]]:
    """Account for what the pass appended; returns whose tokens its rows give, and the request of each row."""
    rows = [(row, request, choice) for row, (request, choice) in enumerate(batch.decodes)]
    sources = [request for request, _ in batch.decodes]
    for chunk in batch.chunks:
        request = chunk.request
        request.num_prefilled = chunk.stop
        if chunk.is_last:
            first = request.choices[0]
            assert first.sequence is not None
            for choice in request.choices[1:]:
                choice.sequence = lm.copy(first.sequence)
            rows += [(len(sources), request, choice) for choice in request.choices]
            sources.append(request)
    return rows, sources


def _sampling(request: CompletionRequest, choice: Choice) -> SampleRow:
    return SampleRow(
        params=request.params,
        prompt_ids=request.prompt_ids,
        generated_ids=choice.token_ids,
        seed=request.seed,
        choice=choice.index,
        position=len(choice.token_ids),
    )


def _collect(
    rows: Sequence[_RowOwner], of_row: Tensor, tokens: Tensor, lm_log_probs: Tensor, mixed: MixedRows
) -> list[NextToken]:
    most = max(request.params.logprobs or 0 for _, request, _ in rows)
    chosen, top_ids, top_values = top_logprobs(mixed.log_probs[of_row], tokens, most)
    traced = [i for i, (_, request, _) in enumerate(rows) if request.trace_neighbors]
    traces = dict(zip(traced, trace_rows(traced, rows, of_row, tokens, chosen, lm_log_probs, mixed.found), strict=True))
    searched = mixed.found.searched[of_row].tolist()
    columns = zip(rows, tokens.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    result = []
    for i, ((_, request, choice), token_id, log_prob, ids, values) in enumerate(columns):
        wanted = request.params.logprobs or 0
        top = list(zip(ids[:wanted], values[:wanted], strict=True))
        result.append(NextToken(request, choice, token_id, log_prob, top, searched[i], traces.get(i)))
    return result
