"""int8 weights: the arithmetic against float64, the swapped modules, what stays the same and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm import int8
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.int8 import Int8Linear, Int8Weights, quantize_rows, use_int8_weights
from knnlm_core.lm.loading import LoadOptions, load_lm
from knnlm_core.lm.protocol import Span
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import FAMILIES, VOCAB, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.randint(1, VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded_slowly(weight: Tensor) -> Tensor:
    """The weights that int8 stands for, row by row in float64."""
    rows = []
    for row in weight.double():
        scale = float((row.abs().max() / 127).float().bfloat16()) or 1.0
        steps = [max(-127, min(127, round(float(w) / scale))) for w in row]
        rows.append(torch.tensor(steps, dtype=torch.float64) * scale)
    return torch.stack(rows)


@torch.inference_mode()
def rounded_model(model: Any) -> Any:
    """A float64 copy of a model whose linear layers have the weights that int8 stands for."""
    slow = copy.deepcopy(model).double()
    for original, module in zip(model.modules(), slow.modules(), strict=True):
        if type(module) in (nn.Linear, Conv1D):
            weight = original.weight.T if isinstance(module, Conv1D) else original.weight
            rounded = rounded_slowly(weight)
            module.weight = nn.Parameter(rounded.T if isinstance(module, Conv1D) else rounded, requires_grad=False)
    return slow


def lm_of(model: Any, **changes: Any) -> HuggingFaceLM:
    return HuggingFaceLM(model, Tokenizer(tiny_tokenizer()), name="tiny", max_sequences=3, weights="int8", **changes)


@pytest.mark.parametrize("rows", [1, 2, 7, 65])
@pytest.mark.parametrize(
    "columns", [pytest.param(48, id="both kernels"), pytest.param(40, id="columns that only one kernel takes")]
)
@pytest.mark.parametrize("is_head", [False, True])
def test_products_are_those_of_the_rounded_weights(rows: int, columns: int, is_head: bool) -> None:
    weights, bias = [matrix(48, columns), matrix(16, columns, seed=1)], matrix(16, seed=2)
    hidden = matrix(rows, columns, seed=3) * torch.logspace(-3, 3, columns)  # few activations far larger than others
    have = Int8Weights(weights, [None, bias], is_head=is_head).product(hidden).double()
    is_short = not is_head and columns == 48 and rows <= int8.FEW_ROWS  # all in bfloat16
    read = hidden.bfloat16() if is_short else hidden
    need = read.double() @ torch.cat([rounded_slowly(w) for w in weights]).T
    # Each activation is off by a 65,024th of the largest of its row at most, and each product of them by as much.
    bound = hidden.abs().amax(1, keepdim=True).double() / 65_024 * torch.cat(weights).abs().sum(1) * 1.02
    if is_short:
        bound = need.abs() / 256 + 1e-6 * bound * 65_024  # an output of 8 bits, sums in float32
    need[:, 48:] += bias
    assert ((have - need).abs() <= bound).all()


def test_rows_are_rounded_to_the_nearest_of_255_steps() -> None:
    weight = matrix(9, 33)
    rounded, scales = quantize_rows(weight)
    assert rounded.dtype == torch.int8
    torch.testing.assert_close(rounded.double() * scales.double()[:, None], rounded_slowly(weight), atol=1e-6, rtol=0)
    assert (rounded.abs().amax(dim=1) >= 126).all()


def test_a_row_of_a_step_does_not_depend_on_the_others_at_all() -> None:
    weights = Int8Weights([matrix(64, 32)], [None])
    hidden = matrix(int8.FEW_ROWS, 32, seed=1) * torch.logspace(-4, 4, int8.FEW_ROWS)[:, None]
    together = weights.product(hidden)
    for rows in (1, 2, 5):
        assert torch.equal(weights.product(hidden[:rows]), together[:rows])


def test_a_row_of_the_head_does_not_depend_on_the_others() -> None:
    weights = Int8Weights([matrix(64, 32)], [None], is_head=True)
    hidden = matrix(5, 32, seed=1) * torch.tensor([1.0, 1e4, 1e-4, 1.0, 10.0])[:, None]
    together = weights.product(hidden)
    for row in range(5):
        torch.testing.assert_close(weights.product(hidden[row : row + 1])[0], together[row], atol=0, rtol=1e-6)


def test_rows_and_weights_of_zeros_give_zeros() -> None:
    assert torch.equal(Int8Weights([torch.zeros(8, 16)], [None]).product(matrix(2, 16)), torch.zeros(2, 8))
    assert torch.equal(Int8Weights([matrix(8, 16)], [None]).product(torch.zeros(1, 16)), torch.zeros(1, 8))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_computes_with_the_rounded_weights(family: str) -> None:
    model = tiny_model(family)
    slow = rounded_model(model)
    need = slow(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    lm = lm_of(model)
    assert not [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    rows = lm.encode([IDS], [0])
    # Activations are rounded to 15 bits, layer upon layer.
    assert (lm.logits(rows.hidden) - need).abs().max() <= 5e-3 * need.std() * 4
    sequence = lm.allocate()
    pieces = [lm.forward([Span(sequence, IDS[a:b], b - a)]) for a, b in ((0, 30), (30, 31), (31, 36), (36, 40))]
    stepped = lm.logits(torch.cat([piece.hidden for piece in pieces]))
    # Steps round them, and their outputs, to 8 bits.
    assert (stepped - need).abs().max() <= 6e-2 * need.std() * 4
    assert (stepped - need).pow(2).mean().sqrt() <= 2e-2 * need.std()


def test_layers_that_read_the_same_activations_are_multiplied_together() -> None:
    model = tiny_model("llama")
    use_int8_weights(model)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj._siblings is attention.k_proj._siblings is attention.v_proj._siblings
    assert mlp.gate_proj._siblings is mlp.up_proj._siblings
    groups = {id(m._siblings) for m in model.modules() if isinstance(m, Int8Linear)}
    assert len(groups) == 3 * 4 + 1  # three blocks, the head


def test_siblings_answer_for_the_activations_that_they_are_given() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    weights = {name: getattr(attention, name).weight for name in ("q_proj", "k_proj")}
    use_int8_weights(model)
    one, other = matrix(2, 64), matrix(2, 64, seed=1)
    for name, hidden in (("q_proj", one), ("k_proj", other), ("k_proj", one), ("q_proj", one), ("q_proj", one)):
        need = hidden.bfloat16().double() @ rounded_slowly(weights[name]).T
        torch.testing.assert_close(getattr(attention, name)(hidden).double(), need, atol=1e-5, rtol=1 / 256)


def test_the_identity_is_that_of_the_original_weights(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    full, rounded = load_lm(folder), load_lm(folder, LoadOptions(weights="int8"))
    assert rounded.identity == full.identity
    assert (full.numerics, rounded.numerics) == ("float32", "int8")
    assert load_lm(folder, LoadOptions(dtype="bfloat16")).numerics == "bfloat16"
    one, other = (lm.encode([IDS], [0]).keys for lm in (full, rounded))
    assert not torch.equal(one, other)


def test_int8_is_for_float32_on_a_cpu(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    with pytest.raises(InvalidParameter, match="in float32 on a CPU only, got bfloat16 on cpu"):
        load_lm(folder, LoadOptions(weights="int8", dtype="bfloat16"))
    with pytest.raises(InvalidParameter, match="must be full or int8, got 'int4'"):
        load_lm(folder, LoadOptions(weights="int4"))


def test_weights_outside_linear_layers_are_refused() -> None:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.raises(UnsupportedModel, match=r"'mixtral': int8 is for linear layers.*experts"):
        use_int8_weights(model)


def test_a_kernel_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Int8Weights.product
    monkeypatch.setattr(int8.Int8Weights, "product", lambda self, rows: right(self, rows) * 1.01)
    with pytest.raises(UnsupportedModel, match=r"int8 kernel is off by 0\.01"):
        use_int8_weights(tiny_model("llama"))


def test_a_kernel_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Int8Weights, rows: Tensor) -> Tensor:
        raise NotImplementedError("Could not run 'onednn::qlinear_pointwise'")

    monkeypatch.setattr(int8.Int8Weights, "product", missing)
    with pytest.raises(UnsupportedModel, match="no int8 kernel for this CPU: Could not run"):
        use_int8_weights(tiny_model("llama"))
