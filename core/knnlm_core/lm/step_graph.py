"""One step of a model as a function of tensors alone, to be exported: what a compiled step computes.

Attention is one call per layer into torch's kernel, `knnlm::attend`, over the positions that are in use. The graph does
not know how many there are: it has whole slots, and masks as wide as those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from knnlm_core.errors import UnsupportedModel
from knnlm_core.lm.attention import OTHER_KINDS
from knnlm_core.lm.key_tap import KeyTap
from knnlm_core.lm.masks import MaskBuilder
from knnlm_core.lm.slot_cache import SlotCache

_IN_SLOTS = "knnlm_slots"  # transformers' name for `_attend_in_slots`
_PLAN: ContextVar[tuple[Tensor, Tensor]] = ContextVar("_PLAN")  # slots and ends of the step that is being exported


@dataclass(frozen=True, slots=True)
class StepParts:
    """What steps are made of: a model on a CPU, and what its adapter has for it."""

    model: Any
    tap: KeyTap
    masks: MaskBuilder
    cache: SlotCache


class StepGraph(nn.Module):
    """The forward pass, for masks of these kinds; it runs inside `attention_in_slots` only."""

    def __init__(self, parts: StepParts, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.body = parts.model.base_model
        self._tap = parts.tap
        self._kinds = kinds

    def forward(
        self, ids: Tensor, positions: Tensor, places: Tensor, slots: Tensor, ends: Tensor, *more: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys (B, T, D), hidden states (B, T, H); ``more``: each kind's mask, each layer's keys, then their values."""
        masks, kv_cache = more[: len(self._kinds)], more[len(self._kinds) :]
        pairs = zip(kv_cache[: len(kv_cache) // 2], kv_cache[len(kv_cache) // 2 :], strict=True)
        plan = _PLAN.set((slots, ends))
        try:
            with self._tap.reading() as seen:
                hidden = self.body(
                    input_ids=ids,
                    attention_mask=dict(zip(self._kinds, masks, strict=True)) if len(masks) > 1 else masks[0],
                    position_ids=positions,
                    past_key_values=Cache(layers=[_InSlots(k, v, slots, places) for k, v in pairs]),
                    use_cache=True,
                ).last_hidden_state
        finally:
            _PLAN.reset(plan)
        return self._tap.key(seen, hidden), hidden


@contextmanager
def attention_in_slots(model: Any) -> Iterator[None]:
    """Let a model attend as a `StepGraph` needs it; then as before."""
    before = model.config._attn_implementation
    AttentionInterface.register(_IN_SLOTS, _attend_in_slots)
    AttentionMaskInterface.register(_IN_SLOTS, sdpa_mask)
    _operators()
    model.set_attn_implementation(_IN_SLOTS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _InSlots(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the slot cache during export: tokens are written at their places, attention gets all slots."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, places: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        heads = torch.arange(keys.shape[1])
        self._index = slots[:, None, None], heads[None, :, None], places[:, None]  # broadcast to (B, heads, T)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("slots are allocated at construction")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self._index] = key_states
        self.values[self._index] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0  # positions are always passed explicitly

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _attend_in_slots(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, with all slots for ``key`` and ``value``."""
    if dropout or (others := [name for name in OTHER_KINDS if kwargs.get(name) is not None]):
        raise UnsupportedModel(
            f"steps of this model cannot be compiled: its attention has {'dropout' if dropout else others[0]}; leave "
            "out --compile-steps"
        )
    slots, ends = _PLAN.get()
    return torch.ops.knnlm.attend(query, key, value, attention_mask, slots, ends, scaling), None


@cache
def _operators() -> torch.library.Library:
    """`knnlm::attend`, known to torch from the first call on for as long as the result lives."""
    library = torch.library.Library("knnlm", "FRAGMENT")
    library.define(
        "attend(Tensor query, Tensor keys, Tensor values, Tensor mask, Tensor slots, Tensor ends, float? scale)"
        " -> Tensor"
    )
    library.impl("attend", _attend, "CPU")
    torch.library.register_fake("knnlm::attend", _shape_of_attend, lib=library)
    return library


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, slots: Tensor, ends: Tensor, scale: float | None
) -> Tensor:
    """Attention of a step's new tokens over the positions in use.

    Args:
        query: (B, heads, T, size).
        keys, values: (slots, KV heads, capacity + 1, size).
        mask: (B, 1, T, capacity + 1).
        slots, ends: (B,), neighbours; how many positions each has in use.
    Returns: (B, T, heads, size).
    """
    first, in_use = int(slots[0]), max(ends.tolist())
    rows, heads, width, size = query.shape
    keys = keys[first : first + rows, :, :in_use]
    values = values[first : first + rows, :, :in_use]
    shared = heads // keys.shape[1]
    if width == 1 and shared > 1:  # heads that share a KV head are like tokens that see the same
        query = query.reshape(rows, keys.shape[1], shared, size)
    attended = nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask[..., :in_use], scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )
    return attended.reshape(rows, heads, width, size).transpose(1, 2).contiguous()


def _shape_of_attend(query: Tensor, *others: Any) -> Tensor:
    rows, heads, width, size = query.shape
    return query.new_empty((rows, width, heads, size))
