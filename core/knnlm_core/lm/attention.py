"""Attention of a few new tokens over many cached ones, without repeating the cache for every query head.

Where several query heads share a KV head, transformers copies keys and values once per query head as soon as there is a
mask and more than one new token: in every layer of every pass, and as long as the context. torch's kernel for CPUs
reads the shared head in place when asked to, and gives the same numbers. The function is handed to transformers through
its own registry of attention functions; no modelling code changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SDPA, SHARED_HEADS = "sdpa", "knnlm_shared_heads"
OTHER_KINDS = ("softcap", "position_bias", "cache")  # arguments that this function does not take


def use_shared_heads(model: Any) -> None:
    """Let a model on a CPU that runs `sdpa` and takes registered functions attend by `shared_heads_attention`."""
    if model.config._attn_implementation != SDPA or not getattr(model, "_supports_attention_backend", False):
        return
    if next(model.parameters()).device.type != "cpu":
        return  # the fused kernels of GPUs take no mask together with shared heads
    AttentionInterface.register(SHARED_HEADS, shared_heads_attention)
    AttentionMaskInterface.register(SHARED_HEADS, sdpa_mask)
    model.set_attn_implementation(SHARED_HEADS)


def shared_heads_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `sdpa_attention_forward` of transformers, which does all but the case described above.

    Args:    query: (B, heads, T, size); key, value: (B, KV heads, N, size); attention_mask: None or (B, 1, T, N).
    Returns: (B, T, heads, size), and nothing for the weights.
    """
    is_copied = query.shape[2] > 1 and query.shape[1] != key.shape[1] and attention_mask is not None
    if not is_copied or dropout or any(kwargs.get(name) is not None for name in OTHER_KINDS):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None
