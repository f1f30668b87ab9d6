"""A KV cache of preallocated slots, one per sequence, behind transformers' `Cache` interface.

Each layer holds (slots, heads, capacity + 1, head size). A forward pass over B rows writes every new token at its own
position of its row's slot and attends over the slots' first `kv_length` positions:

    slot 0   [k k k k k k W . . . . | s]      W  written by this pass, at position length(sequence)
    slot 1   [k k k W . . . . . . . | s]      .  free, masked
    slot 2   [idle                  | s]      s  scratch: where padding and idle rows write

Rewinding a sequence is moving its length back: what lies behind it is masked and will be overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


def reserve(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of which, on a CPU, only the pages that are written to ever take memory; torch.zeros writes to all."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(*shape)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Where the rows of the pass under way live.

    Attributes:
        slots: a slice of neighbouring slots (no copy) or a tensor of slot ids (a gathered copy).
        places: KV heads → where each new token of each head is written, as rows of the layer's (rows, head size):
            (B · heads · T,) int64. The same for every layer with as many heads.
        kv_length: how many positions attention looks at.
    """

    slots: slice | Tensor
    places: Mapping[int, Tensor]
    kv_length: int


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's slots; transformers calls `update` from inside its attention module."""

    is_sliding = False

    def __init__(self, cache: SlotCache, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        heads, size = shape
        self._cache = cache
        full = (cache.num_slots, heads, cache.capacity + 1, size)
        self.keys = reserve(full, dtype, device)
        self.values = reserve(full, dtype, device)
        self._rows = self.keys.view(-1, size), self.values.view(-1, size)
        self._heads, self._size = heads, size
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("slots are allocated at construction")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plan = self._cache.plan
        assert plan is not None, "forward without a write plan. This is a bug."
        # Whole rows of one flat tensor: indexing slots and positions at once takes twice as long.
        places = plan.places[self._heads]
        for rows, states in zip(self._rows, (key_states, value_states), strict=True):
            rows.index_copy_(0, places, states.reshape(-1, self._size))
        return self.keys[plan.slots, :, : plan.kv_length], self.values[plan.slots, :, : plan.kv_length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        plan = self._cache.plan
        assert plan is not None
        return plan.kv_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always passed explicitly

    def get_max_length(self) -> int:
        return self._cache.capacity


class SlotCache(Cache):  # type: ignore[misc]
    """Slots for `num_slots` sequences of up to `capacity` tokens.

    Args:
        layer_shapes: per layer (KV heads, head size).
    """

    def __init__(
        self,
        layer_shapes: Sequence[tuple[int, int]],
        *,
        num_slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self.plan: WritePlan | None = None
        self._head_counts = {heads for heads, _ in layer_shapes}
        super().__init__(layers=[_SlotLayer(self, shape, dtype, device) for shape in layer_shapes])

    @property
    def num_bytes(self) -> int:
        """Bytes reserved for keys and values of all layers."""
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in all layers."""
        return self.num_bytes // (self.num_slots * (self.capacity + 1))

    def plan_rows(self, slot_ids: Sequence[int], lengths: Sequence[int], num_new: Sequence[int]) -> WritePlan:
        """Plan a pass that appends ``num_new[i]`` tokens to slot ``slot_ids[i]``, which holds ``lengths[i]``.

        Rows shorter than the widest are padded: their padding writes to the scratch position.
        """
        device = self.layers[0].keys.device
        width = max(num_new)
        starts = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
        offsets = torch.arange(width, device=device)[None]  # (1, T)
        counts = torch.tensor(num_new, device=device)[:, None]
        positions = torch.where(offsets < counts, starts + offsets, self.capacity)
        ids = torch.tensor(slot_ids, device=device)
        # Slots, their heads and their positions lie in this order: see `_SlotLayer`.
        places = {
            heads: (
                (ids[:, None, None] * heads + torch.arange(heads, device=device)[:, None]) * (self.capacity + 1)
                + positions[:, None]
            ).flatten()
            for heads in self._head_counts
        }
        first, last = min(slot_ids), max(slot_ids)
        in_order = list(slot_ids) == list(range(first, last + 1))
        return WritePlan(
            slots=slice(first, last + 1) if in_order else ids,
            places=places,
            kv_length=max(length + new for length, new in zip(lengths, num_new, strict=True)),
        )

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another, in every layer."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
