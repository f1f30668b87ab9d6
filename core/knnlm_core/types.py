"""Small result types that cross module borders.

Shapes: B rows (queries, tokens of a step), K neighbours, U distinct tokens, V vocabulary, D key dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Neighbors(NamedTuple):
    """What a search found, nearest first; a missing neighbour has id −1, value −1 and distance +inf."""

    entry_ids: Tensor  # (B, K) int64, global position of the entry in its datastore
    distances: Tensor  # (B, K) float32, squared L2
    values: Tensor  # (B, K) int64, the token that followed the entry's context


class SparseLogProbs(NamedTuple):
    """A distribution over few tokens; padding repeats a token of the row with log-probability −inf."""

    token_ids: Tensor  # (B, U) int64
    log_probs: Tensor  # (B, U) float32, natural log


class EntryRange(NamedTuple):
    """Entries ``first <= id < stop``; what `exclude` arguments are made of."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class LMIdentity:
    """Which language model made, or may use, a key.

    Two machines that load the same checkpoint get the same identity; a fine-tuned copy gets another.
    """

    model_fingerprint: str  # hex digest of weights and config
    tokenizer_fingerprint: str  # hex digest of vocabulary and behaviour
    model_name: str  # for people; not compared
    vocab_size: int  # columns of the logits
    key_tap: str  # which activation is the key
    key_dim: int  # D
