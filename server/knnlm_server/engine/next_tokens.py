"""From rows of a pass to the next tokens of choices: mix, sample, and go on along a draft for as long as it is right.

A draft's rows were computed as if all of it came. Its tokens are drawn one after the other by the very steps that
decoding without a draft would take, gate, search and noise included; the first one that differs from the draft is the
last one drawn. Nothing is searched behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.drafts import NO_LEADS, Leads, find_leads
from knnlm_core.errors import KnnlmError
from knnlm_core.lm.protocol import CausalLM, Rows
from knnlm_core.mixture import Found, advance_walks, mix_rows
from knnlm_server.engine.draft_reading import read_for_drafts
from knnlm_server.engine.events import TokenTrace, TopTokens
from knnlm_server.engine.mixing import Mixing
from knnlm_server.engine.request import Choice, CompletionRequest
from knnlm_server.engine.sampler import SampleRow, sample, top_logprobs
from knnlm_server.engine.tracing import trace_rows


class Decided(NamedTuple):
    """For how many tokens a datastore was searched or followed."""

    searched: int
    followed: int


class StepFailure(NamedTuple):
    """A request that the step could not serve; the others are not touched by it."""

    request: CompletionRequest
    error: KnnlmError


class NextToken(NamedTuple):
    """A token that a step chose for one choice."""

    request: CompletionRequest
    choice: Choice
    token_id: int
    log_prob: float  # of the mixture, before penalties and temperature
    top: TopTokens
    decided: Decided
    trace: TokenTrace | None
    drafted: int  # tokens of the draft that began here
    was_drafted: bool  # whether a draft foresaw it


class NextRow(NamedTuple):
    """A row of the pass from which a token is drawn for one or more choices, and those after it, for a draft's tokens.

    Only one choice has a draft.
    """

    first_row: int
    request: CompletionRequest
    choices: Sequence[Choice]
    draft: Sequence[int] = ()


class SampledRows(NamedTuple):
    """The rows of a pass that tokens are drawn from, in the order of what they are wanted for."""

    lm_log_probs: Tensor  # (R, V) float32
    keys: Tensor  # (R, D) float32
    starts: list[int]  # of each wanted row and its draft

    @classmethod
    def of(cls, lm: CausalLM, output: Rows, wanted: Sequence[NextRow]) -> SampledRows:
        """Apply the head to the rows that are wanted, drafts and all."""
        rows: list[int] = []
        starts = []
        for each in wanted:
            starts.append(len(rows))
            rows += range(each.first_row, each.first_row + 1 + len(each.draft))
        index = torch.tensor(rows, device=output.keys.device)
        return cls(torch.log_softmax(lm.logits(output.hidden[index]), dim=1), output.keys[index], starts)

    def at(self, members: Sequence[int], depth: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and keys of the rows ``depth`` behind the first ones of some that are wanted."""
        if len(members) == len(self.keys):  # as without drafts: nothing to pick out
            return self.lm_log_probs, self.keys
        index = torch.tensor([self.starts[i] + depth for i in members], device=self.keys.device)
        return self.lm_log_probs[index], self.keys[index]


def next_tokens(
    rows: SampledRows, wanted: Sequence[NextRow], eos_token_ids: Sequence[int], mixing: Mixing, *, speculates: bool
) -> list[StepFailure | NextToken]:
    """Draw tokens until no draft is right any more; those of a choice come in order, and nothing after a failure.

    Args:   mixing: what it took and found is added to it.
    """
    outcomes: list[StepFailure | NextToken] = []
    failed: set[CompletionRequest] = set()
    going, depth = list(range(len(wanted))), 0
    while going:
        here = _Depth([wanted[i] for i in going], depth, *rows.at(going, depth))
        drawn = _draw(here, eos_token_ids, mixing, speculates=speculates)
        outcomes += drawn
        failed |= {outcome.request for outcome in drawn if isinstance(outcome, StepFailure)}
        right = {id(token.choice) for token in drawn if isinstance(token, NextToken) and token.was_drafted}
        going = [i for i in going if id(wanted[i].choices[0]) in right and wanted[i].request not in failed]
        depth += 1
    return outcomes


class _Depth(NamedTuple):
    """The rows that come ``depth`` tokens after the first ones."""

    wanted: Sequence[NextRow]
    depth: int
    lm_log_probs: Tensor  # (B, V)
    keys: Tensor  # (B, D)


class _Owner(NamedTuple):
    """Whose token a row of the mixture gives."""

    row: int
    request: CompletionRequest
    choice: Choice
    draft: Sequence[int]
    depth: int

    def came(self, token: int) -> list[int]:
        """What the choice got in this step, up to and with this token."""
        return [*self.draft[: self.depth], token]

    def foresaw(self, token: int) -> bool:
        """Whether the draft says this token."""
        return self.depth < len(self.draft) and self.draft[self.depth] == token


