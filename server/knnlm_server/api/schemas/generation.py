"""Fields that completions and chat share: sampling, stopping and streaming."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from knnlm_core.errors import InvalidParameter, UnsupportedFeature
from knnlm_server.api.schemas.common import Body, KnnBody, Off, On, Text, TokenIds
from knnlm_server.api.schemas.limits import shown
from knnlm_server.engine.sampling_params import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_REPETITION_PENALTY,
    MIN_SEED,
    SamplingParams,
)

_TOKEN_ID = re.compile(r"[0-9]{1,9}")
# FastAPI writes limits as floats, which MAX_SEED is not.
_SEED = shown(minimum=MIN_SEED, exclusiveMaximum=MAX_SEED + 1)
_LOGIT_BIAS = shown(
    propertyNames={"pattern": f"^{_TOKEN_ID.pattern}$"},
    additionalProperties={"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS},
    maxProperties=MAX_LOGIT_BIASES,
)
Stop = Annotated[Text, shown(minLength=1, maxLength=MAX_STOP_CHARS)]
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
)

# All fields at once, and in agreement.
GENERATION_EXAMPLE: JsonDict = {
    "min_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.01,
    "n": 2,
    "stop": ["\n\n"],
    "stop_token_ids": [2],
    "include_stop_str_in_output": True,
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"11": -1.5},
    "ignore_eos": False,
    "skip_special_tokens": True,
    "stream": False,
    "knn": {
        "datastore": [{"name": "law", "weight": 3}],
        "mixture": "distributions",
        "weights": "given",
        "k": 32,
        "temperature": 10.0,
        "lambda": 0.25,
        "gate": "always",
        "trace": True,
        "attribution": True,
    },
}
STREAM_EXAMPLE: JsonDict = {
    "max_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": False},
}


class StreamOptions(BaseModel):
    """What a stream reports besides tokens."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: Off = Field(default=False, description="Send the usage of the whole request last.")
    continuous_usage_stats: Off = Field(default=False, description="Send the usage so far with every chunk.")


class GenerationBody(Body):
    """What can be said about how tokens are chosen and when they end."""

    model: str | None = Field(default=None, description="`<lm>`, `<lm>@<datastore>` or `<lm>@<datastore>+<datastore>`.")
    temperature: Annotated[float, shown(minimum=0)] | None = Field(
        default=None, description="Divides the scores; 0 is greedy, 1 the default."
    )
    top_p: Annotated[float, shown(minimum=0, maximum=1)] | None = None
    top_k: Annotated[int, shown(minimum=-1)] | None = None
    min_p: Annotated[float, shown(minimum=0, maximum=1)] | None = None
    n: Annotated[int, shown(minimum=1, maximum=MAX_CHOICES)] | None = Field(
        default=None, description="Choices per prompt; 1 by default."
    )
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True), shown(maxItems=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[TokenIds, shown(maxItems=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: Off = False
    seed: Annotated[int, _SEED] | None = None
    presence_penalty: Annotated[float, shown(minimum=-MAX_PENALTY, maximum=MAX_PENALTY)] | None = None
    frequency_penalty: Annotated[float, shown(minimum=-MAX_PENALTY, maximum=MAX_PENALTY)] | None = None
    repetition_penalty: (
        Annotated[float, shown(minimum=MIN_REPETITION_PENALTY, maximum=MAX_REPETITION_PENALTY)] | None
    ) = None
    logit_bias: Annotated[dict[str, Any], _LOGIT_BIAS] | None = Field(
        default=None, description="Token id → what is added to its score."
    )
    ignore_eos: Off = False
    min_tokens: Annotated[int, shown(minimum=0)] | None = None
    skip_special_tokens: On = True
    stream: Off = False
    stream_options: StreamOptions | None = None
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
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("`stream_options` needs `stream`: true", param="stream_options")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage of the whole request."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def wants_trace(self) -> bool:
        """Whether to report per token how its probability came about."""
        return self.knn is not None and (self.knn.trace or self.knn.attribution)

    @property
    def wants_attribution(self) -> bool:
        """Whether to report which documents it came from."""
        return self.knn is not None and self.knn.attribution

    def sampling_params(self, *, n: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's view of this body; fields left out or null take the engine's defaults.

        Args:
            n: choices to generate per prompt.
            max_tokens: None for the engine's default.
            logprobs: alternatives to report per token, None for none at all.
        """
        given = {name: getattr(self, name) for name in _SAMPLING} | {"max_tokens": max_tokens}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            n=n,
            logprobs=logprobs,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_token_biases(self.logit_bias or {}),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
        )


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
        if not -MAX_LOGIT_BIAS <= value <= MAX_LOGIT_BIAS:  # an int may be too large to become a float
            raise InvalidParameter(
                f"`logit_bias` values must be from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}, "
                f"got {_shortened(value)} for token {key}",
                param="logit_bias",
            )
        biases[int(key)] = float(value)
    return biases


def _shortened(value: float) -> str:
    """A number as it was given, unless it is longer than anybody would read."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)
