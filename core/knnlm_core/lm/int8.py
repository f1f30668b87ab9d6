"""Linear layers with int8 weights: a quarter of the bytes that a step has to read.

Each output row w of a weight matrix has one scale s, max |w| / 127 as a bfloat16, and is stored as the integers
round(w / s); all else stays float32. Two kernels of torch multiply with them:

- up to FEW_ROWS rows, as in steps: one that reads the integers as they are, which is what such a pass waits for. It
  takes activations in bfloat16 and gives its outputs so;
- more rows, and the output head, whose outputs should not be rounded: an integer product of twice the rows. Each row x
  of activations is cut into two planes of int8, which keep 15 bits,

      x = a · (high + low / 254)        a = max |x| / 127,  high = round(x / a),  low = round(254 · (x / a − high))

Activations of one plane would be no faster in a step, and lose more than the weights do (see
`benchmarks/decode_step.py`). A row's result does not depend on the other rows of its pass, but for the kernel.

Layers that read the same activations, such as those of queries, keys and values, are multiplied together: the first to
be called computes for all, the others take what is theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from knnlm_core.errors import UnsupportedModel

Weights = Literal["full", "int8"]
INT8: Weights = "int8"

FEW_ROWS = 16  # at as many the two kernels take the same time
_KERNEL_COLUMNS = (
    16  # the kernel for few rows reads so many at once, and beyond a row's end where they do not divide it
)
_STEPS = 127.0  # of the high plane, on either side of zero
_FINE_STEPS = 254.0  # of the low plane, in one step of the high one
_TINY = torch.finfo(torch.float32).tiny
_CHECKED_ROWS = 3
# Of a layer's largest output: outputs rounded to bfloat16 differ by up to 2e-3, rounded activations by some 1e-5.
_TOLERANCE_OF_FEW, _TOLERANCE = 1e-2, 1e-3
_SHOWN = 3


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of (N, K) to integers of −127 … 127 times one scale: (N, K) int8 and (N,) bfloat16."""
    weight = weight.float()
    scales = (weight.abs().amax(dim=1) / _STEPS).clamp_min(_TINY).bfloat16()
    rounded = (weight / scales[:, None].float()).round_().clamp_(-_STEPS, _STEPS)
    return rounded.to(torch.int8), scales


