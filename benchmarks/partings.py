"""Why two runs of the same seeded requests part: where they do first, and how near to a border it was decided there.

A pass of another width, or beside other rows, rounds differently. That can change what is generated only where
something lies within rounding of a border:

    gate    what the gate looks at by its threshold, or by a split of its trees
    lambda  what a rule for λ looks at by the border of a bucket
    draw    the uniform number by a border of the cumulative distribution; greedy, two tokens equally probable

So each pair of answers is replayed alone up to the first difference of token or, if the gate has a state, of decision.
There the distance to the border is taken, and the position is decided again with noise on key and log-probabilities:
if that makes both runs' outcomes, or the distance is small, it was a near-tie. What rounding is can be seen as well:
the difference of the two runs' log-probabilities of the tokens before the first difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knnlm_core.lm.protocol import CausalLM
from knnlm_core.mixture import MixedRows, advance_walks, mix_rows, start_walks
from knnlm_core.retrieval import Retrieval
from knnlm_core.walks import Walks
from knnlm_server.engine.events import TokenEvent, TokenTrace
from knnlm_server.engine.sampler import SampleRow, sample, uniform
from knnlm_server.engine.sampling_params import SamplingParams

NEAR = 1e-3  # nats, probability or the gate's units; and the largest noise, of log-probabilities and of keys
NOISES = (1e-3, 1e-2, 1e-1, 1)  # of it, of each number of a key relative to that number
DRAWS = 64  # of each noise

Outcome = tuple[Any, ...]  # whether it was searched and followed, and the token


class Pair(NamedTuple):
    """What two runs generated for the same request."""

    prompt: Sequence[int]
    params: SamplingParams
    one: Sequence[TokenEvent]  # traced
    other: Sequence[TokenEvent]


class Parting(NamedTuple):
    """The first difference of a pair."""

    pair: int
    position: int  # in generated tokens
    cause: str
    distance: float | None  # to the border; None where the cause has none that is known
    noise: float | None  # the least under which the replay does what either run did; None where none does
    is_near_tie: bool  # rounding explains it


def partings(lm: CausalLM, how: Retrieval, pairs: Sequence[Pair], near: float = NEAR) -> list[Parting]:
    """The first difference of each pair whose tokens differ. Nobody else may use the LM meanwhile."""
    follows = any(source.gate.follows for source in how.sources)
    found = []
    for number, pair in enumerate(pairs):
        first = _first_difference(pair, follows, near)
        if first is not None:
            position, cause = first
            distance, noise = _explain(lm, how, pair, position, cause, near)
            is_near_tie = noise is not None or (distance is not None and distance < near)
            found.append(Parting(number, position, cause, distance, noise, is_near_tie))
    return found


def report(found: Sequence[Parting], pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many of the pairs part, how many at near-ties, and each of the partings, the farthest from a border first."""
    far_first = sorted(found, key=lambda parting: (parting.is_near_tie, -(parting.distance or 0.0)))
    ends = {parting.pair: parting.position for parting in found}
    rounding = [
        abs(one.log_prob - other.log_prob)
        for number, pair in enumerate(pairs)
        for one, other in list(zip(pair.one, pair.other, strict=False))[: ends.get(number)]
    ]
    return {
        "same": len(pairs) - len(found),
        "near-ties": f"{sum(parting.is_near_tie for parting in found)} of {len(found)} differences",
        "rounding before, mean": sum(rounding) / max(1, len(rounding)),
        "rounding before, largest": max(rounding, default=0.0),
        "differences": [parting._asdict() for parting in far_first],
    }


def _first_difference(pair: Pair, follows: bool, near: float) -> tuple[int, str] | None:
    """Position and cause; a decision counts before the tokens part only where later ones depend on it."""
    if [event.token_id for event in pair.one] == [event.token_id for event in pair.other]:
        return None
    for position, (one, other) in enumerate(zip(pair.one, pair.other, strict=False)):
        a, b = _trace(one), _trace(other)
        parts = one.token_id != other.token_id
        if (a.searched, a.followed) != (b.searched, b.followed) and (parts or follows):
            return position, "gate"
        if parts:
            return position, "lambda" if abs(a.lmbda - b.lmbda) > near else "draw"
    return min(len(pair.one), len(pair.other)), "length"


def _trace(event: TokenEvent) -> TokenTrace:
    assert event.trace is not None, "an answer without a trace cannot be explained"
    return event.trace


