"""When to search: gates decide per token, before any search, from what is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from knnlm_core.errors import InvalidKnnParams
from knnlm_core.knn.lambdas import LM_FEATURES, NEIGHBOR_FEATURES, lm_features, neighbor_features
from knnlm_core.signals import LMSignals, join_signals
from knnlm_core.trees import Trees
from knnlm_core.types import Neighbors


class GateMode(StrEnum):
    """When to search. The last two follow pointers where they do not search, see `knnlm_core.walks`."""

    ALWAYS = "always"
    NEVER = "never"
    EVERY_N = "every_n"  # at every n-th position
    CONFIDENCE = "confidence"  # where the language model is unsure
    AUTOMATON = "automaton"  # where there are too few pointers to follow
    LEARNED = "learned"  # where trees expect that it gains enough


MAX_PERIOD = 1_000_000
MAX_POINTERS = 64  # of a walk
MAX_GAIN = 100.0  # nats


class Context(NamedTuple):
    """What is known of B rows before any search, beside their keys."""

    signals: LMSignals
    positions: Tensor  # (B,) int64, how many tokens come before the one to be predicted

    def take(self, rows: Tensor | slice) -> Context:
        """Some of the rows."""
        return Context(self.signals.take(rows), self.positions[rows])


def join_contexts(parts: Sequence[Context]) -> Context:
    """One after the other."""
    return Context(join_signals([part.signals for part in parts]), torch.cat([part.positions for part in parts]))


class Pointers(NamedTuple):
    """What gates that follow know of B rows beside their context: where they could go on, and how it went so far."""

    neighbors: Neighbors  # (B, P) the entries that came next to what was found before, nearest first; P ≥ 1
    log_weights: Tensor  # (B, P) float32, of each one's share of p_knn
    history: Tensor  # (B, 3) float64, in the order of HISTORY_FEATURES

    def take(self, rows: Tensor | slice) -> Pointers:
        """Some of the rows."""
        near = Neighbors(*(column[rows] for column in self.neighbors))
        return Pointers(near, self.log_weights[rows], self.history[rows])

    @property
    def counts(self) -> Tensor:
        """(B,) int64."""
        return (self.neighbors.entry_ids >= 0).sum(dim=1)


class Decisions(NamedTuple):
    """Of B rows."""

    search: Tensor  # (B,) bool
    scores: Tensor  # (B,) float32, what was held against the gate's threshold; NaN for gates without one


class Gate(Protocol):
    """Decides for rows alone: whatever else is in a batch, a row's decision is the same."""

    @property
    def mode(self) -> GateMode:
        """Which kind of gate it is."""
        ...

    @property
    def threshold(self) -> float | None:
        """In the gate's own units; None for gates without one."""
        ...

    @property
    def needs_context(self) -> bool:
        """Whether it looks at the context at all; for the others the LM's signals need not be computed."""
        ...

    @property
    def follows(self) -> bool:
        """Whether rows that are not searched follow their pointers, so that each sequence needs a walk."""
        ...

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """Which of B rows to search for.

        Args:
            keys: (B, D) float32.
            context: of the same rows; None only for gates that do not need it.
            pointers: of the same rows, for gates that follow.
        """
        ...


@dataclass(frozen=True, slots=True)
class Unconditional:
    """`always` or `never`, whatever the row."""

    mode: GateMode
    threshold: ClassVar[None] = None
    needs_context: ClassVar[bool] = False
    follows: ClassVar[bool] = False

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """See `Gate`."""
        rows = torch.full(keys.shape[:1], self.mode is GateMode.ALWAYS, device=keys.device)
        return Decisions(rows, torch.full(keys.shape[:1], torch.nan, device=keys.device))


ALWAYS, NEVER = Unconditional(GateMode.ALWAYS), Unconditional(GateMode.NEVER)


@dataclass(frozen=True, slots=True)
class EveryN:
    """Search at every n-th position of a sequence: the plainest way to save searches, which better ones must beat.

    Attributes:   period: n, 1 … MAX_PERIOD; position 0 and its multiples are searched.
    """

    period: int
    mode: ClassVar[GateMode] = GateMode.EVERY_N
    needs_context: ClassVar[bool] = True
    follows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.period <= MAX_PERIOD:
            raise InvalidKnnParams(
                f"`knn.gate_threshold` of every_n must be in 1 … {MAX_PERIOD}, got {self.period}",
                param="knn.gate_threshold",
            )

    @property
    def threshold(self) -> float:
        """n."""
        return float(self.period)

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """See `Gate`."""
        assert context is not None, "the gate was asked without what it looks at. This is a bug."
        phase = context.positions % self.period
        return Decisions(phase == 0, phase.float())


@dataclass(frozen=True, slots=True)
class Confidence:
    """Search where the language model is unsure: its likeliest token has a probability below the threshold.

    Attributes:   threshold: in 0 … 1; 0 never searches.
    """

    threshold: float
    mode: ClassVar[GateMode] = GateMode.CONFIDENCE
    needs_context: ClassVar[bool] = True
    follows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidKnnParams(
                f"`knn.gate_threshold` of confidence must be in 0 … 1, got {self.threshold:g}",
                param="knn.gate_threshold",
            )

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """See `Gate`."""
        assert context is not None, "the gate was asked without what it looks at. This is a bug."
        confidence = context.signals.max_log_prob.exp()
        return Decisions(confidence < self.threshold, confidence)


