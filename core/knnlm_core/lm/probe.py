"""Checks made once at load: the adapter's answers are the model's own, or the model is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from knnlm_core.errors import UnsupportedModel
from knnlm_core.lm.protocol import CausalLM, Rows, Span

_LENGTH = 24
# Allowed difference relative to the spread of the logits, by numerics; int8 computes its steps in bfloat16.
_TOLERANCE = {"float32": 1e-4, "float64": 1e-6, "bfloat16": 6e-2, "float16": 1e-2, "int8": 6e-2}


@torch.inference_mode()
def check_adapter(lm: CausalLM, model: Any) -> tuple[int, int]:
    """Compare head, window path and slot path with ``model(ids).logits``.

    Returns: key dimension and vocabulary size.
    Raises: UnsupportedModel: naming the check that fails and by how much.
    """
    device = next(model.parameters()).device
    ids = _walk(model.get_input_embeddings().num_embeddings, min(_LENGTH, lm.max_length))
    expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()

    rows = lm.encode([ids], [0])
    tolerance = _TOLERANCE[lm.numerics]
    _compare("output head", lm.logits(rows.hidden), expected, model, tolerance)
    if not torch.isfinite(rows.keys).all():
        raise UnsupportedModel(f"model_type {model.config.model_type!r}: the key tap gives non-finite keys")
    if lm.num_sequences:
        # In ragged pieces: prefill, a second chunk, single tokens.
        sequence = lm.allocate()
        cuts = sorted({min(cut, len(ids)) for cut in (0, 9, 17, 18, 19, _LENGTH)})
        pieces = [lm.forward([Span(sequence, ids[a:b], rows=b - a)]) for a, b in pairwise(cuts)]
        lm.free(sequence)
        _compare("slot cache", lm.logits(torch.cat([p.hidden for p in pieces])), expected, model, tolerance)
        _compare("key tap", torch.cat([p.keys for p in pieces]), rows.keys, model, tolerance)
    return rows.keys.shape[1], expected.shape[1]


@torch.inference_mode()
def rows_of_step(lm: CausalLM, rows: int, tokens: int) -> Rows:
    """The rows of one step: some sequences of different lengths, with so many new tokens each."""
    held = [min(_LENGTH + row, lm.max_length - tokens) for row in range(rows)]
    ids = _walk(lm.identity.vocab_size, max(held) + tokens)
    sequences = [lm.allocate() for _ in held]
    for sequence, length in zip(sequences, held, strict=True):
        if length:
            lm.forward([Span(sequence, ids[:length])])
    step = [Span(s, ids[n : n + tokens], tokens) for s, n in zip(sequences, held, strict=True)]
    made = lm.forward(step)
    for sequence in sequences:
        lm.free(sequence)
    return made


@torch.inference_mode()
def check_step(lm: CausalLM, model: Any, what: str, have: Rows, need: Rows) -> None:
    """Compare rows of one step that were made in two ways. Raises UnsupportedModel: they differ too much."""
    tolerance = _TOLERANCE[lm.numerics]
    _compare(what, lm.logits(have.hidden), lm.logits(need.hidden), model, tolerance)
    _compare(f"the key of {what}", have.keys, need.keys, model, tolerance)


def _walk(vocab: int, length: int) -> list[int]:
    """A fixed walk through the vocabulary: no two tokens alike, the same on every machine."""
    return [(7919 * (i + 1)) % min(vocab, 50_000) for i in range(length)]


def _compare(what: str, have: Tensor, need: Tensor, model: Any, tolerance: float) -> None:
    error = (have - need).abs().max().item()
    limit = tolerance * max(1.0, need.std().item() * 4)
    if not error <= limit:
        raise UnsupportedModel(
            f"model_type {model.config.model_type!r}: {what} differs from the model's own forward pass by {error:.3g}, "
            f"at most {limit:.3g} is allowed"
        )
