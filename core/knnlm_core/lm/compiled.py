"""Steps of a few fixed shapes, compiled by torch's Inductor for CPUs, Python and small operations between them gone.

For each shape the model's own forward is exported once and compiled to C++. Such a step reads and writes the slot cache
where it lies; all else that changes from step to step is a small tensor:

    ids, positions, places, slots, ends, masks ─┐
                                                ├─ compiled step ── key activations, hidden states
                 slot cache, written in place ──┘

A shape is compiled once for all slots and lengths, see `step_graph.py`. Nothing is ever compiled later: a pass of any
other shape runs as it always does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm.attention import SHARED_HEADS
from knnlm_core.lm.inductor import compile_graph, require_compiler
from knnlm_core.lm.step_graph import StepGraph, StepParts, attention_in_slots

logger = logging.getLogger(__name__)

MAX_SIDE = 64  # sequences, or new tokens of each, in a compiled step


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
        inputs = (*tensors, *self._masks.values(), *self._kv_cache)
        with attention_in_slots(parts.model):
            self._run = compile_graph(StepGraph(parts, tuple(self._masks)), inputs, folder)

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