def _explain(
    lm: CausalLM, how: Retrieval, pair: Pair, position: int, cause: str, near: float
) -> tuple[float | None, float | None]:
    """How far the first difference is from a border, and under which noise both runs' outcomes come."""
    if cause == "length":
        return None, None
    here, ends = _Replay.to(lm, how, pair, position), (pair.one[position], pair.other[position])

    def told(outcomes: Iterable[Outcome]) -> set[Outcome]:
        """As far as they matter: whatever a gate lets come, it is the decision that differs."""
        return {(*decided, 0 if cause == "gate" else token) for *decided, token in outcomes}

    needed = told((_trace(event).searched, _trace(event).followed, event.token_id) for event in ends)
    tokens = [event.token_id for event in ends]
    distance = _from_threshold(*map(_trace, ends)) if cause == "gate" else here.from_border(*tokens)
    seen = told(here.outcomes(0.0, 1))
    for noise in NOISES:
        seen |= told(here.outcomes(noise * near, DRAWS))
        if needed <= seen:
            return distance, noise * near
    return distance, None


def _from_threshold(one: TokenTrace, other: TokenTrace) -> float | None:
    """The larger distance of the two scores from the threshold; None for gates without one."""
    if one.gate_score is None or other.gate_score is None or one.gate_threshold is None:
        return None
    return max(abs(trace.gate_score - one.gate_threshold) for trace in (one, other) if trace.gate_score is not None)


class _Replay(NamedTuple):
    """One position of a request, as decoding it alone comes to it."""

    how: Retrieval
    pair: Pair
    position: int
    log_probs: Tensor  # (1, V) of the LM
    key: Tensor  # (1, D)
    walks: Walks

    @classmethod
    def to(cls, lm: CausalLM, how: Retrieval, pair: Pair, position: int) -> _Replay:
        """Go along the tokens that both runs have in common."""
        tokens = [event.token_id for event in pair.one[:position]]
        rows = lm.encode([[*pair.prompt, *tokens]], [len(pair.prompt) - 1])
        log_probs = torch.log_softmax(lm.logits(rows.hidden), dim=1)
        walks = start_walks(how)
        for i, token in enumerate(tokens if walks else ()):
            here = cls(how, pair, i, log_probs[i : i + 1], rows.keys[i : i + 1], walks)
            (walks,) = advance_walks([walks], [how], here.mixed(0.0, 1).found, [0], [token])
        return cls(how, pair, position, log_probs[-1:], rows.keys[-1:], walks)

    def mixed(self, noise: float, draws: int) -> MixedRows:
        """The mixture, ``draws`` times with other noise."""
        random = torch.Generator(device=self.key.device).manual_seed(0)

        def normal(like: Tensor) -> Tensor:
            return torch.randn((draws, like.shape[1]), generator=random, device=like.device)

        log_probs = torch.log_softmax(self.log_probs + noise * normal(self.log_probs), dim=1)
        keys = self.key * (1 + noise * normal(self.key))
        before = torch.full((draws,), len(self.pair.prompt) + self.position, device=keys.device)
        return mix_rows(log_probs, keys, [self.how] * draws, before, [self.walks] * draws)

    def outcomes(self, noise: float, draws: int) -> Iterator[Outcome]:
        """What is decided and drawn with noise."""
        mixed = self.mixed(noise, draws)
        params = self.pair.params
        row = SampleRow(params, seed=params.seed or 0, choice=0, position=self.position)
        tokens = sample(mixed.log_probs, [row] * draws)
        return zip(mixed.found.searched.tolist(), mixed.found.followed.tolist(), tokens.tolist(), strict=True)

    def from_border(self, *tokens: int) -> float:
        """How far the uniform number is from where each token would be drawn; greedy, the tokens from each other.

        Of sampling with a temperature alone: in probability; greedy, in nats.
        """
        log_probs = self.mixed(0.0, 1).log_probs[0].double()
        params = self.pair.params
        if params.is_greedy:
            best = log_probs.max().item()
            return max(best - log_probs[token].item() for token in tokens)
        borders = torch.softmax(log_probs / params.temperature, dim=0).cumsum(0)
        drawn = uniform(params.seed or 0, 0, self.position)
        return max(
            max(0.0, (borders[token - 1].item() if token else 0.0) - drawn, drawn - borders[token].item())
            for token in tokens
        )
