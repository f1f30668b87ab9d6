"""Checks made at each load: llama.cpp reads the file as transformers does, or the model is refused."""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from knnlm_core.errors import UnsupportedModel
from knnlm_core.lm.gguf_identity import GgufReading, probe_ids
from knnlm_core.lm.llamacpp_context import LlamaModel
from knnlm_core.lm.protocol import CausalLM, Rows, Span
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import LMIdentity

logger = logging.getLogger(__name__)

# Of the keys' own variance, and of the logits' over the vocabulary: quantised arithmetic moves keys by some thousandths
# of it and logits by some hundredths, another tensor by more than all.
_LIMIT = 0.2


def check_vocabulary(path: Path, model: LlamaModel, identity: LMIdentity, tokenizer: Tokenizer) -> None:
    """Both libraries must agree on what a token id is. Raises UnsupportedModel."""
    if model.vocab_size != identity.vocab_size:
        raise UnsupportedModel(
            f"{path}: llama.cpp has {model.vocab_size} token ids, transformers {identity.vocab_size}"
        )
    if model.eos_token_id >= 0 and model.eos_token_id not in tokenizer.eos_token_ids:
        raise UnsupportedModel(
            f"{path}: texts end with token {model.eos_token_id} in llama.cpp and with "
            f"{', '.join(map(str, tokenizer.eos_token_ids)) or 'none'} in transformers"
        )


def check_probe(lm: CausalLM, path: Path, reading: GgufReading, key_tap: str) -> None:
    """Keys and logits must be what transformers found, but for rounding: of a window, and through a sequence.

    Raises: UnsupportedModel: a mean squared difference is more than _LIMIT of the variance, or not a number.
    """
    ids = probe_ids(lm.identity.vocab_size, reading.facts.context_length)[: lm.max_length]
    passes = [lm.encode([ids], [0])]
    if lm.num_sequences:
        # In ragged pieces: prefill, a second chunk, single tokens.
        sequence = lm.allocate()
        cuts = sorted({min(cut, len(ids)) for cut in (0, 9, 17, 18, 19, len(ids))})
        pieces = [lm.forward([Span(sequence, ids[a:b], rows=b - a)]) for a, b in pairwise(cuts)]
        lm.free(sequence)
        passes.append(Rows(*(torch.cat(column) for column in zip(*pieces, strict=True))))
    keys, logits = reading.probe[key_tap][: len(ids)], reading.logits[: len(ids)]
    errors = {
        "keys": max(_difference(rows.keys, keys, dim=0) for rows in passes),
        "logits": max(_difference(lm.logits(rows.hidden[: len(logits)]), logits, dim=1) for rows in passes),
    }
    for what, error in errors.items():
        if not error <= _LIMIT:
            raise UnsupportedModel(
                f"{path}: llama.cpp's {what} differ from transformers' by {error:.3g} of their variance, "
                f"at most {_LIMIT} is allowed; use --runtime huggingface"
            )
    logger.info(
        "llama.cpp verified model=%s of their variance %s",
        path.name, " ".join(f"{what}={error:.2g}" for what, error in errors.items()),
    )  # fmt: skip


def _difference(have: Tensor, need: Tensor, dim: int) -> float:
    """Mean squared distance of rows, in units of their variance: of keys over time, of logits over tokens."""
    variance = need.var(dim=dim, correction=0).mean().item()
    error = (have - need).square().mean().item() / variance
    return error if math.isfinite(error) else math.inf
