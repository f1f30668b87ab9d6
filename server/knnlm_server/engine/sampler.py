"""Choose next tokens from the mixture's log-probabilities: pure functions of tensors and integers.

Order: logit_bias → min_tokens → penalties → temperature → top_k → top_p → min_p → sample. Scores start as
log-probabilities, the only scores that a mixture has; that differs from logits by a constant per row, which only
`repetition_penalty` can tell (it makes p into p^penalty, whatever the base LM's logits were).

Sampling inverts the cumulative distribution, in token-id order, in float64, at one uniform number per token: a function
of (seed, choice, position) alone. So a row's token depends neither on the other rows of the batch nor on its place
among them, and drafted tokens can be verified with the very noise that step-by-step decoding would use.

Ties are always settled for the lowest token id: greedy choice, the border of top_k and top_p, and `top_logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm_core.errors import EngineFailure
from knnlm_server.engine.sampling_params import SamplingParams

TokenIds = Sequence[int] | NDArray[np.int64]

# Scores held in float64 at once: bounds memory at wide batches and keeps a chunk in cache.
_CHUNK_ELEMENTS = 1 << 21
# How many of the most likely tokens are ranked at first to find the border of top_p, and by what it grows.
_FIRST_WIDTH = 256
_WIDTH_FACTOR = 16


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of log-probabilities is sampled with.

    Attributes:
        seed: `SamplingParams.seed`, or the number that the engine drew in its place; any 64-bit integer.
        choice: which of the request's choices, so that they differ under one seed.
        position: how many tokens were generated before this one.
        prompt_ids, generated_ids: read only where a penalty is on; generated_ids ends before this token.
    """

    params: SamplingParams
    seed: int
    choice: int
    position: int
    prompt_ids: TokenIds = ()
    generated_ids: TokenIds = ()


class TopLogProbs(NamedTuple):
    """Log-probabilities to report; the chosen token's float is the same wherever it appears."""

    chosen: Tensor  # (B,) of the chosen token
    token_ids: Tensor  # (B, n) int64, most likely first, ties by token id
    log_probs: Tensor  # (B, n)