def _draw(
    here: _Depth, eos_token_ids: Sequence[int], mixing: Mixing, *, speculates: bool
) -> list[StepFailure | NextToken]:
    wanted, depth = here.wanted, here.depth
    positions = torch.tensor([len(row.request.prompt_ids) + len(row.choices[0].token_ids) + depth for row in wanted])
    retrievals = [row.request.retrieval for row in wanted]
    walks = [row.choices[0].walks for row in wanted]  # choices that part here begin alike
    mixed = mix_rows(here.lm_log_probs, here.keys, retrievals, positions.to(here.keys.device), walks)
    if any(retrieval is not None for retrieval in retrievals):
        mixing.add_drawn(mixed.found)
    failures = [StepFailure(wanted[row].request, error) for row, error in mixed.found.failures.items()]
    # A request fails as a whole, whichever of its choices were to be searched for.
    failed = {failure.request for failure in failures}
    owners = [
        _Owner(i, row.request, choice, row.draft, depth)
        for i, row in enumerate(wanted)
        if row.request not in failed
        for choice in row.choices
    ]
    if not owners:
        return list(failures)
    of_row = torch.tensor([owner.row for owner in owners], device=here.keys.device)
    # As without forks and failures: nothing to copy.
    is_whole = [owner.row for owner in owners] == list(range(len(wanted)))
    log_probs = mixed.log_probs if is_whole else mixed.log_probs[of_row]
    tokens = sample(log_probs, [_sampling(owner) for owner in owners], eos_token_ids=eos_token_ids)
    if lost := _advance(owners, mixed.found, tokens.tolist()):
        failures += lost
        failed = {failure.request for failure in lost}
        kept = [i for i, owner in enumerate(owners) if owner.request not in failed]
        owners, of_row, tokens = [owners[i] for i in kept], of_row[kept], tokens[kept]
        log_probs = log_probs[kept]
    if not owners:
        return list(failures)
    if speculates:
        _lead(owners, mixed.found, tokens.tolist())
    return [*failures, *_collect(owners, of_row, tokens, here.lm_log_probs, log_probs, mixed.found)]


def _sampling(owner: _Owner) -> SampleRow:
    request, choice = owner.request, owner.choice
    drafted = owner.draft[: owner.depth]
    return SampleRow(
        params=request.params,
        prompt_ids=request.prompt_ids,
        generated_ids=[*choice.token_ids, *drafted] if drafted else choice.token_ids,
        seed=request.seed,
        choice=choice.index,
        position=len(choice.token_ids) + owner.depth,
    )


def _advance(owners: Sequence[_Owner], found: Found, tokens: Sequence[int]) -> list[StepFailure]:
    """Move the walks of choices to where their tokens lead; a datastore that cannot be read fails its own requests."""
    walking = [(owner, token) for owner, token in zip(owners, tokens, strict=True) if owner.choice.walks]
    if not walking:
        return []
    try:
        _move(walking, found)
    except KnnlmError:
        return _move_each(walking, found)
    return []


def _move(walking: Sequence[tuple[_Owner, int]], found: Found) -> None:
    walks = [owner.choice.walks for owner, _ in walking]
    retrievals = [owner.request.retrieval for owner, _ in walking]
    rows = [owner.row for owner, _ in walking]
    moved = advance_walks(walks, retrievals, found, rows, [token for _, token in walking])
    for (owner, _), itself in zip(walking, moved, strict=True):
        owner.choice.walks = itself


def _move_each(walking: Sequence[tuple[_Owner, int]], found: Found) -> list[StepFailure]:
    """One by one, to see whose datastore it is."""
    failures = []
    for each in walking:
        try:
            _move([each], found)
        except KnnlmError as error:
            failures.append(StepFailure(each[0].request, error))
    return failures


def _lead(owners: Sequence[_Owner], found: Found, tokens: Sequence[int]) -> None:
    """Find what the choices' next drafts may be read from: behind the neighbours, or further along the last leads."""
    led = [
        (owner, token, owner.request.retrieval)
        for owner, token in zip(owners, tokens, strict=True)
        if owner.request.retrieval is not None
    ]
    if not led:
        return

    def read(members: Sequence[int]) -> list[Leads]:
        of_members = [led[i] for i in members]
        rows, came = [owner.row for owner, _, _ in of_members], [token for _, token, _ in of_members]
        return find_leads(found, rows, came, [retrieval for _, _, retrieval in of_members])

    leads = read_for_drafts([owner.request for owner, _, _ in led], read, NO_LEADS)
    for (owner, token, _), of_owner in zip(led, leads, strict=True):
        owner.choice.leads = of_owner if len(of_owner.entry_ids) else owner.choice.outlook.after(owner.came(token))


def _collect(
    owners: Sequence[_Owner], of_row: Tensor, tokens: Tensor, lm_log_probs: Tensor, log_probs: Tensor, found: Found
) -> list[NextToken]:
    most = max(owner.request.params.logprobs or 0 for owner in owners)
    chosen, top_ids, top_values = top_logprobs(log_probs, tokens, most)
    traced = [i for i, owner in enumerate(owners) if owner.request.trace_neighbors]
    requests = [owners[i].request for i in traced]
    traces = dict(zip(traced, trace_rows(traced, requests, of_row, tokens, chosen, lm_log_probs, found), strict=True))
    searched, followed = (rows[of_row].tolist() for rows in (found.searched, found.followed))
    columns = zip(owners, tokens.tolist(), chosen.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    result = []
    for i, (owner, token_id, log_prob, ids, values) in enumerate(columns):
        wanted = owner.request.params.logprobs or 0
        top = list(zip(ids[:wanted], values[:wanted], strict=True))
        decided = Decided(int(searched[i]), int(followed[i]))
        drafted, foreseen = 0 if owner.depth else len(owner.draft), owner.foresaw(token_id)
        result.append(
            NextToken(owner.request, owner.choice, token_id, log_prob, top, decided, traces.get(i), drafted, foreseen)
        )
    return result
