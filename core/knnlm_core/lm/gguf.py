"""GGUF files: transformers reads their weights into dense tensors."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import CONFIG_NAME

from knnlm_core.durable import sync_file, sync_folder
from knnlm_core.errors import KnnlmError, ModelLoadError
from knnlm_core.lm.checkpoint import check_complete, first_line
from knnlm_core.lm.gguf_rope import check_rope


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Read model and tokenizer from one GGUF file; weights are dequantised to ``dtype``.

    Raises:
        ModelLoadError: not a GGUF file, an architecture that transformers cannot read, or a missing extra.
        UnsupportedModel: its RoPE is scaled in a way that transformers does not read.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelLoadError(f"{path}: reading GGUF needs the extra `gguf` (pip install 'knnlm[gguf]')") from error
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file: it does not start with the bytes 'GGUF'")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        check_rope(path, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=dtype, output_loading_info=True
        )
        check_complete(str(path), info)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except KnnlmError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader, with any class of error
        raise ModelLoadError(f"{path}: {first_line(error)}") from error
    # The tensors are dense now; what is left of the quantisation only keeps the model from being saved.
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of safetensors, which loads in a second instead of half a minute.

    The folder appears whole or not at all, and everybody may read it. One that holds a model already is left as it is:
    of several conversions at once the first does the work and the others wait for it.

    Raises: ModelLoadError: as `load_gguf`, or something else stands in the folder's place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however it ends
        if (folder / CONFIG_NAME).is_file():
            return
        model, tokenizer = load_gguf(path, torch.float32)
        partial = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)  # what a conversion left that was killed
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
            sync_file(file)
        sync_folder(partial)
        try:
            os.rename(partial, folder)
        except OSError as error:
            raise ModelLoadError(f"{folder} cannot be made: {error.strerror}; remove what is there") from error
        sync_folder(folder.parent)
