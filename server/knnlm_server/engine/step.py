"""One step of generation: forward, mix, sample. No queues, no threads, no clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.errors import KnnlmError
from knnlm_core.lm.head import LOGIT_ELEMENTS_PER_CHUNK
from knnlm_core.lm.protocol import CausalLM, Rows, Span
from knnlm_core.mixture import Found, MixedRows, advance_walks, context_of, mix_found, mix_rows, start_walks
from knnlm_core.replay import Run, replay
from knnlm_core.retrieval import NEIGHBORS_AT_ONCE, Retrieval
from knnlm_server.engine.events import PromptEvent, TokenTrace, TopTokens
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampler import SampleRow, sample, top_logprobs
from knnlm_server.engine.scheduler import Batch, Chunk
from knnlm_server.engine.tracing import trace_rows


class Decided(NamedTuple):
    """For how many tokens a datastore was searched or followed."""

    searched: int
    followed: int


class StepFailure(NamedTuple):
    """A request that the step could not serve; the others are not touched by it."""

    request: CompletionRequest
    error: KnnlmError


class PromptScores(NamedTuple):
    """Log-probabilities of some tokens of a request's prompt."""

    request: CompletionRequest
    event: PromptEvent
    decided: Decided


class PromptRead(NamedTuple):
    """A prompt is complete and nothing is to follow it."""

    request: CompletionRequest


class NextToken(NamedTuple):
    """The token that a step chose for one choice."""

    request: CompletionRequest
    choice: Choice
    token_id: int
    log_prob: float  # of the mixture, before penalties and temperature
    top: TopTokens
    decided: Decided
    trace: TokenTrace | None


Outcome = StepFailure | PromptScores | PromptRead | NextToken


@torch.inference_mode()
def run_step(lm: CausalLM, batch: Batch, eos_token_ids: Sequence[int]) -> list[Outcome]:
    """Advance every decoding choice by a token and every prompt by its chunk.

    A prompt that becomes complete is forked into its choices, which all draw their first token from its last row.
    """
    output = lm.forward(_spans(batch))
    plan = _plan_rows(lm, batch)
    outcomes: list[Outcome] = []
    failed = set()
    for scored in plan.scored:
        for outcome in _score_prompt(lm, output, scored):
            outcomes.append(outcome)
            if isinstance(outcome, StepFailure):
                failed.add(outcome.request)
    outcomes += [PromptRead(request) for request in plan.read if request not in failed]
    return outcomes + _next_tokens(lm, output, [row for row in plan.next if row.request not in failed], eos_token_ids)


class _NextRow(NamedTuple):
    """A row of the pass whose next token is drawn for one or more choices."""

    row: int
    request: CompletionRequest
    choices: Sequence[Choice]


class _ScoredRows(NamedTuple):
    """Neighbouring rows of the pass that predict known prompt tokens."""

    first_row: int
    request: CompletionRequest
    first_target: int  # position of the first of them in the prompt
    num_targets: int


class _RowPlan(NamedTuple):
    """What the rows of a pass are for."""

    next: list[_NextRow]
    scored: list[_ScoredRows]
    read: list[CompletionRequest]


def _spans(batch: Batch) -> list[Span]:
    spans = []
    for _, choice in batch.decodes:
        assert choice.sequence is not None
        spans.append(Span(choice.sequence, choice.token_ids[-1:]))
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
    plan = _RowPlan([_NextRow(row, request, [choice]) for row, (request, choice) in enumerate(batch.decodes)], [], [])
    row = len(batch.decodes)
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
            plan.next.append(_NextRow(row + rows - 1, request, request.choices))
        row += rows
    return plan


def _score_prompt(lm: CausalLM, output: Rows, scored: _ScoredRows) -> Iterator[PromptScores | StepFailure]:
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


def _next_tokens(
    lm: CausalLM, output: Rows, wanted: Sequence[_NextRow], eos_token_ids: Sequence[int]
) -> list[StepFailure | NextToken]:
    if not wanted:
        return []
    index = torch.tensor([row.row for row in wanted], device=output.keys.device)
    lm_log_probs = torch.log_softmax(lm.logits(output.hidden[index]), dim=1)
    positions = torch.tensor([len(row.request.prompt_ids) + len(row.choices[0].token_ids) for row in wanted])
    retrievals = [row.request.retrieval for row in wanted]
    walks = [row.choices[0].walks for row in wanted]  # choices that part here begin alike
    mixed = mix_rows(lm_log_probs, output.keys[index], retrievals, positions.to(index.device), walks)
    failures = [StepFailure(wanted[row].request, error) for row, error in mixed.found.failures.items()]
    # A request fails as a whole, whichever of its choices were to be searched for.
    failed = {failure.request for failure in failures}
    owners = [
        (i, row.request, choice) for i, row in enumerate(wanted) if row.request not in failed for choice in row.choices
    ]
    if not owners:
        return list(failures)
    of_row = torch.tensor([row for row, _, _ in owners], device=lm_log_probs.device)
    sampling = [_sampling(request, choice) for _, request, choice in owners]
    tokens = sample(mixed.log_probs[of_row], sampling, eos_token_ids=eos_token_ids)
    if lost := _advance(owners, mixed.found, tokens.tolist()):
        failures += lost
        failed = {failure.request for failure in lost}
        kept = [i for i, (_, request, _) in enumerate(owners) if request not in failed]
        owners, of_row, tokens = [owners[i] for i in kept], of_row[kept], tokens[kept]
    return [*failures, *_collect(owners, of_row, tokens, lm_log_probs, mixed)] if owners else list(failures)


_RowOwner = tuple[int, CompletionRequest, Choice]  # row of the mixture, and whose token it gives


def _advance(owners: Sequence[_RowOwner], found: Found, tokens: Sequence[int]) -> list[StepFailure]:
    """Move the walks of choices to where their tokens lead; a datastore that cannot be read fails its own requests."""
    walking = [(owner, token) for owner, token in zip(owners, tokens, strict=True) if owner[2].walks]
    if not walking:
        return []
    try:
        _move(walking, found)
    except KnnlmError:
        return _move_each(walking, found)
    return []


def _move(walking: Sequence[tuple[_RowOwner, int]], found: Found) -> None:
    owners, tokens = zip(*walking, strict=True)
    rows, requests, choices = zip(*owners, strict=True)
    moved = advance_walks([c.walks for c in choices], [r.retrieval for r in requests], found, rows, tokens)
    for choice, walks in zip(choices, moved, strict=True):
        choice.walks = walks


def _move_each(walking: Sequence[tuple[_RowOwner, int]], found: Found) -> list[StepFailure]:
    """One by one, to see whose datastore it is."""
    failures = []
    for each in walking:
        try:
            _move([each], found)
        except KnnlmError as error:
            failures.append(StepFailure(each[0][1], error))
    return failures


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
    searched, followed = (rows[of_row].tolist() for rows in (mixed.found.searched, mixed.found.followed))
    columns = zip(rows, tokens.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    result = []
    for i, ((_, request, choice), token_id, log_prob, ids, values) in enumerate(columns):
        wanted = request.params.logprobs or 0
        top = list(zip(ids[:wanted], values[:wanted], strict=True))
        decided = Decided(int(searched[i]), int(followed[i]))
        result.append(NextToken(request, choice, token_id, log_prob, top, decided, traces.get(i)))
    return result
