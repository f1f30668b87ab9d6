"""One step of generation: forward, mix, sample. No queues, no threads, no clients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.head import LOGIT_ELEMENTS_PER_CHUNK
from knnlm_core.lm.protocol import CausalLM, Rows, Span
from knnlm_core.mixture import MixedRows, context_of, mix_found, start_walks
from knnlm_core.replay import Run, replay
from knnlm_core.retrieval import NEIGHBORS_AT_ONCE, Retrieval
from knnlm_server.engine.events import PromptEvent
from knnlm_server.engine.mixing import Mixing, wait_for
from knnlm_server.engine.next_tokens import Decided, NextRow, NextToken, SampledRows, StepFailure, next_tokens
from knnlm_server.engine.request import CompletionRequest
from knnlm_server.engine.sampler import top_logprobs
from knnlm_server.engine.scheduler import Batch, Chunk


class PromptScores(NamedTuple):
    """Log-probabilities of some tokens of a request's prompt."""

    request: CompletionRequest
    event: PromptEvent
    decided: Decided


class PromptRead(NamedTuple):
    """A prompt is complete and nothing is to follow it."""

    request: CompletionRequest


Outcome = StepFailure | PromptScores | PromptRead | NextToken


class Step(NamedTuple):
    """What a step came to; the tokens of a choice are in order."""

    outcomes: list[Outcome]
    pass_seconds: float  # that the language model took for the rows that were sampled from
    draw_seconds: float  # that mixing and sampling took, for each token of the choice that got most
    forward_seconds: float  # that the language model took in all
    mixing: Mixing


@torch.inference_mode()
def run_step(lm: CausalLM, batch: Batch, eos_token_ids: Sequence[int], speculates: bool = False) -> Step:
    """Advance every decoding choice by a token, and by those of its draft that it would have chosen too, and every
    prompt by its chunk.

    A prompt that becomes complete is forked into its choices, which all draw their first token from its last row.

    Args:   speculates: find leads for the drafts of the next step.
    """
    begun, mixing = time.perf_counter(), Mixing()
    output = lm.forward(_spans(batch))
    plan = _plan_rows(lm, batch)
    if plan.scored:
        wait_for(output.keys)
    forward_seconds = time.perf_counter() - begun
    outcomes: list[Outcome] = []
    failed = set()
    for scored in plan.scored:
        for outcome in _score_prompt(lm, output, scored, mixing):
            outcomes.append(outcome)
            if isinstance(outcome, StepFailure):
                failed.add(outcome.request)
    outcomes += [PromptRead(request) for request in plan.read if request not in failed]
    wanted = [row for row in plan.next if row.request not in failed]
    if not wanted:
        return Step(outcomes, 0.0, 0.0, forward_seconds, mixing)
    before_head = time.perf_counter()
    rows = SampledRows.of(lm, output, wanted)
    wait_for(rows.lm_log_probs)
    pass_seconds = time.perf_counter() - begun
    forward_seconds += begun + pass_seconds - before_head
    outcomes += next_tokens(rows, wanted, eos_token_ids, mixing, speculates=speculates)
    most = _rewind(lm, batch, outcomes)
    draw_seconds = (time.perf_counter() - begun - pass_seconds) / most
    return Step(outcomes, pass_seconds, draw_seconds, forward_seconds, mixing)


def _rewind(lm: CausalLM, batch: Batch, outcomes: Sequence[Outcome]) -> int:
    """Forget the tokens of drafts that were not chosen; returns how many tokens the choice got that got most, or 1."""
    came = Counter(id(outcome.choice) for outcome in outcomes if isinstance(outcome, NextToken))
    for _, choice, draft in batch.decodes:
        assert choice.sequence is not None
        # The last token that came is in no pass yet.
        rejected = len(draft) - max(0, came[id(choice)] - 1)
        if rejected:
            lm.rewind(choice.sequence, lm.length(choice.sequence) - rejected)
    return max(came.values(), default=1)


class _ScoredRows(NamedTuple):
    """Neighbouring rows of the pass that predict known prompt tokens."""

    first_row: int
    request: CompletionRequest
    first_target: int  # position of the first of them in the prompt
    num_targets: int


class _RowPlan(NamedTuple):
    """What the rows of a pass are for."""

    next: list[NextRow]
    scored: list[_ScoredRows]
    read: list[CompletionRequest]


