"""GGUF files: transformers reads their weights into dense tensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnlm_core.errors import ModelLoadError


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read model and tokenizer from one GGUF file; weights are dequantised to ``dtype``.

    Raises: ModelLoadError: not a GGUF file, an architecture that transformers cannot read, or a missing extra.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelLoadError(f"{path}: reading GGUF needs the extra `gguf` (pip install 'knnlm[gguf]')") from error
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file: it does not start with the bytes 'GGUF'")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"{path}: {error}") from error
    # The tensors are dense now; what is left of the quantisation only keeps the model from being saved.
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of safetensors, which loads in a second instead of half a minute.

    The folder appears whole or not at all.
    """
    model, tokenizer = load_gguf(path, torch.float32)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
