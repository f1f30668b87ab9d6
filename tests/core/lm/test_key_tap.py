"""The key is what the documentation says it is, recomputed by hand; where it cannot be, the model is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, MambaConfig

from knnlm_core.errors import InvalidParameter, UnsupportedModel
from knnlm_core.lm import key_tap
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.key_tap import FFN_INPUT, FINAL_HIDDEN, KeyTap, find_key_tap
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import FAMILIES, VOCAB, tiny_model, tiny_tokenizer

Array = npt.NDArray[np.float64]
IDS = torch.randint(1, VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))


def adapter(model: Any, tap: str | None = None) -> HuggingFaceLM:
    return HuggingFaceLM(model, Tokenizer(tiny_tokenizer()), name="tiny", key_tap=tap)


def keys_of(model: Any, tap: str | None = None) -> Tensor:
    return adapter(model, tap).encode(IDS.tolist(), [0]).keys


@torch.inference_mode()
def last_block_input(model: Any) -> Array:
    """(T, H) what enters the last block: the last but one of the hidden states."""
    return f64(model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[-2][0])


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Causal attention of one head, (T, size) each."""
    scores = np.where(np.tri(len(q), dtype=bool), q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def test_the_llama_key_is_the_normed_residual_after_the_last_attention() -> None:
    model = tiny_model("llama")
    config, block = model.config, model.model.layers[-1]
    heads, size = config.num_attention_heads, config.head_dim
    group = heads // config.num_key_value_heads

    def rms_norm(x: Array, weight: Tensor) -> Array:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + config.rms_norm_eps) * f64(weight)

    frequency = config.rope_parameters["rope_theta"] ** (-np.arange(0, size, 2) / size)
    angle = np.arange(IDS.shape[1])[:, None] * frequency

    def rotate(x: Array) -> Array:
        one, other = x[:, : size // 2], x[:, size // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=1)

    residual = last_block_input(model)
    normed = rms_norm(residual, block.input_layernorm.weight)
    q, k, v = (normed @ f64(getattr(block.self_attn, f"{name}_proj").weight).T for name in "qkv")

    def head(x: Array, number: int) -> Array:
        return x[:, number * size : (number + 1) * size]

    attended = np.concatenate(
        [
            attend(rotate(head(q, h)), rotate(head(k, h // group)), head(v, h // group), size**-0.5)
            for h in range(heads)
        ],
        axis=1,
    )
    residual = residual + attended @ f64(block.self_attn.o_proj.weight).T
    need = rms_norm(residual, block.post_attention_layernorm.weight)
    np.testing.assert_allclose(keys_of(model).numpy(), need, atol=1e-4)


def test_the_gpt2_key_is_the_normed_residual_after_the_last_attention() -> None:
    model = tiny_model("gpt2")
    # Fresh biases are zero and fresh gains are one, which hides a forgotten one.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.transformer.h[-1].parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    config, block = model.config, model.transformer.h[-1]
    size = config.n_embd // config.n_head

    def layer_norm(x: Array, norm: nn.LayerNorm) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        spread = np.sqrt((centred**2).mean(axis=1, keepdims=True) + norm.eps)
        return centred / spread * f64(norm.weight) + f64(norm.bias)

    residual = last_block_input(model)
    qkv = layer_norm(residual, block.ln_1) @ f64(block.attn.c_attn.weight) + f64(block.attn.c_attn.bias)
    q, k, v = np.split(qkv, 3, axis=1)
    cuts = [slice(h * size, (h + 1) * size) for h in range(config.n_head)]
    attended = np.concatenate([attend(q[:, c], k[:, c], v[:, c], size**-0.5) for c in cuts], axis=1)
    residual = residual + attended @ f64(block.attn.c_proj.weight) + f64(block.attn.c_proj.bias)
    np.testing.assert_allclose(keys_of(model).numpy(), layer_norm(residual, block.ln_2), atol=1e-4)


FFN = {
    "gpt2": "transformer.h.2.mlp",
    "opt": "model.decoder.layers.2.fc1",
    "gpt_neox-sequential": "gpt_neox.layers.2.mlp",
}
SEQUENTIAL = sorted(FAMILIES.keys() - {"gpt_neox", "phi", "cohere", "gptj"})


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_the_key_of_a_sequential_family_is_what_its_last_feed_forward_takes(family: str) -> None:
    model = tiny_model(family)
    seen: list[Tensor] = []
    ffn = model.get_submodule(FFN.get(family, "model.layers.2.mlp"))
    lm = adapter(model)
    handle = ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    keys = lm.encode(IDS.tolist(), [0]).keys
    handle.remove()
    assert lm.identity.key_tap == FFN_INPUT
    assert torch.equal(keys, seen[0].reshape(keys.shape))


@pytest.mark.parametrize("family", ["gpt_neox", "phi", "cohere", "gptj"])
def test_the_key_of_a_parallel_family_is_the_final_hidden_state(family: str) -> None:
    model = tiny_model(family)
    with torch.inference_mode():
        need = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[0]
    lm = adapter(model)
    assert lm.identity.key_tap == FINAL_HIDDEN
    assert torch.equal(lm.encode(IDS.tolist(), [0]).keys, need)


@pytest.mark.parametrize("family", ["opt", "olmo2"])
def test_a_family_that_is_not_in_the_registry_gets_the_feed_forward_input(family: str) -> None:
    model = tiny_model(family)
    assert model.config.model_type not in key_tap.FAMILIES
    assert find_key_tap(model.base_model, model.config).name == FFN_INPUT


@pytest.mark.parametrize("family", ["gpt_neox", "phi", "cohere", "gptj"])
@pytest.mark.parametrize("known", [True, False])
def test_the_feed_forward_input_of_a_parallel_block_is_refused(
    family: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    if not known:
        monkeypatch.delitem(key_tap.FAMILIES, model.config.model_type)
    message = rf"model_type '{model.config.model_type}'.*does not see that block's attention.*--key-tap final_hidden"
    with pytest.raises(UnsupportedModel, match=message):
        find_key_tap(model.base_model, model.config, requested=FFN_INPUT if known else None)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_the_final_hidden_state_can_be_asked_for_where_both_taps_hold() -> None:
    model = tiny_model("llama")
    lm = adapter(model, FINAL_HIDDEN)
    assert lm.identity.key_tap == FINAL_HIDDEN
    rows = lm.encode(IDS.tolist(), [0])
    assert torch.equal(rows.keys, rows.hidden)
    assert not torch.allclose(rows.keys, keys_of(model), atol=0.1)


def test_a_tap_that_does_not_exist_is_refused() -> None:
    model = tiny_model("llama")
    message = "`key_tap` must be 'ffn_input' or 'final_hidden', got 'attention'"
    with pytest.raises(InvalidParameter, match=message):
        find_key_tap(model.base_model, model.config, requested="attention")


def test_blocks_without_attention_are_refused_naming_what_they_have() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match=r"model_type 'mamba'.*it has norm, mixer.*--key-tap final_hidden"):
        find_key_tap(AutoModel.from_config(config), config)


def test_a_module_that_ran_twice_or_never_gives_no_key() -> None:
    tap, hidden = KeyTap(FFN_INPUT, nn.Identity()), torch.zeros(1, 2, 4)
    for seen in ([], [hidden, hidden]):
        with pytest.raises(UnsupportedModel, match=f"fired {len(seen)} times in one forward pass"):
            tap.key(seen, hidden)
