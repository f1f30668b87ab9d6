"""The output head, applied to chosen rows by the model's own arithmetic.

Families differ after the matrix product (Gemma 2 caps logits, Granite and Cohere scale them), so the head is not
``lm_head`` alone: it is the model's own `forward` with the body swapped for a pass-through. The swap happens in a
shallow twin that shares every parameter; the model itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from knnlm_core.lm.protocol import CausalLM
from knnlm_core.signals import LMSignals, join_signals, normalized_signals

LOGIT_ELEMENTS_PER_CHUNK = 1 << 24  # 64 MiB of float32 logits at a time


class _PassThrough(nn.Module):
    """Stands where the body was and returns what it is given as the last hidden state."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _PassThrough:
        """OPT and its kin call ``model.decoder(…)``."""
        return self


class OutputHead:
    """Callable (R, H) → (R, V) float32 logits."""

    def __init__(self, model: Any) -> None:
        twin = copy.copy(model)
        twin._modules = {**model._modules, model.base_model_prefix: _PassThrough()}
        self._twin = twin

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._twin(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()


@torch.inference_mode()
def log_probs_of_targets(lm: CausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p_lm of one target per row, without ever holding all rows' logits.

    Args:
        hidden: (R, H) rows of `CausalLM.encode` or `forward`.
        targets: (R,) int64 token ids.
    Returns: (R,) float32, natural log.
    """
    parts = [
        logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(dim=1)
        for rows, logits in _logits_in_chunks(lm, hidden)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


@torch.inference_mode()
def targets_and_signals(lm: CausalLM, hidden: Tensor, targets: Tensor) -> tuple[Tensor, LMSignals]:
    """`log_probs_of_targets`, and the signals of the same R ≥ 1 predictions."""
    chosen, signals = [], []
    for rows, logits in _logits_in_chunks(lm, hidden):
        known = normalized_signals(logits)
        chosen.append(logits.gather(1, targets[rows, None])[:, 0] - known.normalizer)
        signals.append(known.signals)
    return torch.cat(chosen), join_signals(signals)


def _logits_in_chunks(lm: CausalLM, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, LOGIT_ELEMENTS_PER_CHUNK // lm.identity.vocab_size)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        yield rows, lm.logits(hidden[rows])
