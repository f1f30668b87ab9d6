"""What bodies of several routes share: texts, token ids, and how a request retrieves."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from knnlm_core.errors import UnsupportedFeature
from knnlm_core.knn.gates import Gate
from knnlm_core.mixture import MAX_K, MAX_TEMPERATURE, MIN_TEMPERATURE
from knnlm_server.api.schemas.limits import shown

logger = logging.getLogger(__name__)

MAX_EXCLUDED_DOCUMENTS = 1024

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


class KnnBody(ClosedBody):
    """How this request retrieves; what is left out comes from the datastore's calibration."""

    datastore: Annotated[str, shown(minLength=1)] | SkipJsonSchema[list[dict[str, Any]]] | None = Field(
        default=None, description="Name of a loaded datastore."
    )
    k: Annotated[int, shown(minimum=1, maximum=MAX_K)] | None = Field(default=None, description="Neighbours per query.")
    temperature: Annotated[float, shown(minimum=MIN_TEMPERATURE, maximum=MAX_TEMPERATURE)] | None = Field(
        default=None, description="τ: divides squared distances."
    )
    lmbda: Annotated[float, shown(minimum=0, maximum=1)] | None = Field(
        default=None, alias="lambda", description="λ: weight of p_knn, 0 … 1."
    )
    gate: Annotated[str, shown(enum=list(Gate))] | None = Field(
        default=None, description="When to search: always or never."
    )
    gate_threshold: Annotated[float | None, WithJsonSchema({"type": "null"})] = Field(
        default=None, description="Threshold of the gate, for gates that have one; this build knows none."
    )
    speculate: Annotated[bool, shown(const=False)] | None = Field(
        default=None, description="Draft from the datastore; not offered by this build."
    )
    trace: Off = Field(default=False, description="Report per token how its probability came about.")

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedFeature for what later releases will honour."""
        if isinstance(self.datastore, list):
            raise UnsupportedFeature(
                "`knn.datastore` must be one name; mixtures of datastores are not offered by this build",
                param="knn.datastore",
            )
        if self.speculate:
            raise UnsupportedFeature("`knn.speculate` is not offered by this build", param="knn.speculate")
        if self.gate_threshold is not None:
            raise UnsupportedFeature(
                "`knn.gate_threshold` needs a gate with a threshold; this build knows always and never",
                param="knn.gate_threshold",
            )
