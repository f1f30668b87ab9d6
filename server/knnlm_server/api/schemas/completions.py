"""``POST /v1/completions``."""

from __future__ import annotations

from typing import cast

from pydantic import Field

from knnlm_core.errors import InvalidParameter, UnsupportedFeature
from knnlm_server.api.schemas.common import ListOfTokenIds, Text, Texts, TokenIds
from knnlm_server.api.schemas.generation import GenerationBody
from knnlm_server.engine.sampling_params import SamplingParams

MAX_PROMPTS = 1024


class CompletionBody(GenerationBody):
    """A request to complete prompts."""

    prompt: Text | Texts | TokenIds | ListOfTokenIds = Field(description="Text, texts, token ids, or lists of them.")
    max_tokens: int | None = Field(
        default=None, description="Most tokens to generate; 16 by default, 0 only with `echo`."
    )
    logprobs: int | None = Field(default=None, description="Alternatives reported per token, 0 … 20.")
    echo: bool = Field(default=False, description="Put the prompt before the completion, and its log-probabilities.")
    best_of: int | None = Field(
        default=None, description="Generate this many and return the `n` with the best mean log-probability."
    )
    suffix: Text | None = Field(default=None, description="Not offered: must be empty or absent.")

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedFeature or InvalidParameter for fields that cannot be honoured, or not together."""
        super().refuse_unsupported()
        if self.suffix:
            raise UnsupportedFeature("`suffix` is not offered by this server", param="suffix")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParameter("`max_tokens` must be at least 1 without `echo`, got 0", param="max_tokens")
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
