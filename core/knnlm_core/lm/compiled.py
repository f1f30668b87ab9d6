"""Steps of a few fixed shapes, compiled by torch's Inductor for CPUs, Python and small operations between them gone.

For each shape the model's own forward is exported once and compiled to C++. Such a step reads and writes the slot cache
where it lies; all else that changes from step to step is a small tensor:

    ids, positions, places, slots, ends, masks ─┐
                                                ├─ compiled step ── key activations, hidden states
                 slot cache, written in place ──┘

Attention is one call per layer into torch's kernel, `knnlm::attend`, over the positions that are in use: the graph does
not know how many there are, so a shape is compiled once for all slots and lengths. Nothing is ever compiled later: a
pass of any other shape runs as it always does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm.attention import OTHER_KINDS, SHARED_HEADS
from knnlm_core.lm.inductor import compile_graph, require_compiler
from knnlm_core.lm.key_tap import KeyTap
from knnlm_core.lm.masks import MaskBuilder
from knnlm_core.lm.slot_cache import SlotCache

logger = logging.getLogger(__name__)

MAX_SIDE = 64  # sequences, or new tokens of each, in a compiled step
_IN_SLOTS = "knnlm_slots"  # transformers' name for `_attention_in_slots`, while a step is exported
_PLAN: ContextVar[tuple[Tensor, Tensor]] = ContextVar("_PLAN")  # slots and ends of the step that is being exported


class StepShape(NamedTuple):
    """Sequences, and new tokens of each."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"


def parse_shapes(given: Sequence[str]) -> tuple[StepShape, ...]:
    """Shapes from words such as ``1x4``. Raises InvalidParameter: one is none, or too large."""
    shapes = []
    for word in given:
        rows, _, tokens = word.partition("x")
        if not (rows.isdecimal() and tokens.isdecimal() and 0 < int(rows) <= MAX_SIDE and 0 < int(tokens) <= MAX_SIDE):
            raise InvalidParameter(
                "`compile_steps` must be shapes SEQUENCESxTOKENS such as 1x1, of 1 … "
                f"{MAX_SIDE} sequences with 1 … {MAX_SIDE} new tokens each; got {word!r}",
                param="compile_steps",
            )
        shapes.append(StepShape(int(rows), int(tokens)))
    return tuple(dict.fromkeys(shapes))


@dataclass(frozen=True, slots=True)
class StepParts:
    """What steps are made of: a model on a CPU, and what its adapter has for it."""

    model: Any
    tap: KeyTap
    masks: MaskBuilder
    cache: SlotCache


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """Which steps to compile, and where.

    Attributes:
        shapes: compiled one after the other.
        folder: keeps what was compiled, for the next start; code is loaded from it.
        report: is told what is waited for before each shape; what it raises ends the compiling.
    """

    shapes: tuple[StepShape, ...]
    folder: Path
    report: Callable[[str], None] = lambda what: None


