"""What bodies of several routes share: texts, token ids, and how a request retrieves."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)

from knnlm_core.errors import InvalidKnnParams, InvalidParameter
from knnlm_core.knn.fusion import Fusion
from knnlm_core.knn.gates import MAX_PERIOD, GateMode
from knnlm_core.knn.lambdas import LambdaMode, parse_lambda_mode
from knnlm_core.retrieval import MAX_K, MAX_SOURCES, MAX_TEMPERATURE, MIN_TEMPERATURE
from knnlm_server.api.schemas.limits import shown

logger = logging.getLogger(__name__)

MAX_EXCLUDED_DOCUMENTS = 1024
MAX_WEIGHT = 1e6

# The first bad element ends the check: a body of millions of them must not become millions of errors.
TokenIds = Annotated[list[Annotated[int, shown(minimum=0)]], Field(fail_fast=True)]


def _check_unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start} is no text") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
NonEmpty = Annotated[Text, StringConstraints(min_length=1)]
Texts = Annotated[list[NonEmpty], Field(fail_fast=True)]
ListOfTokenIds = Annotated[list[TokenIds], Field(fail_fast=True)]
DocumentIds = Annotated[list[Text], Field(fail_fast=True), shown(maxItems=MAX_EXCLUDED_DOCUMENTS)]

# Some clients send null for what they do not set.
_OR_NULL = WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "null"}]})
Off = Annotated[bool, BeforeValidator(lambda given: False if given is None else given), _OR_NULL]
On = Annotated[bool, BeforeValidator(lambda given: True if given is None else given), _OR_NULL]


class Body(BaseModel):
    """A request body; unknown fields are accepted at the top level, as clients send them."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def log_unknown(self) -> None:
        """Say at debug level which fields had no effect."""
        if self.model_extra and logger.isEnabledFor(logging.DEBUG):
            logger.debug("unknown fields ignored fields=%s", ",".join(sorted(self.model_extra)))