@dataclass(frozen=True, slots=True)
class Automaton:
    """Follow pointers while there are any, search where they run out (Alon et al. 2022, RetoMaton, without clusters).

    Attributes:   threshold: search where there are fewer pointers than this, 1 … MAX_POINTERS.
    """

    threshold: float = 1.0
    mode: ClassVar[GateMode] = GateMode.AUTOMATON
    needs_context: ClassVar[bool] = False
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= MAX_POINTERS or not float(self.threshold).is_integer():
            raise InvalidKnnParams(
                f"`knn.gate_threshold` of automaton must be a whole number in 1 … {MAX_POINTERS}, "
                f"got {self.threshold:g}",
                param="knn.gate_threshold",
            )

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """See `Gate`."""
        assert pointers is not None, "the gate was asked without what it looks at. This is a bug."
        return Decisions(pointers.counts < self.threshold, pointers.counts.float())


HISTORY_FEATURES = (
    "log of the nearest distance of the step before",
    "steps since the last search",
    "whether the nearest one held the token that came",
)
GATE_FEATURES = (*LM_FEATURES, "log of the number of pointers", *(f"pointers: {n}" for n in NEIGHBOR_FEATURES),
                 *HISTORY_FEATURES)  # fmt: skip


def gate_features(signals: LMSignals, pointers: Pointers) -> Tensor:
    """What `Learned` looks at: (B, F) float64, in the order of GATE_FEATURES."""
    counts = pointers.counts.double()
    return torch.cat(
        [
            lm_features(signals),
            torch.log1p(counts)[:, None],
            neighbor_features(pointers.neighbors, pointers.log_weights, signals),
            pointers.history,
        ],
        dim=1,
    )


@dataclass(frozen=True, slots=True, eq=False)
class LearnedGate:
    """Search where trees expect that it gains more than this over following pointers, or over the LM alone.

    Equal where the very same trees are held against one threshold.

    Attributes:
        trees: expected gain in nats per token, from `gate_features`; of one language model and datastore.
        threshold: in nats; the higher, the fewer searches.
    """

    trees: Trees
    threshold: float
    mode: ClassVar[GateMode] = GateMode.LEARNED
    needs_context: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= MAX_GAIN:
            raise InvalidKnnParams(
                f"`knn.gate_threshold` of learned must be in 0 … {MAX_GAIN:g} nats, got {self.threshold:g}",
                param="knn.gate_threshold",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LearnedGate) and other.trees is self.trees and other.threshold == self.threshold

    def __hash__(self) -> int:
        return hash((id(self.trees), self.threshold))

    def __call__(self, keys: Tensor, context: Context | None, pointers: Pointers | None = None) -> Decisions:
        """See `Gate`."""
        assert context is not None, "the gate was asked without what it looks at. This is a bug."
        assert pointers is not None, "the gate was asked without what it looks at. This is a bug."
        features = gate_features(context.signals, pointers)
        gains = torch.from_numpy(self.trees.predict(features.cpu().numpy())).to(features.device)
        return Decisions(gains > self.threshold, gains.float())


def parse_gate(name: str, threshold: float | None = None) -> Gate:
    """The gate that a request asks for, but for `learned`, which needs a datastore's trees.

    Raises: InvalidKnnParams: no such gate, or a threshold that is missing, out of bounds or of no use.
    """
    mode = parse_mode(name)
    assert mode is not GateMode.LEARNED, "a learned gate was asked for without its trees. This is a bug."
    if mode in _UNCONDITIONAL:
        if threshold is not None:
            raise InvalidKnnParams(
                f"`knn.gate_threshold` must not be given where `knn.gate` is {mode}, got {threshold:g}",
                param="knn.gate_threshold",
            )
        return _UNCONDITIONAL[mode]
    if mode is GateMode.AUTOMATON:
        return Automaton() if threshold is None else Automaton(threshold)
    if threshold is None:
        raise InvalidKnnParams(
            f"`knn.gate_threshold` must be given where `knn.gate` is {mode}", param="knn.gate_threshold"
        )
    if mode is GateMode.CONFIDENCE:
        return Confidence(threshold)
    if not float(threshold).is_integer():
        raise InvalidKnnParams(
            f"`knn.gate_threshold` of every_n must be a whole number, got {threshold:g}", param="knn.gate_threshold"
        )
    return EveryN(int(threshold))


_UNCONDITIONAL = {gate.mode: gate for gate in (ALWAYS, NEVER)}


def parse_mode(name: str) -> GateMode:
    """Raises InvalidKnnParams: there is no such gate."""
    try:
        return GateMode(name)
    except ValueError:
        known = ", ".join(GateMode)
        raise InvalidKnnParams(f"`knn.gate` must be one of {known}, got {name[:80]!r}", param="knn.gate") from None
