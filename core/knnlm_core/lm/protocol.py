"""The seam between knnlm and a language model runtime.

A runtime owns its sequences (their KV cache is its own business) and answers, for the rows it is asked for, with the
datastore key and the hidden state of that row; the output head is applied separately, to chosen rows, in chunks.
A runtime that cannot keep the two apart (llama.cpp) gives the logits for the hidden state, and its head does nothing.
Nothing here knows of datastores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from knnlm_core.types import LMIdentity

if TYPE_CHECKING:
    from knnlm_core.lm.prefix_cache import PrefixCacheUse
    from knnlm_core.lm.tokenizer import Tokenizer

SequenceId = int


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence, to be appended at its end.

    Attributes:
        sequence: as returned by `CausalLM.allocate` or `CausalLM.copy`.
        tokens: the new token ids, at least one.
        rows: how many of the *last* new tokens to return rows for; 0 for a prefill chunk that nobody looks at.
    """

    sequence: SequenceId
    tokens: Sequence[int]
    rows: int = 1


class Rows(NamedTuple):
    """Rows of a forward pass, in the order in which they were asked for."""

    keys: Tensor  # (R, D) float32, the datastore keys
    hidden: Tensor  # (R, H) what `CausalLM.logits` takes: the head's input, or the logits themselves if H = V


class CausalLM(Protocol):
    """A causal language model that serves many sequences at once.

    Not thread-safe: one thread at a time may call it.
    """

    @property
    def identity(self) -> LMIdentity:
        """Which LM this is; what datastores are checked against."""
        ...

    @property
    def numerics(self) -> str:
        """How the LM computes, such as ``float32`` or ``int8``; what calibrations are checked against."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens that one sequence may hold, prompt and completion together."""
        ...

    @property
    def num_free_sequences(self) -> int:
        """How many more sequences can be allocated now."""
        ...

    @property
    def num_sequences(self) -> int:
        """How many sequences can be held at once."""
        ...

    def allocate(self) -> SequenceId:
        """Start an empty sequence. Raises Overloaded when none is free."""
        ...

    def forward(self, batch: Sequence[Span]) -> Rows:
        """Append each span to its sequence and return the rows asked for, span after span.

        Raises: PromptTooLong: a sequence would exceed `max_length`; then nothing was appended.
        """
        ...

    def length(self, sequence: SequenceId) -> int:
        """Tokens that the sequence holds."""
        ...

    def rewind(self, sequence: SequenceId, length: int) -> None:
        """Forget the sequence's tokens from position ``length`` on."""
        ...

    def copy(self, sequence: SequenceId) -> SequenceId:
        """Fork a sequence: the copy holds the same tokens. Raises Overloaded when none is free."""
        ...

    def free(self, sequence: SequenceId) -> None:
        """Give the sequence back; its id may be reused."""
        ...

    def reuse_prefix(self, sequence: SequenceId, tokens: Sequence[int]) -> int:
        """Begin an empty sequence with as many of ``tokens`` as are remembered; returns how many it then holds.

        The result of later passes does not depend on it beyond rounding.
        """
        ...

    def keep_prefix(self, sequence: SequenceId, tokens: Sequence[int]) -> None:
        """Remember the beginning of a sequence for `reuse_prefix`; ``tokens`` are those that it holds, or more."""
        ...

    def encode(self, windows: Sequence[Sequence[int]], first_rows: Sequence[int]) -> Rows:
        """Run whole windows without a cache: the path of building and scoring.

        Args:
            windows: token ids, each at most `max_length` long.
            first_rows: per window, the first position whose row is wanted; all later ones follow.
        Returns: Σ (len(window) − first_row) rows, window after window.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the model's own output head: (R, H) → (R, V) float32.

        The caller bounds R; `log_probs_of_targets` does so for many rows. The result may be ``hidden`` itself.
        """
        ...

    def close(self) -> None:
        """Remove the key tap and release the KV cache."""
        ...


class TextLM(CausalLM, Protocol):
    """A causal LM with the tokenizer that it came with, as `load_lm` returns it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into its tokens."""
        ...

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes reserved for the KV cache."""
        ...

    @property
    def prefix_cache_use(self) -> PrefixCacheUse:
        """How much is kept of prompts' beginnings and has been spared."""
        ...
