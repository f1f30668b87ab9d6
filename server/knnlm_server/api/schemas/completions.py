"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.json_schema import SkipJsonSchema

from knnlm_core.errors import InvalidParameter, UnsupportedFeature
from knnlm_server.api.schemas.answers import Answer, AnswerAttribution, TokenTraceEntry, Usage
from knnlm_server.api.schemas.common import Off, Text, Texts, TokenIds
from knnlm_server.api.schemas.events import event_stream
from knnlm_server.api.schemas.generation import GENERATION_EXAMPLE, STREAM_EXAMPLE, GenerationBody
from knnlm_server.api.schemas.limits import shown
from knnlm_server.engine.events import FinishReason
from knnlm_server.engine.sampling_params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

MAX_PROMPTS = 1024
_PROMPTS = shown(minItems=1, maxItems=MAX_PROMPTS)
_PromptIds = Annotated[TokenIds, shown(minItems=1)]
_EXAMPLE: JsonDict = {
    **GENERATION_EXAMPLE,
    "prompt": "The tenant may refuse",
    "max_tokens": 8,
    "best_of": 2,
    "logprobs": 3,
    "echo": True,
    "suffix": "",
}
_STREAMED: JsonDict = {**STREAM_EXAMPLE, "prompt": "The tenant may refuse"}


class CompletionBody(GenerationBody):
    """A request to complete prompts."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE, _STREAMED]})

    prompt: (
        Text | Annotated[Texts, _PROMPTS] | _PromptIds | Annotated[list[_PromptIds], Field(fail_fast=True), _PROMPTS]
    ) = Field(description="Text, texts, token ids, or lists of them.")
    max_tokens: Annotated[int, shown(minimum=0)] | None = Field(
        default=None, description="Most tokens to generate; 16 by default, 0 only with `echo`."
    )
    logprobs: Annotated[int, shown(minimum=0, maximum=MAX_LOGPROBS)] | None = Field(
        default=None, description="Alternatives reported per token, 0 … 20."
    )
    echo: Off = Field(default=False, description="Put the prompt before the completion, and its log-probabilities.")
    best_of: Annotated[int, shown(minimum=1, maximum=MAX_CHOICES)] | None = Field(
        default=None, description="Generate this many and return the `n` with the best mean log-probability."
    )
    suffix: Annotated[Text, shown(maxLength=0)] | None = Field(
        default=None, description="Not offered: must be empty or absent."
    )

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedFeature or InvalidParameter for fields that cannot be honoured, or not together."""
        super().refuse_unsupported()
        if self.suffix:
            raise UnsupportedFeature("`suffix` is not offered by this server", param="suffix")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParameter("`max_tokens` must be at least 1 without `echo`, got 0", param="max_tokens")
        for field, count in (("n", self.returned_n), ("best_of", self.generated_n)):
            if not 1 <= count <= MAX_CHOICES:
                raise InvalidParameter(f"`{field}` must be from 1 to {MAX_CHOICES}, got {count}", param=field)
        if self.generated_n < self.returned_n:
            raise InvalidParameter(
                f"`best_of` must be at least `n` ({self.returned_n}), got {self.best_of}", param="best_of"
            )
        if self.stream and self.generated_n > self.returned_n:
            raise InvalidParameter(
                f"`best_of` must equal `n` ({self.returned_n}) in a stream, got {self.best_of}", param="best_of"
            )

    @property
    def returned_n(self) -> int:
        """Choices per prompt in the answer."""
        return 1 if self.n is None else self.n

    @property
    def generated_n(self) -> int:
        """Choices per prompt that are generated."""
        return self.returned_n if self.best_of is None else self.best_of

    def params(self) -> SamplingParams:
        """The engine's view of this body."""
        # Ranking needs no alternatives: every token's own log-probability is always known.
        return self.sampling_params(n=self.generated_n, max_tokens=self.max_tokens, logprobs=self.logprobs)

    def prompts(self) -> list[str | TokenIds]:
        """The prompts, one entry each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | TokenIds], self.prompt)


# -- answers -----------------------------------------------------------------------------------------------------------


class CompletionLogProbs(Answer):
    """Four columns with one row per token; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(
        description="Natural log, of the mixture, before penalties and temperature."
    )
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Annotated[int, Field(ge=0)]] = Field(description="Character of `text` at which a token begins.")


class CompletionChoice(Answer):
    """One completion."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogProbs | None
    finish_reason: FinishReason
    knn: list[TokenTraceEntry] | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.trace` or `knn.attribution`."
    )
    attribution: AnswerAttribution | SkipJsonSchema[None] = Field(
        default=None, description="Only with `knn.attribution`; in a stream with the choice's last chunk."
    )


class CompletionPiece(CompletionChoice):
    """What is new of a completion."""

    finish_reason: FinishReason | None  # type: ignore[assignment]


class Completion(Answer):
    """The answer in one piece."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(ge=0, description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(
        description="Of the LM, with name, version, generation and revision of each datastore."
    )
    choices: list[CompletionChoice] = Field(min_length=1)
    usage: Usage


class CompletionChunk(Completion):
    """An event of a stream; the one that carries the usage of the whole has no choice."""

    choices: list[CompletionPiece] = Field(max_length=1)  # type: ignore[assignment]
    usage: Usage | None = None  # type: ignore[assignment]


RESPONSES: dict[int | str, dict[str, Any]] = {200: {"model": Completion, "content": event_stream(CompletionChunk)}}