class CompiledSteps:
    """The compiled steps of one model.

    Raises:
        InvalidParameter: a shape beyond the cache's, or a folder that others can write to.
        ModelLoadError: there is no C++ compiler, or it fails.
        UnsupportedModel: attention that does not run by torch's kernel for CPUs, or a forward that cannot be exported.
    """

    def __init__(self, parts: StepParts, options: CompileOptions) -> None:
        implementation = parts.model.config._attn_implementation
        if implementation != SHARED_HEADS:
            raise UnsupportedModel(
                f"model_type {parts.model.config.model_type!r}: its attention is {implementation!r}, and steps are "
                "compiled for torch's own kernel only; leave out --compile-steps"
            )
        for shape in options.shapes:
            if shape.rows > parts.cache.num_slots or shape.tokens > parts.cache.capacity:
                raise InvalidParameter(
                    f"`compile_steps` must be of at most {parts.cache.num_slots} sequences, as many as are generated "
                    f"at once, with {parts.cache.capacity} tokens each; got {shape}",
                    param="compile_steps",
                )
        require_compiler(options.folder)
        self._steps: dict[StepShape, _CompiledStep] = {}
        for number, shape in enumerate(options.shapes, 1):
            options.report(f"the step {shape} to compile ({number} of {len(options.shapes)})")
            logger.info("compiling step=%s number=%d of=%d", shape, number, len(options.shapes))
            started = time.perf_counter()
            self._steps[shape] = _CompiledStep(parts, shape, options.folder)
            logger.info("compiled step=%s seconds=%.1f", shape, time.perf_counter() - started)

    def run(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Append tokens to slots that hold ``lengths`` of them, if a compiled step is wide enough.

        Args:    slots: in ascending order.
        Returns: key activations (B, T, D) and hidden states (B, T, H), padded on the right; None where the slots are
            no neighbours or no shape of as many rows is as wide: nothing was done.
        """
        width = max(map(len, tokens))
        shape = min((s for s in self._steps if s.rows == len(slots) and s.tokens >= width), default=None)
        if shape is None or slots[-1] - slots[0] != len(slots) - 1:
            return None
        return self._steps[shape](slots, tokens, lengths)


class _CompiledStep:
    """One shape: its compiled function and the tensors that are given to it each time."""

    def __init__(self, parts: StepParts, shape: StepShape, folder: Path) -> None:
        self._shape = shape
        self._build_masks = parts.masks
        self._capacity = parts.cache.capacity
        layers = parts.cache.layers
        self._kv_cache = [layer.keys for layer in layers] + [layer.values for layer in layers]
        size = (shape.rows, 1, shape.tokens, self._capacity + 1)
        some = parts.masks(torch.zeros(shape.rows, dtype=torch.long), shape.tokens, 1)
        kinds = some if isinstance(some, dict) else {"": some}
        # As wide as a slot: attention looks at as much of them as is in use.
        self._masks = {kind: torch.zeros(size, dtype=mask.dtype) for kind, mask in kinds.items()}
        tensors = self._place([0] * shape.rows, [[0] * shape.tokens] * shape.rows, [0] * shape.rows)
        step = _Step(parts, tuple(self._masks))
        inputs = (*tensors, *self._masks.values(), *self._kv_cache)
        before = parts.model.config._attn_implementation
        AttentionInterface.register(_IN_SLOTS, _attention_in_slots)
        AttentionMaskInterface.register(_IN_SLOTS, sdpa_mask)
        _operators()
        parts.model.set_attn_implementation(_IN_SLOTS)
        try:
            self._run = compile_graph(step, inputs, folder)
        finally:
            parts.model.set_attn_implementation(before)

    def __call__(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        inputs = self._place(slots, tokens, lengths)
        in_use = max(length + len(row) for length, row in zip(lengths, tokens, strict=True))
        masks = self._build_masks(torch.tensor(lengths), self._shape.tokens, in_use)
        for kind, mask in self._masks.items():
            mask[..., :in_use] = masks[kind] if isinstance(masks, dict) else masks
        keys, hidden = self._run(*inputs, *self._masks.values(), *self._kv_cache)
        return keys, hidden

    def _place(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Ids (B, T), positions (B, T), places in the slots (B, T), slots (B,) and their ends (B,)."""
        offsets = range(self._shape.tokens)
        last, scratch = self._capacity - 1, self._capacity
        rows = list(zip(tokens, lengths, strict=True))
        return (
            torch.tensor([[row[t] if t < len(row) else 0 for t in offsets] for row, _ in rows]),
            torch.tensor([[min(length + t, last) for t in offsets] for _, length in rows]),
            torch.tensor([[length + t if t < len(row) else scratch for t in offsets] for row, length in rows]),
            torch.tensor(slots),
            torch.tensor([length + len(row) for row, length in rows]),
        )


class _Step(nn.Module):
    """The forward pass that is exported: of tensors alone."""

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


def _attention_in_slots(
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
