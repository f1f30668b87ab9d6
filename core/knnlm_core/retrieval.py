"""How a row retrieves: from which datastores, with which settings, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from knnlm_core.datastore.calibration import (
    BucketedLambda,
    Calibration,
    FollowRule,
    LambdaRules,
    LearnedLambda,
    RrcLambda,
)
from knnlm_core.errors import DatastoreMismatch, InvalidKnnParams, InvalidParameter
from knnlm_core.knn.fusion import Fusion
from knnlm_core.knn.gates import ALWAYS, GATE_FEATURES, MAX_GAIN, Gate, GateMode, LearnedGate, parse_gate, parse_mode
from knnlm_core.knn.lambdas import LAMBDA_FEATURES, Bucketed, LambdaMode, LambdaRule, Learned, Rrc
from knnlm_core.trees import Trees
from knnlm_core.types import EntryRange, Neighbors

MAX_K = 4096
MAX_TOTAL_K = 2 * MAX_K  # of all sources of a row
MAX_SOURCES = 8
NEIGHBORS_AT_ONCE = 1 << 23  # of all rows of a search; bounds its memory, some 50 bytes each
# Far inside float32, in which τ is applied; distances of real models lie between 1 and 10⁴.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e9


class Searchable(Protocol):
    """What can be searched: a datastore in this process, or later one elsewhere. Equal ones are searched together."""

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """The k nearest entries of each query (B, D), nearest first, none of them excluded."""
        ...

    def lookup(self, queries: Tensor, entry_ids: Tensor, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """Chosen entries (B, K), −1 for none, at their distances to each query; what is excluded is missing."""
        ...

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        """The entry after each one in its document, (…) int64; −1 after the last."""
        ...

    def continuations(self, entry_ids: Tensor, length: int) -> Tensor:
        """Values of entries (M,) and of those after them in their documents: (M, length), −1 where there are none."""
        ...


def lambda_rule(rules: LambdaRules, mode: LambdaMode, name: str) -> LambdaRule | None:
    """One of a calibration's rules, ready to be applied; None for `LambdaMode.FIXED`.

    Args:   name: of the datastore, for messages.
    Raises:
        InvalidKnnParams: nothing of the kind was fitted.
        DatastoreMismatch: the rule looks at features that this build does not know.
    """
    if mode is LambdaMode.FIXED:
        return None
    fitted: FollowRule | None = getattr(rules, mode)
    if fitted is not None:
        return ready_rule(fitted, name)
    offered = ", ".join(["fixed", *(name for name, rule in rules if rule is not None)])
    raise InvalidKnnParams(
        f"`knn.lambda_mode` must be one that the calibration of datastore {name!r} has ({offered}), got {str(mode)!r}",
        param="knn.lambda_mode",
    )


def ready_rule(rule: FollowRule, name: str) -> LambdaRule:
    """A fitted rule, ready to be applied. Raises DatastoreMismatch: it looks at features unknown to this build.

    Equal rules come out as one object, so that the rows of several requests are ruled together.
    """
    return _ready_rule(type(rule), rule.model_dump_json(), name)


@lru_cache(maxsize=128)
def _ready_rule(kind: type[BucketedLambda | RrcLambda | LearnedLambda], content: str, name: str) -> LambdaRule:
    rule = kind.model_validate_json(content)
    if isinstance(rule, BucketedLambda):
        return Bucketed(_numbers(rule.edges).float(), _numbers(rule.lambdas))
    if isinstance(rule, RrcLambda):
        return Rrc(rule.alpha, rule.scale)
    _check_features("lambda_rules.learned.features", rule.features, LAMBDA_FEATURES, name)
    layers = tuple((_numbers(layer.weight), _numbers(layer.bias)) for layer in rule.layers)
    return Learned(_numbers(rule.mean), _numbers(rule.scale), layers)


def _check_features(field: str, have: Sequence[str], need: Sequence[str], name: str) -> None:
    if tuple(have) != tuple(need):
        raise DatastoreMismatch(
            name, field=field, have=", ".join(have)[:500], need=", ".join(need), needed_by="this reader"
        )


def _numbers(given: Sequence[object]) -> Tensor:
    return torch.tensor(given, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Source:
    """One datastore that a row retrieves from.

    Attributes:
        datastore: the snapshot that the row's request has leased.
        k: neighbours per query, 1 … MAX_K.
        knn_temperature: τ, in units of squared distance.
        lmbda: λ in [0, 1], weight of the store's p_knn where it is the only one.
        exclude: entries that must not be found, such as those of the document being scored.
        weight: w > 0; those of a row sum to one.
        gate: when to search it.
        lambda_rule: sets λ row by row, in place of ``lmbda``; not where neighbours of several stores are merged.
        follow_rule: the same for rows that follow pointers; None for what holds of searched ones.
    """

    datastore: Searchable
    k: int
    knn_temperature: float
    lmbda: float
    exclude: tuple[EntryRange, ...] = ()
    weight: float = 1.0
    gate: Gate = ALWAYS
    lambda_rule: LambdaRule | None = None
    follow_rule: LambdaRule | None = None

    def check(self) -> None:
        """Raises InvalidKnnParams: naming the field, its limits and its value."""
        if not 1 <= self.k <= MAX_K:
            raise InvalidKnnParams(f"`knn.k` must be in 1 … {MAX_K}, got {self.k}", param="knn.k")
        if not MIN_TEMPERATURE <= self.knn_temperature <= MAX_TEMPERATURE:
            raise InvalidKnnParams(
                f"`knn.temperature` must be in {MIN_TEMPERATURE:g} … {MAX_TEMPERATURE:g}, got {self.knn_temperature:g}",
                param="knn.temperature",
            )
        if not 0 <= self.lmbda <= 1:
            raise InvalidKnnParams(f"`knn.lambda` must be in 0 … 1, got {self.lmbda:g}", param="knn.lambda")


def check_rules(calibration: Calibration | None, name: str) -> None:
    """Raises DatastoreMismatch: a rule or a gate looks at what this build does not know."""
    if calibration is None:
        return
    for mode in LambdaMode:
        if getattr(calibration.lambda_rules, mode, None) is not None:
            lambda_rule(calibration.lambda_rules, mode, name)
    if calibration.follow_rule is not None:
        ready_rule(calibration.follow_rule, name)
    threshold = calibration.gate_threshold
    if calibration.gate == "learned" and (threshold is None or threshold > MAX_GAIN):
        raise DatastoreMismatch(
            name, field="gate_threshold", have=str(threshold), need=f"0 … {MAX_GAIN:g}", needed_by="the gate learned"
        )
    if calibration.gate != "learned":
        try:
            parse_gate(calibration.gate, threshold)
        except InvalidKnnParams as error:
            raise DatastoreMismatch(
                name,
                field="gate_threshold",
                have=f"{threshold} for the gate {calibration.gate}",
                need=error.message,
                needed_by="this reader",
            ) from error
    if calibration.gate_trees is not None:
        _check_features("gate_trees.features", calibration.gate_trees.features, GATE_FEATURES, name)


def keeps_to(calibration: Calibration | None, source: Source) -> bool:
    """Whether a source has the calibrated k and τ, for which rules and gates were fitted."""
    calibrated = calibration and (calibration.k, calibration.knn_temperature)
    return (source.k, source.knn_temperature) == calibrated


def _calibrated(calibration: Calibration | None) -> str:
    assert calibration is not None, "something was fitted without a calibration. This is a bug."
    return f"k {calibration.k} and τ {calibration.knn_temperature:g}"


def with_lambda_mode(source: Source, calibration: Calibration | None, mode: LambdaMode | None, name: str) -> Source:
    """Let a rule of the calibration of datastore ``name`` set λ.

    Rules were fitted for the calibrated k and τ. Without a mode, a source that keeps to these gets the calibrated one;
    for another k or τ the single λ holds.

    Raises: InvalidKnnParams: a rule is asked for that there is not, or with another k or τ. DatastoreMismatch.
    """
    if mode is LambdaMode.FIXED:
        return source
    fits = keeps_to(calibration, source)
    if mode is None:
        if calibration is None or not fits:
            return source
        mode = LambdaMode(calibration.lambda_mode)
    rule = lambda_rule(calibration.lambda_rules if calibration is not None else LambdaRules(), mode, name)
    if rule is not None and not fits:
        raise InvalidKnnParams(
            f"`knn.lambda_mode` {mode} holds for the calibrated k and τ alone, {_calibrated(calibration)}, "
            f"got k {source.k} and τ {source.knn_temperature:g}",
            param="knn.lambda_mode",
        )
    follow = calibration.follow_rule if calibration is not None else None
    return replace(source, lambda_rule=rule, follow_rule=None if follow is None else ready_rule(follow, name))


def with_gate(
    source: Source,
    calibration: Calibration | None,
    trees: Trees | None,
    gate: tuple[str, float | None] | None,
    name: str,
) -> Source:
    """Let a gate decide when datastore ``name`` is searched.

    The gate `learned` was fitted for the calibrated k and τ. Without a wish, a source that keeps to these gets the
    calibrated gate; for another k or τ every token is searched.

    Args:
        trees: of the calibration.
        gate: name and threshold that a request gives.
    Raises: InvalidKnnParams: no such gate, a threshold out of bounds, or trees that there are not or that do not fit.
    """
    fits = keeps_to(calibration, source)
    if gate is None:
        if calibration is None or not fits:
            return source
        gate = calibration.gate, calibration.gate_threshold
    mode, threshold = parse_mode(gate[0]), gate[1]
    if mode is not GateMode.LEARNED:
        return replace(source, gate=parse_gate(mode, threshold))
    if calibration is None or calibration.learned_threshold is None or trees is None:
        raise InvalidKnnParams(
            f"`knn.gate` learned needs a gate in the calibration of datastore {name!r}, and there is none; "
            "`knnlm calibrate` fits one where it has enough held-out text",
            param="knn.gate",
        )
    if not fits:
        raise InvalidKnnParams(
            f"`knn.gate` learned holds for the calibrated k and τ alone, {_calibrated(calibration)}, "
            f"got k {source.k} and τ {source.knn_temperature:g}",
            param="knn.gate",
        )
    return replace(source, gate=LearnedGate(trees, calibration.learned_threshold if threshold is None else threshold))


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How one row retrieves.

    p = (1 − Σ w_i λ_i) p_lm + Σ w_i λ_i p_knn,i

    Attributes:
        sources: 1 … MAX_SOURCES; their order is that of `Found.sources`.
        fusion: how several sources become one p_knn; for `Fusion.NEIGHBORS` they share one τ and one λ.
    """

    sources: tuple[Source, ...]
    fusion: Fusion = Fusion.DISTRIBUTIONS

    @property
    def k(self) -> int:
        """Neighbours per query, of all sources together."""
        return sum(source.k for source in self.sources)

    @property
    def needs_context(self) -> bool:
        """Whether a gate or a λ looks at more than keys and distances."""
        return any(
            source.gate.needs_context
            or source.lambda_rule is not None
            or (source.gate.follows and source.follow_rule is not None)
            for source in self.sources
        )

    @property
    def gate_name(self) -> str:
        """The gates of all sources, each named once."""
        return "+".join(dict.fromkeys(source.gate.mode.value for source in self.sources))

    @property
    def only(self) -> Source:
        """The source of a retrieval that has a single one."""
        (source,) = self.sources
        return source

    def gated(self, gate: Gate) -> Retrieval:
        """The same, searching each source when ``gate`` says so."""
        return replace(self, sources=tuple(replace(source, gate=gate) for source in self.sources))

    def with_weights(self, weights: Sequence[float]) -> Retrieval:
        """The same sources, weighted otherwise.

        Args:   weights: > 0, in any unit.
        """
        total = math.fsum(weights)
        weighed = zip(self.sources, weights, strict=True)
        return replace(self, sources=tuple(replace(source, weight=weight / total) for source, weight in weighed))

    def check(self) -> None:
        """Raises InvalidKnnParams, InvalidParameter: naming the field, its limits and its value."""
        if not 1 <= len(self.sources) <= MAX_SOURCES:
            raise InvalidParameter(
                f"`knn.datastore` must name 1 … {MAX_SOURCES} datastores, got {len(self.sources)}",
                param="knn.datastore",
            )
        for source in self.sources:
            source.check()
        if self.k > MAX_TOTAL_K:
            raise InvalidKnnParams(
                f"`knn.k` must be at most {MAX_TOTAL_K} for all datastores of a request together, got {self.k}",
                param="knn.k",
            )
