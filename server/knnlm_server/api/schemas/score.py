"""``POST /v1/score``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.config import JsonDict
from pydantic.json_schema import SkipJsonSchema

from knnlm_core.windows import WindowSizes, settle_windows
from knnlm_server.api.schemas.answers import Answer, AnswerAttribution, TokenAttribution
from knnlm_server.api.schemas.common import (
    Body,
    ClosedBody,
    DocumentIds,
    KnnBody,
    ListOfTokenIds,
    NonEmpty,
    Off,
    Text,
    Texts,
    TokenIds,
)
from knnlm_server.api.schemas.events import json_lines
from knnlm_server.api.schemas.limits import shown

MAX_TEXTS = 4096
MAX_SCORE_TOKENS = 16_000_000  # of all texts; about 20 bytes each while they are scored
_TEXTS = shown(minItems=1, maxItems=MAX_TEXTS)


class DocumentInput(ClosedBody):
    """A document of the datastore, scored as if the datastore did not hold it."""

    document_id: NonEmpty


class TextAfterContext(ClosedBody):
    """A text that goes on from a context, each tokenised by itself."""

    context: Annotated[Text, shown(minLength=1)] = Field(description="Conditioned on and not scored, as a prompt is.")
    text: Text = Field(description="Scored from its first token on.")


class TokensAfterContext(ClosedBody):
    """Token ids that go on from a context: what a completion generated after its prompt, exactly."""

    context: Annotated[TokenIds, shown(minItems=1)] = Field(description="Conditioned on and not scored.")
    text: TokenIds = Field(description="Scored from its first token on.")


AfterContext = TextAfterContext | TokensAfterContext
ScoreInput = str | TokenIds | DocumentInput | AfterContext


def _form_of_pair(given: Any) -> str:
    is_ids = isinstance(given, dict) and isinstance(given.get("context"), list)
    return "list[int]" if is_ids else "str"


def _form_of_input(given: Any) -> str:
    if not isinstance(given, list):
        return "str"
    match given[0] if given else "":
        case str():
            return "list[str]"
        case {"document_id": _}:
            return "list[DocumentInput]"
        case dict():
            return "list[AfterContext]"
    return "list[list[int]]"


# Told apart by a look, so that what is wrong in a list is said of its element; the tags are what a union would say.
_Pair = Annotated[
    Annotated[TextAfterContext, Tag("str")] | Annotated[TokensAfterContext, Tag("list[int]")],
    Discriminator(_form_of_pair),
]
_Input = Annotated[
    Annotated[NonEmpty, Tag("str")]
    | Annotated[Texts, _TEXTS, Tag("list[str]")]
    | Annotated[ListOfTokenIds, _TEXTS, Tag("list[list[int]]")]
    | Annotated[list[DocumentInput], Field(fail_fast=True), _TEXTS, Tag("list[DocumentInput]")]
    | Annotated[list[_Pair], Field(fail_fast=True), _TEXTS, Tag("list[AfterContext]")],
    Discriminator(_form_of_input),
]

# All fields at once, and in agreement.
_EXAMPLE: JsonDict = {
    "input": ["The tenant may refuse to pay.", "A buyer shall return the goods."],
    "knn": {"datastore": "law", "k": 32, "temperature": 10.0, "lambda": 0.25, "gate": "always", "attribution": True},
    "per_token": True,
    "overlap": True,
    "exclude_documents": [],
    "window": 64,
    "stride": 32,
    "stream": True,
}
_AFTER_CONTEXT: JsonDict = {
    "input": [
        {"context": "The tenant may", "text": " refuse to pay."},
        {"context": [32, 76, 340], "text": [265, 12]},
    ],
    "knn": {"datastore": "law", "gate": "automaton", "gate_threshold": 2},
    "per_token": True,
}


class ScoreBody(Body):
    """``POST /v1/score``."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE, _AFTER_CONTEXT]})

    model: str | None = Field(default=None, description="`<lm>`, `<lm>@<datastore>` or `<lm>@<datastore>+<datastore>`.")
    input: _Input = Field(
        description="A text, texts, lists of token ids, or documents of the datastore, of which there must be one; or "
        "texts that go on from a context, which is conditioned on and not scored. A text after a context is tokenised "
        "by itself, as is the context: give token ids to score what a completion generated exactly as it did."
    )
    knn: KnnBody | None = None
    per_token: Off = Field(default=False, description="Report every token.")
    overlap: Off = Field(
        default=False,
        description="Report the tokens by the longest run that ends with them and stands in the datastore, within one "
        "document that is not excluded. Needs exactly one datastore.",
    )
    exclude_documents: DocumentIds | None = Field(
        default=None, description="Ids of documents whose entries must not be found."
    )
    window: Annotated[int, shown(minimum=2)] | None = Field(
        default=None, description="Tokens per window; 1024 by default, or the LM's context."
    )
    stride: Annotated[int, shown(minimum=1)] | None = Field(
        default=None, description="Tokens scored per window after the first; half the window by default."
    )
    stream: Off = Field(default=False, description="Send each text as soon as it is done, and progress meanwhile.")

    def windows(self, max_length: int) -> WindowSizes:
        """How texts are cut for an LM with a context of ``max_length`` tokens.

        Raises: InvalidParameter: window or stride is out of bounds.
        """
        return settle_windows(self.window, self.stride, max_length=max_length)

    @property
    def wants_attribution(self) -> bool:
        """Whether to report which documents the tokens' probabilities came from."""
        return self.knn is not None and self.knn.attribution

    def inputs(self) -> list[ScoreInput]:
        """What is to be scored, one entry per text."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


# -- answers -----------------------------------------------------------------------------------------------------------


class TokenLoss(Answer):
    """How well tokens are predicted."""

    # Rounding can put a sum a little below 0.
    nll: float | None = Field(description="Nats, summed; null where a token has probability 0.")
    perplexity: float | None = Field(gt=0, description="exp(nll / tokens); null where nll is, or without tokens.")


class Loss(TokenLoss):
    """How well tokens are predicted, per token and per byte."""

    bits_per_byte: float | None = Field(description="nll in bits, over the bytes; null where nll is, or without bytes.")


class OverlapBucket(Answer):
    """The scored tokens whose longest match in the datastore is about as long."""

    longest_match: tuple[int, int | None] = Field(description="Tokens, from … to, both included; null for no bound.")
    tokens: int = Field(ge=0)
    base: TokenLoss
    mixed: TokenLoss


class ScoredToken(Answer):
    """One scored token."""

    id: int = Field(ge=0)
    token: str
    offset: int | None = Field(
        ge=0, description="Character of the text at which it begins; null where token ids were given."
    )
    base: float = Field(le=1e-3, description="Log-probability, natural; −9999 for a probability of 0.")
    mixed: float = Field(le=1e-3)
    lmbda: float = Field(alias="lambda", ge=0, le=1, description="λ: weight of p_knn.")
    decision: str = Field(description="Which gate decided whether to search; `base` without a datastore.")
    searched: bool
    followed: bool = Field(description="Whether entries next to those found before were used instead of a search.")
    attribution: TokenAttribution | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.attribution`."
    )
    longest_match: Literal[0, 1, 2, 4, 8, 16, 32] | SkipJsonSchema[None] = Field(
        default=None, description="With `overlap`: the longest match has at least so many tokens, and less than twice."
    )


class ScoreTotal(Answer):
    """Sums over texts; only scored tokens count, and their bytes."""

    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    searched: int = Field(ge=0, description="Tokens before which the datastore was searched.")
    followed: int = Field(ge=0, description="Tokens for which entries next to those found before were used instead.")
    base: Loss = Field(description="Of the LM alone.")
    mixed: Loss = Field(description="Of the mixture.")
    overlap: Annotated[list[OverlapBucket], Field(min_length=7, max_length=7)] | SkipJsonSchema[None] = Field(
        default=None, description="Only with `overlap`."
    )


class ScoreResult(ScoreTotal):
    """One text."""

    index: int = Field(ge=0, description="Its position in `input`.")
    document_id: str | SkipJsonSchema[None] = Field(default=None, description="Where `input` gave one.")
    per_token: list[ScoredToken] | SkipJsonSchema[None] = Field(default=None, description="Only with `per_token`.")
    attribution: AnswerAttribution | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.attribution`."
    )


class Score(Answer):
    """The answer in one piece."""

    object: Literal["score"]
    model: str
    system_fingerprint: str
    results: list[ScoreResult] = Field(min_length=1)
    total: ScoreTotal


class ScoreProgressLine(Answer):
    """How far a stream has come; tokens are those to be scored."""

    object: Literal["score.progress"]
    texts: int = Field(ge=1)
    texts_done: int = Field(ge=0)
    tokens: int = Field(ge=0)
    tokens_done: int = Field(ge=0)


class ScoreResultLine(ScoreResult):
    """A text that is done, in any order."""

    object: Literal["score.result"]


class ScoreTotalLine(Answer):
    """The last line of a stream."""

    object: Literal["score.total"]
    model: str
    system_fingerprint: str
    total: ScoreTotal


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Score, "content": json_lines(ScoreProgressLine, ScoreResultLine, ScoreTotalLine)}
}
