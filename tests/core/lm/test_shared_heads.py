"""Attention over shared KV heads: equal to that of transformers, which repeats them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from knnlm_core.lm.attention import SHARED_HEADS, shared_heads_attention, use_shared_heads
from knnlm_core.lm.fingerprint import model_fingerprint
from tiny import tiny_model


class Attention(nn.Module):
    """What transformers' function asks of the module that calls it."""

    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize(("rows", "new", "held"), [(1, 5, 40), (3, 4, 9), (2, 1, 30), (1, 64, 700)])
def test_the_result_is_that_of_repeated_heads(rows: int, new: int, held: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn((rows, 6, new, 16), generator=draw)
    key, value = torch.randn((2, rows, 2, held, 16), generator=draw)
    lengths = torch.arange(rows)[:, None, None, None] + held - new - rows + 1
    visible = torch.arange(held) <= lengths + torch.arange(new)[:, None]
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    have, _ = shared_heads_attention(Attention(), query, key, value, mask, scaling=0.3)
    need, _ = sdpa_attention_forward(Attention(), query, key, value, mask, scaling=0.3)
    assert have.shape == need.shape == (rows, new, 6, 16)
    torch.testing.assert_close(have, need, atol=1e-6, rtol=1e-5)
    assert have.is_contiguous()


def test_a_model_that_takes_registered_functions_is_switched_and_stays_the_same_model() -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model, model.config)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        need = model(input_ids=ids).logits
        use_shared_heads(model)
        assert model.config._attn_implementation == SHARED_HEADS
        torch.testing.assert_close(model(input_ids=ids).logits, need, atol=1e-6, rtol=1e-6)
    assert model_fingerprint(model, model.config) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_models_are_left_as_they_are(implementation: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    if implementation == "sdpa":
        type(model)._supports_attention_backend = False
    try:
        use_shared_heads(model)
    finally:
        if implementation == "sdpa":
            type(model)._supports_attention_backend = True
    assert model.config._attn_implementation == implementation
