"""Calibrations: the retrieval settings that held-out text chose for one version, kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from knnlm_core.datastore import layout
from knnlm_core.datastore.gate_file import GateTrees, read_trees, write_trees
from knnlm_core.datastore.manifest import Digest16, Positive, read_json, validate, version_of
from knnlm_core.datastore.sealed import check_seal, sealed_text
from knnlm_core.durable import sync_folder, write_text
from knnlm_core.errors import BuildConflict, DatastoreCorrupt, DatastoreMismatch
from knnlm_core.trees import Trees

MAX_CALIBRATION_BYTES = 4 * 1024 * 1024
MAX_BUCKETS = 1024
MAX_LAYER_WIDTH = 64

NUMERICS = "numerics"  # in `protocol`: `CausalLM.numerics` of the LM that it was measured with
PRACTICE_IDS = "practice_documents"  # in `protocol`: documents of the store that rules and gate were fitted on, too

DENSE = "dense"
# Numerics that no calibration of others holds for. All others differ by rounding and are one class.
_OWN_CLASS = frozenset({"int8"})

LambdaModeName = Literal["fixed", "bucketed", "rrc", "learned"]
GateModeName = Literal["always", "never", "every_n", "confidence", "automaton", "learned"]


Lambda = Annotated[float, Field(ge=0, le=1)]


# Far beyond what fits of finite features need, and far from what could overflow.
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BucketedLambda(_Part):
    """λ by the nearest neighbour's squared distance.

    Attributes:
        edges: n − 1, ascending.
        lambdas: n, for the nearest first.
    """

    edges: tuple[Annotated[float, Field(ge=0)], ...] = Field(max_length=MAX_BUCKETS - 1)
    lambdas: tuple[Lambda, ...] = Field(min_length=1, max_length=MAX_BUCKETS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.lambdas) != len(self.edges) + 1 or list(self.edges) != sorted(self.edges):
            raise ValueError("`edges` must ascend, and be one fewer than `lambdas`")
        return self


class RrcLambda(_Part):
    """λ by how much nearer the nearest neighbour is than the farthest."""

    alpha: Number
    scale: Scale


class Layer(_Part):
    """Of a network: ``out`` rows of ``in`` weights each, and ``out`` biases."""

    weight: tuple[tuple[Number, ...], ...] = Field(min_length=1, max_length=MAX_LAYER_WIDTH)
    bias: tuple[Number, ...]


class LearnedLambda(_Part):
    """λ by a small network over the features named.

    Attributes:
        features: what the network was fitted to look at.
        mean, scale: one for each feature.
        layers: from the features to a single number.
    """

    features: tuple[str, ...] = Field(min_length=1, max_length=MAX_LAYER_WIDTH)
    mean: tuple[Number, ...]
    scale: tuple[Scale, ...]
    layers: tuple[Layer, ...] = Field(min_length=1, max_length=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        width = len(self.features)
        if len(self.mean) != width or len(self.scale) != width:
            raise ValueError("`mean` and `scale` must have one number for each feature")
        for layer in self.layers:
            if len(layer.bias) != len(layer.weight) or any(len(row) != width for row in layer.weight):
                raise ValueError("the layers' weights and biases do not fit each other")
            width = len(layer.weight)
        if width != 1:
            raise ValueError(f"the last layer must have a single output, it has {width}")
        return self


FollowRule = BucketedLambda | RrcLambda | LearnedLambda


class LambdaRules(_Part):
    """What was fitted besides a single λ; None where there was too little text to fit it on."""

    bucketed: BucketedLambda | None = None
    rrc: RrcLambda | None = None
    learned: LearnedLambda | None = None


class Calibration(BaseModel):
    """Defaults for requests that name a datastore and nothing else.

    Attributes:
        datastore_version: the version that it was made for; it says nothing about any other.
        knn_temperature: τ, in units of squared distance.
        lmbda: λ, the weight of p_knn; ``lambda`` in JSON.
        lambda_mode: how λ is set: always the same, or by a rule that looks at each token's neighbours.
        lambda_rules: the rules that were fitted, for this k and τ.
        follow_rule: sets λ where pointers are followed instead of searching.
        gate, gate_threshold: when to search; a threshold for gates that have one.
        gate_trees: of the gate `learned`, also where another one is the default; they lie beside the calibration.
        learned_threshold: of the gate `learned` where a request gives none.
        protocol: what was measured on, and how.
        report: what came out: tokens, documents, base and mixed figures, gain and its interval.
        helps: whether the mixture beat the base LM.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )

    id: Digest16
    datastore_version: Digest16
    k: Positive
    knn_temperature: Annotated[float, Field(gt=0)]
    lmbda: Annotated[float, Field(alias="lambda", ge=0, le=1)]
    lambda_mode: LambdaModeName = "fixed"
    lambda_rules: LambdaRules = LambdaRules()
    follow_rule: FollowRule | None = None
    gate: GateModeName = "always"
    gate_threshold: Annotated[float, Field(ge=0)] | None = None
    gate_trees: GateTrees | None = None
    learned_threshold: Annotated[float, Field(ge=0, le=100)] | None = None
    protocol: dict[str, JsonValue]
    report: dict[str, JsonValue]
    helps: Annotated[bool, Field(strict=True)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lambda_mode != "fixed" and getattr(self.lambda_rules, self.lambda_mode) is None:
            raise ValueError(f"`lambda_mode` is {self.lambda_mode}, and there is no such rule in `lambda_rules`")
        if self.gate == "learned" and self.gate_trees is None:
            raise ValueError("`gate` is learned, and there are no `gate_trees`")
        if (self.gate_trees is None) != (self.learned_threshold is None):
            raise ValueError("`gate_trees` and `learned_threshold` come together")
        return self

    @property
    def numerics(self) -> str | None:
        """How the LM computed that it was measured with; None where that was not written down."""
        found = self.protocol.get(NUMERICS)
        return found if isinstance(found, str) else None

    def require_numerics(self, name: str, running: str) -> None:
        """Refuse an LM that computes otherwise than the one that the settings were measured with.

        Where that was not written down it was dense: there was nothing else then.

        Args:   name: of the datastore. running: `CausalLM.numerics`.
        Raises: DatastoreMismatch: saying how to calibrate for this LM.
        """
        measured = self.numerics
        if numerics_class(measured or DENSE) == numerics_class(running):
            return
        raise DatastoreMismatch(
            name,
            field=NUMERICS,
            have=measured or DENSE,
            need=running,
            remedy=f"run `knnlm calibrate ROOT/{name} --model MODEL --weights "
            f"{running if running in _OWN_CLASS else 'full'}`",
        )

    def settings(self) -> dict[str, JsonValue]:
        """What requests use, by the names of the HTTP API."""
        return {
            "id": self.id,
            "k": self.k,
            "temperature": self.knn_temperature,
            "lambda": self.lmbda,
            "lambda_mode": self.lambda_mode,
            "gate": self.gate,
            "gate_threshold": self.gate_threshold,
            "learned_threshold": self.learned_threshold,
            "helps": self.helps,
        }


def numerics_class(numerics: str) -> str:
    """Numerics between which settings carry over: ``int8`` is alone, everything else is ``dense``."""
    return numerics if numerics in _OWN_CLASS else DENSE


def calibration_id(datastore_version: str, protocol: Mapping[str, JsonValue]) -> str:
    """Name a calibration by its inputs, as `version_of` names a version."""
    return version_of({"datastore_version": datastore_version, "protocol": dict(protocol)})


def read_calibration(root: Path, name: str, calibration: str) -> Calibration:
    """Read one calibration of a name.

    Raises:
        DatastoreNotFound: no such calibration.
        DatastoreCorrupt: not a calibration, or one of another id.
    """
    path = layout.calibration_folder(root, name, calibration) / layout.CALIBRATION
    found = validate(Calibration, check_seal(read_json(path, MAX_CALIBRATION_BYTES), path), path)
    if found.id != calibration:
        raise DatastoreCorrupt(f"{path}: id is {found.id!r}, its folder needs {calibration!r}")
    return found


def find_calibration(root: Path, name: str, version: str) -> str | None:
    """The id of a version's newest calibration, for a version that CURRENT does not name; None if it has none."""
    found = calibrations_of(root, name, version)
    return found[-1] if found else None


def calibrations_of(root: Path, name: str, version: str) -> list[str]:
    """The ids of a version's calibrations, the newest last."""
    found = [
        ((layout.calibration_folder(root, name, calibration) / layout.CALIBRATION).stat().st_mtime_ns, calibration)
        for calibration in layout.calibration_ids(root, name)
        if read_calibration(root, name, calibration).datastore_version == version
    ]
    return [calibration for _, calibration in sorted(found)]


def read_gate_trees(root: Path, name: str, calibration: Calibration) -> Trees | None:
    """The trees of a calibration's learned gate, if it has any. Raises DatastoreCorrupt: see `read_trees`."""
    if calibration.gate_trees is None:
        return None
    return read_trees(layout.calibration_folder(root, name, calibration.id), calibration.gate_trees)


def write_calibration(root: Path, name: str, calibration: Calibration, trees: Trees | None = None) -> Path:
    """Write a calibration into its folder and return the folder; other files may be put beside it.

    Args:   trees: those that its ``gate_trees`` describe.
    Raises: BuildConflict: the id is taken by a calibration with other content.
    """
    folder = layout.calibration_folder(root, name, calibration.id)
    path = folder / layout.CALIBRATION
    if path.exists():
        if read_calibration(root, name, calibration.id) != calibration:
            raise BuildConflict(f"{path} exists with other content; a calibration is never modified")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if trees is not None:  # before what makes the folder a calibration
        write_trees(folder, trees)
    write_text(path, sealed_text(calibration.model_dump(mode="json", by_alias=True)))
    for parent in (folder.parent, folder.parent.parent):
        sync_folder(parent)
    return folder
