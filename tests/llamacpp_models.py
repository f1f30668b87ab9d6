"""Tiny GGUF files and the same weights in both runtimes; whoever imports this is skipped without llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.llamacpp import LlamaCppLM
from knnlm_core.lm.loading import LoadOptions, load_lm
from tiny import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent / "core" / "lm"))
from gguf_file import write_gguf

pytest.importorskip("llama_cpp", reason="the extra llamacpp is not installed (make llamacpp)")

FAMILIES = ("llama", "qwen2", "qwen3")
SLOTS = 4


def trained_like(family: str, seed: int = 3) -> Any:
    """A tiny model whose norms and biases are not those of a fresh one, which hide what is read where."""
    config = tiny_model(family).config
    if family == "qwen3":
        config.head_dim = 128  # what transformers takes for granted in a GGUF file
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def tiny_gguf(folder: Path, family: str = "llama", seed: int = 3) -> Path:
    """A GGUF file of float32 weights."""
    return write_gguf(folder / f"tiny-{family}-{seed}.gguf", trained_like(family, seed), tiny_tokenizer())


def in_llamacpp(path: Path, *, exact: bool = True, **options: Any) -> LlamaCppLM:
    """The file in llama.cpp; what is known of it is kept beside it."""
    given = {"max_sequences": SLOTS, "name": path.stem, "cache": path.parent / "cache", **options}
    return LlamaCppLM(path, exact=exact, **given)


def in_huggingface(path: Path, **options: Any) -> HuggingFaceLM:
    """The same file in transformers."""
    lm = load_lm(str(path), LoadOptions(**{"max_sequences": SLOTS, **options}))
    assert isinstance(lm, HuggingFaceLM)
    return lm
