"""Scaled RoPE in GGUF files: llama.cpp applies it, transformers' reader of GGUF files passes over it.

    rope_freqs, rope_factors_long, rope_factors_short   tensors: by what frequencies are divided (Llama 3.1, Phi 3)
    <architecture>.rope.scaling.type, .factor           `yarn`, or `linear`, as where no type is given; 1: no scaling
    <architecture>.rope.scaling.*attn_factor            what attention is multiplied by

So in transformers such a file is another model: from the first tokens on, or in long contexts alone. Keys and
fingerprint would be wrong without any sign of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from knnlm_core.errors import UnsupportedModel

_FACTORS = ("rope_freqs", "rope_factors_long", "rope_factors_short")
_ATTENTION = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")


def check_rope(path: Path, config: Any) -> None:
    """Refuse a file whose RoPE is scaled where its configuration, as transformers reads it, knows of no scaling.

    Raises: UnsupportedModel: naming the key or tensor.
    """
    if _rope_types(config.get_text_config()) != {"default"}:
        return
    for what in _scalings(path):
        raise UnsupportedModel(
            f"{path}: {what} scales RoPE, which transformers does not read from GGUF files: keys and fingerprint would "
            "be those of another model. Use the model's safetensors (a folder or a hub id) instead",
            param="model",
        )


def _rope_types(config: Any) -> set[str]:
    """Of a model's layers; no type at all is the default."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [part for part in parameters.values() if isinstance(part, dict)] or [parameters]
    return {str(part.get("rope_type", "default")) for part in each}


def _scalings(path: Path) -> Iterator[str]:
    """What of a file makes llama.cpp scale its RoPE."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()

    def value(name: str) -> Any:
        field = reader.fields.get(f"{architecture}.{name}")
        return field.contents() if field is not None else None

    for tensor in reader.tensors:
        if any(part in _FACTORS for part in tensor.name.split(".")) and bool(np.any(tensor.data != 1)):
            yield f"the tensor `{tensor.name}`"
    kind, factor = value("rope.scaling.type"), "rope.scaling.factor"
    if value(factor) is None:
        factor = "rope.scale_linear"  # its old name
    if kind != "none" and (value(factor) or 1) != 1:
        yield f"`{architecture}.{factor}` = {value(factor):g}" + (f" with the type {kind}" if kind else "")
    for name in _ATTENTION:
        if value(name) not in (None, 1):
            yield f"`{architecture}.{name}` = {value(name):g}"