class Int8Weights:
    """The weights of linear layers that read the same activations, one below the other.

    Args:
        weights: (N_i, K) each, of any float dtype.
        biases: (N_i,) or None each.
        is_head: of the output head, for which few rows are nothing special.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, is_head: bool = False) -> None:
        self.sizes = [len(weight) for weight in weights]
        rounded, scales = quantize_rows(torch.cat(list(weights)))
        self._rounded = rounded if not is_head and rounded.shape[1] % _KERNEL_COLUMNS == 0 else None
        self._short_scales, self._scales = scales, scales.float()
        self._zeros = torch.zeros(len(rounded), dtype=torch.int32)
        # In the order in which the kernel for many rows reads them: opaque from here on.
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = zip(biases, weights, strict=True)
            self._bias = torch.cat([b.float() if b is not None else torch.zeros(len(w)) for b, w in parts])

    def product(self, rows: Tensor) -> Tensor:
        """(R, K) float32 activations → (R, N_0 + N_1 + …) float32 outputs."""
        if self._rounded is not None and len(rows) <= FEW_ROWS:
            output = torch._weight_int8pack_mm(rows.bfloat16(), self._rounded, self._short_scales).float()
        else:
            output = self._by_planes(rows)
        return output if self._bias is None else output.add_(self._bias)

    def _by_planes(self, rows: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp_min_(_TINY).div_(_STEPS)
        scaled = rows / scale
        high = scaled.round()
        low = scaled.sub_(high).mul_(_FINE_STEPS)
        planes = torch.cat((high, low)).round_().to(torch.int8)
        # The kernel has one scale for all rows of activations: it gets 1, and the rows theirs afterwards.
        coarse, fine = torch.ops.onednn.qlinear_pointwise(
            planes, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        ).split(len(rows))
        return torch.add(coarse, fine, alpha=1 / _FINE_STEPS).mul_(scale)


class _Siblings:
    """Computes for all layers of one `Int8Weights` when the first is called with new activations."""

    def __init__(self, weights: Int8Weights) -> None:
        self._weights = weights
        self._input: weakref.ref[Tensor] | None = None
        self._waiting: dict[int, Tensor] = {}  # by layer, until it asks

    def output(self, layer: int, hidden: Tensor) -> Tensor:
        """(…, K) → (…, N_layer)."""
        if self._input is None or self._input() is not hidden or layer not in self._waiting:
            product = self._weights.product(hidden.reshape(-1, hidden.shape[-1]))
            product = product.view(*hidden.shape[:-1], -1)
            if len(self._weights.sizes) == 1:
                return product
            self._waiting = dict(enumerate(product.split(self._weights.sizes, dim=-1)))
            self._input = weakref.ref(hidden)
        return self._waiting.pop(layer)


class Int8Linear(nn.Module):
    """One linear layer of several that share activations."""

    def __init__(self, siblings: _Siblings, layer: int) -> None:
        super().__init__()
        self._siblings = siblings
        self._layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return self._siblings.output(self._layer, hidden)


@torch.inference_mode()
def use_int8_weights(model: Any) -> None:
    """Replace every linear layer of a float32 model, output head included, by an `Int8Linear`; embeddings stay.

    Raises: UnsupportedModel: weights that are not in linear layers would stay, as those of most mixtures of experts, or
        the kernel is missing or wrong on this CPU.
    """
    family, head = model.config.model_type, model.get_output_embeddings()
    for names in _by_input(model):
        modules = [model.get_submodule(name) for name in names]
        # GPT-2 keeps its matrices the other way round.
        weights = [cast(Tensor, m.weight.T if isinstance(m, Conv1D) else m.weight) for m in modules]
        biases = [cast("Tensor | None", m.bias) for m in modules]
        siblings = _Siblings(_checked(weights, biases, is_head=head in modules))
        for layer, name in enumerate(names):
            model.set_submodule(name, Int8Linear(siblings, layer))
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    left = [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]
    if left:
        shown = ", ".join(left[:_SHOWN]) + (", …" if len(left) > _SHOWN else "")
        raise UnsupportedModel(f"model_type {family!r}: int8 is for linear layers, and these are none: {shown}")


def _by_input(model: nn.Module) -> list[list[str]]:
    """Names of the linear layers, those together that read the very same tensor in a short pass."""
    linears = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    inputs: dict[str, Tensor] = {}  # held, so that none takes the place of another

    def note(name: str) -> Any:
        return lambda module, args: inputs.setdefault(name, args[0])

    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    try:
        model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, list[str]] = {}
    for name in linears:
        groups.setdefault(id(inputs[name]) if name in inputs else -1 - len(groups), []).append(name)
    return list(groups.values())


def _checked(weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, is_head: bool) -> Int8Weights:
    """Weights whose products agree with those of the rounded weights in float32, by either kernel."""
    size = weights[0].shape[1]
    rows = torch.linspace(-1, 1, _CHECKED_ROWS * size).view(_CHECKED_ROWS, -1).bfloat16().float()
    parts = []
    for weight, bias in zip(weights, biases, strict=True):
        rounded, scales = quantize_rows(weight)
        parts.append(nn.functional.linear(rows, rounded * scales[:, None].float(), bias))
    need = torch.cat(parts, dim=1)
    try:
        made = Int8Weights(weights, biases, is_head=is_head)
        repeated = rows.repeat(FEW_ROWS, 1)
        have = {count: made.product(repeated[:count]) for count in (1, FEW_ROWS, len(repeated))}
    except (RuntimeError, AttributeError) as error:
        raise UnsupportedModel(f"torch has no int8 kernel for this CPU: {error}") from error
    for count, products in have.items():
        expected = need.repeat(FEW_ROWS, 1)[:count]
        error_share = ((products - expected).abs().max() / expected.abs().max().clamp_min(_TINY)).item()
        limit = _TOLERANCE_OF_FEW if count <= FEW_ROWS else _TOLERANCE
        if not error_share <= limit:
            raise UnsupportedModel(
                f"torch's int8 kernel is off by {error_share:.2g} of a layer's largest output on this CPU, at most "
                f"{limit:.2g} is allowed"
            )
    return made