class ClosedBody(BaseModel):
    """An object inside a body that takes no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: Any) -> Any:
        """Keep the first unknown field alone: an object of thousands must not become thousands of errors."""
        if not isinstance(given, dict):
            return given
        known = {name for field, info in cls.model_fields.items() for name in (field, info.alias) if name}
        unknown = next((name for name in given if name not in known), None)
        if unknown is None:
            return given
        return {name: given[name] for name in (*known, unknown) if name in given}


class WeightedDatastore(ClosedBody):
    """One of several datastores."""

    name: Annotated[str, shown(minLength=1)] = Field(description="Name of a loaded datastore, or an alias.")
    weight: Annotated[float, shown(exclusiveMinimum=0, maximum=MAX_WEIGHT)] | None = Field(
        default=None, description="Share of the mixture, in any unit; of all datastores or of none."
    )


# Told apart by a look, so that what is wrong in a list is said of the list; the tags are what a union would say.
_Datastores = Annotated[
    Annotated[str, shown(minLength=1), Tag("str")]
    | Annotated[
        list[WeightedDatastore],
        Field(fail_fast=True),
        shown(minItems=1, maxItems=MAX_SOURCES),
        Tag("list[WeightedDatastore]"),
    ],
    Discriminator(lambda given: "list[WeightedDatastore]" if isinstance(given, list) else "str"),
]


class KnnBody(ClosedBody):
    """How this request retrieves; what is left out comes from the datastore's calibration."""

    datastore: _Datastores | None = Field(
        default=None, description="A loaded datastore, by name or alias, or several to be mixed."
    )
    mixture: Annotated[str, shown(enum=list(Fusion))] | None = Field(
        default=None,
        description="Of several datastores: `distributions` gives each its own τ and λ, `neighbors` puts the "
        "neighbours of all into one softmax and needs `temperature` and `lambda`.",
    )
    weights: Annotated[str, shown(enum=["given", "prompt"])] | None = Field(
        default=None,
        description="Of several datastores: as `given`, or by how well each one predicts the end of the `prompt`.",
    )
    k: Annotated[int, shown(minimum=1, maximum=MAX_K)] | None = Field(
        default=None, description="Neighbours per query and datastore."
    )
    temperature: Annotated[float, shown(minimum=MIN_TEMPERATURE, maximum=MAX_TEMPERATURE)] | None = Field(
        default=None, description="τ: divides squared distances."
    )
    lmbda: Annotated[float, shown(minimum=0, maximum=1)] | None = Field(
        default=None, alias="lambda", description="λ: weight of p_knn, 0 … 1, the same for every token."
    )
    lambda_mode: Annotated[str, shown(enum=list(LambdaMode))] | None = Field(
        default=None,
        description="How λ is set: `fixed` at the calibrated number or at `lambda`, or per token by a rule of the "
        "calibration, which was fitted for its k and τ: by the nearest distance (`bucketed`), by relative retrieval "
        "confidence (`rrc`), or by a small network (`learned`).",
    )
    gate: Annotated[str, shown(enum=list(GateMode))] | None = Field(
        default=None,
        description="When to search: always, never, at every n-th position (`every_n`), where the model is not "
        "confident (`confidence`), where there are no entries to go on from (`automaton`), or where it is expected to "
        "gain enough (`learned`). The last two follow what was found before where they do not search.",
    )
    gate_threshold: Annotated[float, shown(minimum=0, maximum=MAX_PERIOD)] | None = Field(
        default=None,
        description="Of gates that have one. every_n: n. confidence: search where the model gives its likeliest token "
        "less than this probability. automaton: search where fewer entries can be followed (1). learned: search where "
        "that is expected to gain more than so many nats (as calibrated).",
    )
    speculate: bool | None = Field(
        default=None,
        description="Draft from the datastore, in completions of servers that draft at all; the answer is the same. "
        "Drafts are made where they pay unless this is false.",
    )
    trace: Off = Field(default=False, description="Report per token how its probability came about.")
    attribution: Off = Field(
        default=False,
        description="Report which documents the tokens' probabilities came from, of the whole and per token; "
        "generated tokens get their `trace` too.",
    )

    def check_gate(self) -> None:
        """Raises InvalidKnnParams: a threshold of no gate."""
        if self.gate_threshold is not None and self.gate is None:
            raise InvalidKnnParams(
                "`knn.gate_threshold` needs `knn.gate`, and this request names none", param="knn.gate_threshold"
            )

    @property
    def mode_of_lambda(self) -> LambdaMode | None:
        """How λ is to be set, if the request says so. Raises InvalidKnnParams: see `parse_lambda_mode`."""
        if self.lambda_mode is not None:
            return parse_lambda_mode(self.lambda_mode, beside=self.lmbda is not None)
        return LambdaMode.FIXED if self.lmbda is not None else None

    @property
    def stores(self) -> list[WeightedDatastore]:
        """The datastores that are named here, perhaps none."""
        if isinstance(self.datastore, str):
            return [WeightedDatastore(name=self.datastore)]
        return self.datastore or []

    @property
    def fusion(self) -> Fusion:
        """How several datastores are mixed."""
        return Fusion(self.mixture or Fusion.DISTRIBUTIONS)

    @property
    def weighs_by_prompt(self) -> bool:
        """Whether the prompt decides the weights."""
        return self.weights == "prompt"

    def check_mixture(self) -> None:
        """Raises InvalidParameter, InvalidKnnParams: what is said of several datastores is out of bounds or at odds."""
        for field, value, known in (
            ("mixture", self.mixture, tuple(Fusion)),
            ("weights", self.weights, ("given", "prompt")),
        ):
            if value is not None and value not in known:
                raise InvalidKnnParams(
                    f"`knn.{field}` must be one of {', '.join(known)}, got {value[:80]!r}", param=f"knn.{field}"
                )
        self._check_stores()
        if self.weighs_by_prompt:
            self._check_prompt()
        if self.fusion is Fusion.NEIGHBORS:
            self._check_neighbors()

    def _check_stores(self) -> None:
        if any(not store.name for store in self.stores):
            raise InvalidParameter(
                "`knn.datastore` must be the name of a loaded datastore, got ''", param="knn.datastore"
            )
        if not isinstance(self.datastore, list):
            return
        if not 1 <= len(self.datastore) <= MAX_SOURCES:
            raise InvalidParameter(
                f"`knn.datastore` must name 1 … {MAX_SOURCES} datastores, got {len(self.datastore)}",
                param="knn.datastore",
            )
        weights = [store.weight for store in self.datastore]
        for index, weight in enumerate(weights):
            if weight is not None and not 0 < weight <= MAX_WEIGHT:
                raise InvalidKnnParams(
                    f"`knn.datastore.{index}.weight` must be above 0 and at most {MAX_WEIGHT:g}, got {weight:g}",
                    param=f"knn.datastore.{index}.weight",
                )
        if None in weights and any(weight is not None for weight in weights):
            raise InvalidKnnParams(
                f"`knn.datastore` must give a weight to all datastores or to none, "
                f"got {sum(weight is not None for weight in weights)} of {len(weights)}",
                param="knn.datastore",
            )

    @property
    def _gives_weights(self) -> bool:
        return any(store.weight is not None for store in self.stores)

    def _check_prompt(self) -> None:
        if self._gives_weights:
            raise InvalidKnnParams(
                "`knn.weights` must not be prompt where `knn.datastore` gives weights", param="knn.weights"
            )
        if self.gate == GateMode.NEVER:
            raise InvalidKnnParams("`knn.weights` must not be prompt where `knn.gate` is never", param="knn.weights")

    def _check_neighbors(self) -> None:
        for field, value in (("temperature", self.temperature), ("lambda", self.lmbda)):
            if value is None:
                raise InvalidKnnParams(
                    f"`knn.mixture` neighbors needs one `knn.{field}` for all datastores", param=f"knn.{field}"
                )
        if self._gives_weights or self.weighs_by_prompt:
            raise InvalidKnnParams(
                "`knn.mixture` neighbors knows no weights: distances alone decide", param="knn.mixture"
            )