def sample(log_probs: Tensor, rows: Sequence[SampleRow], *, eos_token_ids: Sequence[int] = ()) -> Tensor:
    """Choose one token per row.

    Args:
        log_probs: (B, V) float32, natural log, normalised; −inf is a token that cannot be. Left unchanged.
        rows: B of them.
        eos_token_ids: the model's own; masked, with the row's stop tokens, until `min_tokens`. Where that would leave
            no token at all (λ = 1 and every neighbour says EOS), the row is not masked.
    Returns: (B,) int64 token ids, each of probability > 0, on the device of ``log_probs``.
    Raises:  EngineFailure: a row holds NaN, +inf or no possible token.
    """
    assert len(rows) == log_probs.shape[0], f"{len(rows)} rows for {log_probs.shape[0]} distributions. This is a bug."
    groups: dict[tuple[bool, bool], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((_is_adjusted(row), row.params.is_greedy), []).append(index)

    token_ids = torch.empty(len(rows), dtype=torch.int64, device=log_probs.device)
    for (adjusted, greedy), members in groups.items():
        for part in _parts(members, whole=greedy and not adjusted, width=log_probs.shape[1]):
            part_rows = [rows[index] for index in part]
            scores = log_probs if len(part) == len(rows) else log_probs[part]
            if adjusted:
                scores = _adjust(scores.to(torch.float64, copy=True), part_rows, eos_token_ids)
            chosen = _most_likely(scores, part) if greedy else _draw(scores, part_rows, part)
            if len(part) == len(rows):
                return chosen
            token_ids[part] = chosen
    return token_ids


def top_logprobs(log_probs: Tensor, chosen: Tensor, n: int) -> TopLogProbs:
    """Read the chosen tokens' log-probabilities and the ``n`` best of each row.

    Args:
        log_probs: (B, V), as given to `sample`.
        chosen: (B,) int64.
        n: at most V are returned.
    """
    rows, vocab_size = log_probs.shape
    of_chosen = log_probs.gather(1, chosen[:, None]).squeeze(1)
    n = min(n, vocab_size)
    if n == 0:
        return TopLogProbs(of_chosen, chosen.new_empty(rows, 0), log_probs.new_empty(rows, 0))
    ranked, token_ids = log_probs.topk(min(n + 1, vocab_size))
    token_ids = token_ids[:, :n]
    if n < vocab_size:
        # topk says nothing about which of several equal tokens it takes at the border.
        torn = (ranked[:, n - 1] == ranked[:, n]).nonzero().squeeze(1)
        if len(torn):
            kept = torch.full_like(torn, n)
            keep = _first(log_probs[torn], ranked[torn], kept)
            token_ids = token_ids.index_copy(0, torn, keep.nonzero()[:, 1].view(-1, n))
    token_ids = token_ids.sort(1).values
    ranked, order = log_probs.gather(1, token_ids).sort(dim=1, descending=True, stable=True)
    return TopLogProbs(of_chosen, token_ids.gather(1, order), ranked)


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) that a token is sampled with.

    Philox4x64-10 (Salmon et al. 2011) with key (seed mod 2⁶⁴, choice) and counter (position, 0, 0, 0): the upper 53
    bits of its first output. NumPy guarantees the stream of a bit generator across versions (NEP 19).
    """
    key = np.array([seed % 2**64, choice], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float((np.random.Philox(key=key, counter=counter).random_raw() >> 11) * 2.0**-53)


def _parts(members: list[int], *, whole: bool, width: int) -> Iterator[list[int]]:
    size = len(members) if whole else max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _is_adjusted(row: SampleRow) -> bool:
    params = row.params
    return bool(params.logit_bias) or row.position < params.min_tokens or params.has_penalties


def _most_likely(scores: Tensor, indices: Sequence[int]) -> Tensor:
    """(R, V) → (R,); argmax takes the first of equal scores, and any NaN before a number."""
    chosen = scores.argmax(1)
    _require_finite(scores.gather(1, chosen[:, None]).squeeze(1), indices)
    return chosen


def _require_finite(best: Tensor, indices: Sequence[int]) -> None:
    bad = (~torch.isfinite(best)).nonzero().flatten().tolist()
    if bad:
        raise EngineFailure(
            f"the most likely token must have a finite log-probability, got {float(best[bad[0]])} "
            f"in row {indices[bad[0]]} of the step"
        )


def _column(rows: Sequence[SampleRow], value: Callable[[SamplingParams], float], like: Tensor) -> Tensor:
    """(R, 1) float64, one value per row."""
    return torch.tensor([[value(row.params)] for row in rows], dtype=torch.float64, device=like.device)


def _adjust(scores: Tensor, rows: Sequence[SampleRow], eos_token_ids: Sequence[int]) -> Tensor:
    """Apply logit_bias, min_tokens and penalties to (R, V) float64 scores, in place."""
    _add_bias(scores, rows)
    _mask_ends(scores, rows, eos_token_ids)
    _penalise_repetition(scores, rows)
    _penalise_counts(scores, rows)
    return scores


def _cells(ids_of_rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers and token ids of the few scores to touch; each (N,) int64."""
    row_numbers = np.repeat(np.arange(len(ids_of_rows)), [len(ids) for ids in ids_of_rows])
    return torch.from_numpy(row_numbers).to(device), torch.from_numpy(np.concatenate(ids_of_rows)).to(device)


def _add_bias(scores: Tensor, rows: Sequence[SampleRow]) -> None:
    if any(row.params.logit_bias for row in rows):
        cells = _cells([_ids(list(row.params.logit_bias)) for row in rows], scores.device)
        biases = [bias for row in rows for bias in row.params.logit_bias.values()]
        scores[cells] += torch.tensor(biases, dtype=scores.dtype, device=scores.device)


def _mask_ends(scores: Tensor, rows: Sequence[SampleRow], eos_token_ids: Sequence[int]) -> None:
    early = [row.position < row.params.min_tokens for row in rows]
    if any(early):
        ends = [
            _ids([*eos_token_ids, *row.params.stop_token_ids] if is_early else [])
            for row, is_early in zip(rows, early, strict=True)
        ]
        row_numbers, token_ids = _cells(ends, scores.device)
        before = scores[row_numbers, token_ids]
        scores[row_numbers, token_ids] = -torch.inf
        emptied = scores.amax(1) == -torch.inf
        lift = emptied[row_numbers]
        scores[row_numbers[lift], token_ids[lift]] = before[lift]


def _penalise_repetition(scores: Tensor, rows: Sequence[SampleRow]) -> None:
    if any(row.params.repetition_penalty != 1 for row in rows):
        seen = [
            np.unique(np.concatenate([_ids(row.prompt_ids), _ids(row.generated_ids)]))
            if row.params.repetition_penalty != 1
            else _ids([])
            for row in rows
        ]
        row_numbers, token_ids = _cells(seen, scores.device)
        penalty = _column(rows, lambda p: p.repetition_penalty, scores).squeeze(1)[row_numbers]
        old = scores[row_numbers, token_ids]
        # A bias may have lifted a score above zero; there, dividing is what makes it less likely.
        scores[row_numbers, token_ids] = torch.where(old < 0, old * penalty, old / penalty)


