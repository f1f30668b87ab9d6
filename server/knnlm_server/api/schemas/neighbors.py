"""``POST /v1/neighbors``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from knnlm_core.errors import InvalidKnnParams, InvalidParameter
from knnlm_core.knn.gates import GateMode
from knnlm_server.api.schemas.answers import Answer, TraceNeighbor
from knnlm_server.api.schemas.common import Body, DocumentIds, KnnBody, NonEmpty, Texts, TokenIds
from knnlm_server.api.schemas.limits import shown

MAX_CONTEXTS = 128
MAX_LIMIT = 100
MAX_CONTEXT_CHARS = 2000
_CONTEXTS = shown(minItems=1, maxItems=MAX_CONTEXTS)
_ContextIds = Annotated[TokenIds, shown(minItems=1)]

# All fields at once, and in agreement.
_EXAMPLE: JsonDict = {
    "input": ["The tenant may", "A buyer shall return"],
    "knn": {"datastore": "law", "k": 32, "temperature": 10.0, "lambda": 0.25, "gate": "always"},
    "limit": 5,
    "context_chars": 40,
    "exclude_documents": [],
}


class NeighborsBody(Body):
    """``POST /v1/neighbors``."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    model: str | None = Field(default=None, description="`<lm>@<datastore>`, or `<lm>` with `knn.datastore`.")
    input: (
        NonEmpty
        | Annotated[Texts, _CONTEXTS]
        | _ContextIds
        | Annotated[list[_ContextIds], Field(fail_fast=True), _CONTEXTS]
    ) = Field(description="A context, contexts, token ids, or lists of them.")
    knn: KnnBody | None = Field(default=None, description="The gate is not asked: every context is searched after.")
    limit: Annotated[int, shown(minimum=1, maximum=MAX_LIMIT)] = Field(
        default=10, description="Neighbours reported of the `knn.k` found in each datastore, and next tokens."
    )
    context_chars: Annotated[int, shown(minimum=0, maximum=MAX_CONTEXT_CHARS)] = Field(
        default=80, description="Characters of the source reported before and after a neighbour's token."
    )
    exclude_documents: DocumentIds | None = Field(
        default=None, description="Ids of documents whose entries must not be found."
    )

    def contexts(self) -> list[str | TokenIds]:
        """The contexts, one entry each."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]
        return cast(list[str | TokenIds], self.input)

    def check(self) -> None:
        """Raises InvalidParameter: a field is out of bounds, or has no effect here."""
        contexts = len(self.contexts())
        for name, value, low, high in (
            ("limit", self.limit, 1, MAX_LIMIT),
            ("context_chars", self.context_chars, 0, MAX_CONTEXT_CHARS),
        ):
            if not low <= value <= high:
                raise InvalidParameter(f"`{name}` must be in {low} … {high}, got {value}", param=name)
        if not 1 <= contexts <= MAX_CONTEXTS:
            raise InvalidParameter(f"`input` must hold 1 … {MAX_CONTEXTS} contexts, got {contexts}", param="input")
        gate = self.knn.gate if self.knn is not None else None
        if gate not in (None, GateMode.ALWAYS):
            raise InvalidKnnParams(
                f"`knn.gate` must be {GateMode.ALWAYS} here, where every context is searched after, got {gate!r}",
                param="knn.gate",
            )
        if self.knn is not None and self.knn.attribution:
            raise InvalidParameter(
                "`knn.attribution` must be false here: nothing is generated or scored", param="knn.attribution"
            )


# -- answers -----------------------------------------------------------------------------------------------------------


class Neighbor(TraceNeighbor):
    """An entry that was found, in the text that it comes from."""

    token_id: int = Field(ge=0, description="The entry's value: the token that followed its context.")
    before: str
    text: str = Field(description="The source's characters `char_start` … `char_end`.")
    after: str


class NextToken(Answer):
    """A token that neighbours hold, and its probability."""

    token_id: int = Field(ge=0)
    token: str
    p_knn: float = Field(gt=0)
    p_lm: float = Field(ge=0)
    p: float = Field(ge=0, description="Of the mixture: λ p_knn + (1 − λ) p_lm.")


class NeighborsResult(Answer):
    """What is found after one context."""

    index: int = Field(ge=0, description="Its position in `input`.")
    tokens: int = Field(ge=1, description="Of the context.")
    neighbors: list[Neighbor] = Field(
        max_length=MAX_LIMIT, description="Nearest first; of several datastores with a λ each, by weight."
    )
    next_tokens: list[NextToken] = Field(max_length=MAX_LIMIT, description="By p_knn, the largest first.")


class NeighborsAnswer(Answer):
    """The answer of ``POST /v1/neighbors``."""

    object: Literal["neighbors"]
    model: str
    system_fingerprint: str
    results: list[NeighborsResult] = Field(min_length=1)


RESPONSES: dict[int | str, dict[str, Any]] = {200: {"model": NeighborsAnswer}}
