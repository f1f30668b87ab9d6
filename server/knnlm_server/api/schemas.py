"""Request bodies. Unknown fields are accepted at the top level, as clients send them, but never inside ``knn``."""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any, NamedTuple, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from knnlm_core.errors import InvalidParameter, UnsupportedFeature
from knnlm_core.windows import check_window
from knnlm_server.engine.sampling_params import MAX_LOGIT_BIASES, SamplingParams

logger = logging.getLogger(__name__)

# The first bad element ends the check: a body of millions of them must not become millions of errors.
TokenIds = Annotated[list[int], Field(fail_fast=True)]


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
MAX_PROMPTS = 1024
_TOKEN_ID = re.compile(r"[0-9]{1,9}")
MAX_TEXTS = 4096
DEFAULT_WINDOW = 1024


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def log_unknown(self) -> None:
        """Say at debug level which fields had no effect."""
        if self.model_extra:
            logger.debug("unknown fields ignored fields=%s", ",".join(sorted(self.model_extra)))


class KnnBody(BaseModel):
    """How this request retrieves; what is left out comes from the datastore's calibration."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    datastore: str | list[dict[str, Any]] | None = Field(default=None, description="Name of a loaded datastore.")
    k: int | None = Field(default=None, description="Neighbours per query.")
    temperature: float | None = Field(default=None, description="τ: divides squared distances.")
    lmbda: float | None = Field(default=None, alias="lambda", description="λ: weight of p_knn, 0 … 1.")
    gate: str | None = Field(default=None, description="When to search: always or never.")
    gate_threshold: float | None = Field(default=None, description="Threshold of the gate, for gates that have one.")
    speculate: bool | None = Field(default=None, description="Draft from the datastore; not offered by this build.")
    trace: bool = Field(default=False, description="Report per token how its probability came about.")

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


class StreamOptions(BaseModel):
    """What a stream reports besides tokens."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CompletionBody(_Body):
    """``POST /v1/completions``."""

    model: str | None = Field(default=None, description="`<lm>` or `<lm>@<datastore>`.")
    prompt: Text | Texts | TokenIds | ListOfTokenIds = Field(description="Text, texts, token ids, or lists of them.")
    max_tokens: int | None = Field(default=None, description="Most tokens to generate; 16 by default.")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = Field(default=None, description="Alternatives reported per token, 0 … 20.")
    echo: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    best_of: int | None = None
    user: str | None = None
    knn: KnnBody | None = None

    def refuse_unsupported(self) -> None:
        """Raises UnsupportedFeature for fields that would change the answer but cannot be honoured."""
        extra = self.model_extra or {}
        for name in ("tools", "functions"):
            if extra.get(name):
                raise UnsupportedFeature(f"`{name}` is not offered by this server", param=name)
        response_format = extra.get("response_format")
        if response_format not in (None, {"type": "text"}):
            raise UnsupportedFeature(
                "`response_format` other than text is not offered by this server", param="response_format"
            )
        if self.echo:
            raise UnsupportedFeature("`echo` is not offered by this build; POST /v1/score scores prompts", param="echo")
        if self.suffix:
            raise UnsupportedFeature("`suffix` is not offered by this server", param="suffix")
        if self.best_of not in (None, self.n or 1):
            raise UnsupportedFeature(f"`best_of` must equal `n`, got {self.best_of}", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise UnsupportedFeature("`stream_options` needs `stream`: true", param="stream_options")
        if self.knn is not None:
            self.knn.refuse_unsupported()

    def sampling_params(self) -> SamplingParams:
        """The engine's view of this body; fields left out or null take the engine's defaults."""
        given = {
            name: getattr(self, name)
            for name in (
                "max_tokens",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "n",
                "seed",
                "logprobs",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "min_tokens",
            )
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_token_biases(self.logit_bias or {}),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )

    def prompts(self) -> list[str | TokenIds]:
        """The prompts, one entry each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | TokenIds], self.prompt)


class Windows(NamedTuple):
    """See `rolling_windows`."""

    window: int
    stride: int


class ScoreBody(_Body):
    """``POST /v1/score``."""

    model: str | None = Field(default=None, description="`<lm>` or `<lm>@<datastore>`.")
    input: NonEmpty | Texts | ListOfTokenIds = Field(description="Texts, or lists of token ids.")
    knn: KnnBody | None = None
    per_token: bool = Field(default=False, description="Report every token.")
    exclude_documents: Annotated[list[str], Field(fail_fast=True)] = Field(
        default=[], description="Ids of documents whose entries must not be found."
    )
    window: int | None = Field(default=None, description="Tokens per window; 1024 by default, or the LM's context.")
    stride: int | None = Field(
        default=None, description="Tokens scored per window after the first; half the window by default."
    )

    def windows(self, max_length: int) -> Windows:
        """How texts are cut for an LM with a context of ``max_length`` tokens.

        Raises: InvalidParameter: window or stride is out of bounds.
        """
        window = self.window if self.window is not None else min(DEFAULT_WINDOW, max_length)
        stride = self.stride if self.stride is not None else max(1, window // 2)
        check_window(window, stride, max_length)
        return Windows(window, stride)

    def texts(self) -> list[str | TokenIds]:
        """The texts, one entry each."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


class LoadBody(BaseModel):
    """``PUT /v1/datastores/{name}``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    version: NonEmpty = Field(default="current", description="`current` or a published version.")


def _token_biases(given: dict[str, Any]) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIASES:
        raise InvalidParameter(
            f"`logit_bias` must name at most {MAX_LOGIT_BIASES} tokens, got {len(given)}", param="logit_bias"
        )
    biases = {}
    for key, value in given.items():
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidParameter(f"`logit_bias` keys must be token ids, got {key[:80]!r}", param="logit_bias")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidParameter(
                f"`logit_bias` values must be numbers, got {str(value)[:80]!r} for token {key}", param="logit_bias"
            )
        biases[int(key)] = float(value)
    return biases
