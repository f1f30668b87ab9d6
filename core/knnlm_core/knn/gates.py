"""When to search: gates decide per token, before any search, from what is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from knnlm_core.errors import InvalidKnnParams, UnsupportedFeature
from knnlm_core.signals import LMSignals, join_signals


class GateMode(StrEnum):
    """The gates that this build can honour."""

    ALWAYS = "always"
    NEVER = "never"
    EVERY_N = "every_n"
    CONFIDENCE = "confidence"


_PLANNED = ("learned", "automaton")
MAX_PERIOD = 1_000_000


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

    def __call__(self, keys: Tensor, context: Context | None) -> Decisions:
        """Which of B rows to search for.

        Args:
            keys: (B, D) float32.
            context: of the same rows; None only for gates that do not need it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Unconditional:
    """`always` or `never`, whatever the row."""

    mode: GateMode
    threshold: ClassVar[None] = None
    needs_context: ClassVar[bool] = False

    def __call__(self, keys: Tensor, context: Context | None) -> Decisions:
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

    def __call__(self, keys: Tensor, context: Context | None) -> Decisions:
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

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidKnnParams(
                f"`knn.gate_threshold` of confidence must be in 0 … 1, got {self.threshold:g}",
                param="knn.gate_threshold",
            )

    def __call__(self, keys: Tensor, context: Context | None) -> Decisions:
        """See `Gate`."""
        assert context is not None, "the gate was asked without what it looks at. This is a bug."
        confidence = context.signals.max_log_prob.exp()
        return Decisions(confidence < self.threshold, confidence)


def parse_gate(name: str, threshold: float | None = None) -> Gate:
    """The gate that a request asks for.

    Raises:
        UnsupportedFeature: a gate of a later release.
        InvalidKnnParams: no such gate at all, or a threshold that is missing, out of bounds or of no use.
    """
    mode = _parse_mode(name)
    if mode in _UNCONDITIONAL:
        if threshold is not None:
            raise InvalidKnnParams(
                f"`knn.gate_threshold` must not be given where `knn.gate` is {mode}, got {threshold:g}",
                param="knn.gate_threshold",
            )
        return _UNCONDITIONAL[mode]
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


def _parse_mode(name: str) -> GateMode:
    try:
        return GateMode(name)
    except ValueError:
        known = ", ".join(GateMode)
        if name in _PLANNED:
            raise UnsupportedFeature(
                f"`knn.gate` {name!r} is not offered by this build; it knows {known}", param="knn.gate"
            ) from None
        raise InvalidKnnParams(f"`knn.gate` must be one of {known}, got {name[:80]!r}", param="knn.gate") from None
