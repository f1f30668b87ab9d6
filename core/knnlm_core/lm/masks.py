"""Attention masks for ragged batches over a slot cache.

transformers takes a prepared 4-D mask as it is. A plain causal one would silently widen a sliding window (logits off by
0.4 to 0.7 on Mistral, Gemma 2, Phi-3, …), so every kind of layer gets the mask that its configuration asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from knnlm_core.errors import UnsupportedModel
from knnlm_core.lm.attention import SDPA, SHARED_HEADS

FULL, SLIDING = "full_attention", "sliding_attention"


class MaskBuilder:
    """Builds what `attention_mask` must be for one model: a tensor, or a mapping from layer type to tensor."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := kinds - {FULL, SLIDING}:
            raise UnsupportedModel(
                f"model_type {config.model_type!r}: attention of kind {sorted(unknown)} is not supported"
            )
        window = getattr(config, "sliding_window", None)
        if not kinds:
            uses_window = window is not None and getattr(config, "use_sliding_window", True)
            kinds = {SLIDING if uses_window else FULL}
        self._kinds = sorted(kinds)
        self._window: int | None = window
        # Eager attention adds the mask to the scores; `sdpa` would turn booleans into such a mask in every layer.
        self._additive = dtype if config._attn_implementation in ("eager", SDPA, SHARED_HEADS) else None

    def __call__(self, lengths: Tensor, num_new: int, kv_length: int) -> Tensor | dict[str, Tensor]:
        """Masks for rows that hold ``lengths`` (B,) tokens and append ``num_new`` each.

        Returns: (B, 1, T, kv_length), zero where a query may look and the lowest number elsewhere, for other kinds of
            attention True where it may look; or one such tensor per layer type.
        """
        query = (lengths[:, None] + torch.arange(num_new, device=lengths.device))[:, None, :, None]  # (B, 1, T, 1)
        key = torch.arange(kv_length, device=lengths.device)
        causal = key <= query
        masks = {
            kind: self._form(causal & (key > query - self._window) if kind == SLIDING and self._window else causal)
            for kind in self._kinds
        }
        return masks if len(masks) > 1 else masks[self._kinds[0]]

    def _form(self, mask: Tensor) -> Tensor:
        if self._additive is None:
            return mask
        zero = torch.zeros((), dtype=self._additive, device=mask.device)
        return torch.where(mask, zero, torch.finfo(self._additive).min)