def _spans(batch: Batch) -> list[Span]:
    spans = []
    for _, choice, draft in batch.decodes:
        assert choice.sequence is not None
        spans.append(Span(choice.sequence, [choice.token_ids[-1], *draft], rows=1 + len(draft)))
    for chunk in batch.chunks:
        sequence = chunk.request.choices[0].sequence
        assert sequence is not None, "a chunk of a request that has no sequence. This is a bug."
        spans.append(Span(sequence, chunk.request.prompt_ids[chunk.start : chunk.stop], rows=_num_rows(chunk)))
    return spans


def _num_rows(chunk: Chunk) -> int:
    """How many of a chunk's rows anybody looks at."""
    return chunk.stop - chunk.start if chunk.request.prompt_logprobs is not None else int(chunk.is_last)


def _plan_rows(lm: CausalLM, batch: Batch) -> _RowPlan:
    """Account for what the pass appended, and say what its rows are for."""
    plan = _RowPlan([], [], [])
    row = 0
    for request, choice, draft in batch.decodes:
        plan.next.append(NextRow(row, request, [choice], draft))
        row += 1 + len(draft)
    for chunk in batch.chunks:
        request = chunk.request
        if chunk.start == 0 and request.prompt_logprobs is not None:
            request.prompt_walks = start_walks(request.retrieval)
        request.num_prefilled = chunk.stop
        rows = _num_rows(chunk)
        if request.prompt_logprobs is not None:
            # The row at position t predicts token t + 1.
            num_targets = min(chunk.stop + 1, len(request.prompt_ids)) - (chunk.start + 1)
            plan.scored.append(_ScoredRows(row, request, chunk.start + 1, num_targets))
        if chunk.is_last and not request.params.max_tokens:
            plan.read.append(request)
        elif chunk.is_last:
            first = request.choices[0]
            assert first.sequence is not None
            for choice in request.choices[1:]:
                choice.sequence = lm.copy(first.sequence)
            for choice in request.choices:
                choice.walks = start_walks(request.retrieval)
            plan.next.append(NextRow(row + rows - 1, request, request.choices))
        row += rows
    return plan


def _score_prompt(
    lm: CausalLM, output: Rows, scored: _ScoredRows, mixing: Mixing
) -> Iterator[PromptScores | StepFailure]:
    """Score prompt tokens, so many at a time that their whole distributions fit in memory."""
    request = scored.request
    size = rows_at_once(lm, request.retrieval)
    for start in range(0, scored.num_targets, size):
        count = min(size, scored.num_targets - start)
        first = scored.first_target + start
        positions = torch.arange(first, first + count, device=output.keys.device)
        targets = torch.tensor(request.prompt_ids[first : first + count], device=output.keys.device)
        rows = slice(scored.first_row + start, scored.first_row + start + count)
        lm_log_probs = torch.log_softmax(lm.logits(output.hidden[rows]), dim=1)
        try:
            mixed = _mix_prompt(request, lm_log_probs, output.keys[rows], targets, positions)
        except KnnlmError as error:
            yield StepFailure(request, error)
            return
        if request.retrieval is not None:
            mixing.add_timings(mixed.found.timings)
        chosen, top_ids, top_values = top_logprobs(mixed.log_probs, targets, request.prompt_logprobs or 0)
        tops = [
            list(zip(ids, values, strict=True))
            for ids, values in zip(top_ids.tolist(), top_values.tolist(), strict=True)
        ]
        found = mixed.found
        decided = Decided(int(found.searched.sum()), int(found.followed.sum()))
        yield PromptScores(request, PromptEvent(chosen.tolist(), tops), decided)


def _mix_prompt(
    request: CompletionRequest, lm_log_probs: Tensor, keys: Tensor, targets: Tensor, positions: Tensor
) -> MixedRows:
    """Mix rows of a prompt, each one token after the one before.

    Raises: KnnlmError: a datastore could not be searched.
    """
    retrievals = [request.retrieval] * len(targets)
    context = context_of(lm_log_probs, retrievals, positions)
    replayed = replay(keys, targets, retrievals, context, [Run(range(len(targets)), request.prompt_walks)])
    (request.prompt_walks,) = replayed.walks
    return mix_found(lm_log_probs, replayed.found)


def rows_at_once(lm: CausalLM, retrieval: Retrieval | None) -> int:
    """Rows whose distributions and neighbours fit in memory together."""
    rows = LOGIT_ELEMENTS_PER_CHUNK // lm.identity.vocab_size
    return max(1, min(rows, NEIGHBORS_AT_ONCE // retrieval.k) if retrieval is not None else rows)
