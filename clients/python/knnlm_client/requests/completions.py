"""The body of a completion."""

from __future__ import annotations

from knnlm_client.requests.common import (
    GenerationOptions,
    GenerationRequest,
    StreamOptions,
    Texts,
    TokenIdLists,
    TokenIds,
)


class CompletionOptions(GenerationOptions, total=False):
    """Keywords of `completions`, beside prompt and model; `CompletionRequest` explains them."""

    best_of: int | None
    logprobs: int | None
    echo: bool | None


class StreamCompletionOptions(CompletionOptions, total=False):
    """Keywords of `stream_completions`."""

    stream_options: StreamOptions | None


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`.

    Attributes:
        prompt: a text, several texts, the token ids of one prompt, or those of several.
        best_of: generate so many per prompt and return the n of the highest mean log-probability per token.
        logprobs: how many alternatives to report per token, of the mixed distribution.
        echo: put the prompt before the completion; with `max_tokens=0` the prompt alone is scored.
    """

    prompt: str | Texts | TokenIds | TokenIdLists
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
