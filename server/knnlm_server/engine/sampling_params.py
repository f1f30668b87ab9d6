"""How the tokens of one request are chosen and when they end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from knnlm_core.errors import InvalidParameter

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
# Wide enough for any use, narrow enough that a penalised score stays finite in float64.
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling, penalties and stopping; `check` it before use.

    Attributes:
        max_tokens: most tokens to generate per choice; 0 only reads the prompt.
        temperature: divides the scores; 0 is greedy.
        top_p: keep the fewest most likely tokens whose mass reaches this share; at least one, 1 is off.
        top_k: keep this many most likely tokens; 0 or −1 is off.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 is off.
        n: how many choices to generate for each prompt.
        stop: strings that end the text where the first of them is complete.
        seed: makes sampling reproducible; None lets the engine draw one.
        presence_penalty: subtracted from the score of every token generated before.
        frequency_penalty: the same, times how often the token was generated.
        repetition_penalty: multiplies the log-probability of every token of prompt or generation; 1 is off.
        logit_bias: token id → what is added to its score.
        logprobs: how many alternatives to report with each token; None reports nothing, 0 only the token.
        ignore_eos: go on after an end-of-sequence token.
        min_tokens: no end-of-sequence or stop token before this many.
        stop_token_ids: tokens that end the text, besides the model's own.
        include_stop_str_in_output: leave the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen before change the scores."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check(self, vocab_size: int) -> None:
        """Refuse values outside their limits.

        Args:   vocab_size: V, columns of the log-probabilities.
        Raises: InvalidParameter: naming the field, its limit and the value given.
        """
        _at_least("max_tokens", self.max_tokens, 0)
        _between("min_tokens", self.min_tokens, 0, self.max_tokens)
        _between("n", self.n, 1, MAX_CHOICES)
        _at_least("temperature", self.temperature, 0)
        _between("top_p", self.top_p, 0, 1)
        _at_least("top_k", self.top_k, -1)
        _between("min_p", self.min_p, 0, 1)
        _between("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _between("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _between("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        if self.seed is not None:
            _between("seed", self.seed, MIN_SEED, MAX_SEED)
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_logit_bias(vocab_size)
        self._check_stops(vocab_size)

    def _check_logit_bias(self, vocab_size: int) -> None:
        _at_most_many("logit_bias", len(self.logit_bias), MAX_LOGIT_BIASES, "entries")
        for token_id, bias in self.logit_bias.items():
            _in_vocabulary("logit_bias", token_id, vocab_size)
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                raise InvalidParameter(
                    f"`logit_bias` values must be from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}, "
                    f"got {bias!r} for token {token_id}",
                    param="logit_bias",
                )

    def _check_stops(self, vocab_size: int) -> None:
        _at_most_many("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
        for token_id in self.stop_token_ids:
            _in_vocabulary("stop_token_ids", token_id, vocab_size)
        _at_most_many("stop", len(self.stop), MAX_STOP_STRINGS, "strings")
        for stop in self.stop:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise InvalidParameter(
                    f"each string of `stop` must have from 1 to {MAX_STOP_CHARS} characters, got {len(stop)}",
                    param="stop",
                )


def _at_least(name: str, value: float, low: float) -> None:
    # Compared so that NaN fails; ints of any size never become floats.
    if not (low <= value and (isinstance(value, int) or math.isfinite(value))):
        raise InvalidParameter(f"`{name}` must be a finite number of at least {low}, got {value!r}", param=name)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidParameter(f"`{name}` must be from {low} to {high}, got {value!r}", param=name)


def _at_most_many(name: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise InvalidParameter(f"`{name}` must hold at most {most} {what}, got {count}", param=name)


def _in_vocabulary(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidParameter(
            f"`{name}` holds token ids of the vocabulary, from 0 to {vocab_size - 1}, got {token_id}", param=name
        )
