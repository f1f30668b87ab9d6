"""Checks made at each load: llama.cpp reads the file as transformers does, or the model is refused."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import torch

from knnlm_core.errors import UnsupportedModel
from knnlm_core.lm.gguf_identity import GgufReading, probe_ids
from knnlm_core.lm.llamacpp_context import LlamaModel
from knnlm_core.lm.protocol import CausalLM, Span
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import LMIdentity

logger = logging.getLogger(__name__)

# Of the keys' own variance: quantised arithmetic moves keys by some thousandths of it, another tensor by more than all.
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


def check_keys(lm: CausalLM, path: Path, reading: GgufReading, key_tap: str) -> None:
    """Keys must be what transformers found at the same place, but for rounding: of a window, and through a sequence.

    Raises: UnsupportedModel: the mean squared distance is more than _LIMIT of the keys' variance.
    """
    ids = probe_ids(lm.identity.vocab_size, reading.facts.context_length)[: lm.max_length]
    needed = reading.probe[key_tap][: len(ids)]
    rows = lm.encode([ids], [0])
    passes = [rows.keys]
    if lm.num_sequences:
        # In ragged pieces: prefill, a second chunk, single tokens.
        sequence = lm.allocate()
        cuts = sorted({min(cut, len(ids)) for cut in (0, 9, 17, 18, 19, len(ids))})
        pieces = [lm.forward([Span(sequence, ids[a:b], rows=b - a)]) for a, b in pairwise(cuts)]
        lm.free(sequence)
        passes.append(torch.cat([piece.keys for piece in pieces]))
    variance = needed.var(dim=0, correction=0).sum().item()
    errors = [(keys - needed).square().sum(dim=1).mean().item() / variance for keys in passes]
    for error in errors:
        if not (error <= _LIMIT and bool(torch.isfinite(lm.logits(rows.hidden)).all())):
            raise UnsupportedModel(
                f"{path}: llama.cpp's keys differ from transformers' by {error:.3g} of their variance, "
                f"at most {_LIMIT} is allowed; use --runtime huggingface"
            )
    logger.info("llama.cpp keys verified model=%s difference=%.2g of their variance", path.name, max(errors))