def _penalise_counts(scores: Tensor, rows: Sequence[SampleRow]) -> None:
    counted = [row.params.frequency_penalty != 0 or row.params.presence_penalty != 0 for row in rows]
    if any(counted):
        generated = [
            np.unique(_ids(row.generated_ids if is_counted else []), return_counts=True)
            for row, is_counted in zip(rows, counted, strict=True)
        ]
        penalties = [
            counts * row.params.frequency_penalty + row.params.presence_penalty
            for row, (_, counts) in zip(rows, generated, strict=True)
        ]
        cells = _cells([ids for ids, _ in generated], scores.device)
        scores[cells] -= torch.from_numpy(np.concatenate(penalties)).to(scores.device)


def _ids(token_ids: TokenIds) -> NDArray[np.int64]:
    return np.asarray(token_ids, dtype=np.int64)


def _draw(scores: Tensor, rows: Sequence[SampleRow], indices: Sequence[int]) -> Tensor:
    """Sample one token per row of (R, V) scores."""
    scores = scores.to(torch.float64)
    best = scores.amax(1, keepdim=True)
    _require_finite(best.squeeze(1), indices)
    # Relative to the best score, so that no temperature above zero can overflow.
    scores = scores - best
    weights = (scores / _column(rows, lambda p: p.temperature, scores)).exp_()
    truncated = [index for index, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1]
    if len(truncated) == len(rows):
        weights = _truncate(scores, weights, rows)
    elif truncated:
        weights[truncated] = _truncate(scores[truncated], weights[truncated], [rows[index] for index in truncated])
    if any(row.params.min_p > 0 for row in rows):
        # The best token's weight is exactly one.
        weights.masked_fill_(weights < _column(rows, lambda p: p.min_p, scores), 0.0)
    uniforms = [[uniform(row.seed, row.choice, row.position)] for row in rows]
    return _invert(weights, weights.cumsum(1), weights.new_tensor(uniforms))


def _truncate(scores: Tensor, weights: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Zero the (R, V) weights outside top_k and then top_p.

    Both keep a prefix of the tokens in the order (score descending, token id ascending). top_p keeps a token while the
    mass before it is below top_p of the mass that top_k left.
    """
    vocab_size = scores.shape[1]
    temperature = _column(rows, lambda p: p.temperature, scores)
    most = _column(rows, lambda p: p.top_k if 0 < p.top_k < vocab_size else vocab_size, scores)
    share = _column(rows, lambda p: p.top_p if p.top_p < 1 else torch.inf, scores)
    width = min(vocab_size, max([_FIRST_WIDTH, *(row.params.top_k for row in rows if row.params.top_k < vocab_size)]))
    while True:
        ranked = scores.topk(width).values
        inside = torch.arange(width, device=scores.device) < most
        mass = (ranked / temperature).exp_() * inside
        total = torch.where(most < vocab_size, mass.sum(1, keepdim=True), weights.sum(1, keepdim=True))
        inside &= mass.cumsum(1) - mass < share * total
        kept = inside.sum(1).clamp_(min=1)
        # A row is settled when its border lies inside what was ranked.
        if width == vocab_size or bool(((kept < width) | (most.squeeze(1) <= width)).all()):
            return weights * _first(scores, ranked, kept)
        width = min(vocab_size, width * _WIDTH_FACTOR)


def _first(scores: Tensor, ranked: Tensor, kept: Tensor) -> Tensor:
    """Mark the first ``kept`` (R,) tokens of each row in the order (score descending, token id ascending).

    Args:
        scores: (R, V).
        ranked: (R, W) the W ≥ max(kept) best scores, descending.
    """
    border = ranked.gather(1, kept[:, None] - 1)
    above, equal = scores > border, scores == border
    room = kept[:, None] - above.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > room).any()):
        equal &= equal.cumsum(1) <= room
    return above | equal


def _invert(weights: Tensor, cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds ``uniform × total``: (R, V), (R, V), (R, 1) → (R,)."""
    # u ≤ 1 − 2⁻⁵³, so u × total is rounded to less than total: some cumulative weight exceeds it, and the first one to
    # do so exceeds its predecessor.
    chosen = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    possible = weights > 0
    if bool(possible.gather(1, chosen).all()):
        return chosen.squeeze(1)
    # A parallel scan, as on a GPU, may round so that an impossible token seems to add mass: take the one before it.
    ids = torch.arange(weights.shape[1], device=weights.device)
    before = torch.where(possible & (ids <= chosen), ids, -1).amax(1)
    return torch.where(before >= 0, before, possible.int().argmax(1))
