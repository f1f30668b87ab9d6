"""Tiny real models and tokenizers, made on the spot: what the tests run instead of downloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from knnlm_core.lm.random_lm import train_tokenizer

VOCAB = 512
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from uniform, so that argmax means something
}

# name → (model_type, what differs from _COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("gpt_neox", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "mistral-sliding": ("mistral", {"sliding_window": 12}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 12, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0}),
    "gemma3": ("gemma3_text", {"sliding_window": 12}),
    "granite": (
        "granite",
        {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3-sliding": ("phi3", {"sliding_window": 12}),
    "starcoder2-sliding": ("starcoder2", {"sliding_window": 12}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "gptj": ("gptj", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 96, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "olmo2": ("olmo2", {}),
}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A randomly initialised causal LM of the family, float32, on the CPU."""
    model_type, changes = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


TEXT = (
    "A datastore holds entries. Each entry is a key and a value: the key is what the model thought, "
    "the value is the token that came next. To predict, the server looks for keys like its own thought.\n"
    "Der Speicher enthält Einträge; naïve café, 你好，世界 🙂. def search(query, k): return index.search(query, k)\n"
)


def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few lines; every text is encodable."""
    return train_tokenizer([TEXT] * 4, vocab_size)


def save_tiny(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A model folder as `from_pretrained` expects it."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
