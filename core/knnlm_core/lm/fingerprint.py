"""Fingerprints: the same on every machine for the same checkpoint, different after any training.

Weights are rounded to bfloat16 before hashing, so that a checkpoint loaded in float32 or in bfloat16 is one model;
what numerics do to keys is measured elsewhere. Names, shapes and order of tensors enter the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

# Says how a checkpoint was stored or loaded, or which library wrote it: no part of what the model computes.
_VOLATILE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

# Awkward text whose token ids pin down normalisation, pre-tokenisation and merges.
_PROBES = (
    "The quick brown fox, it's 1234567.89 — naïve café\tΩ≈ç√ 你好，世界 🙂👩\u200d👧 \n\n",
    "    def f(x):\r\n\treturn x**2  # π",
    " leading space",
    "trailing space ",
    "ALL CAPS and camelCase_snake-kebab/path\\back",
    "\u00e9 e\u0301 \ufb01 \u200b\ufeff",
    "<s></s><|endoftext|><unk>[MASK]",
    "",
)


def model_fingerprint(model: nn.Module, config: Any) -> str:
    """Hex digest (32 digits) of a model's configuration and parameters."""
    digest = hashlib.sha256()
    digest.update(json.dumps(_stable(config.to_diff_dict()), sort_keys=True).encode())
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    # hashlib releases the GIL: one thread a core.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for (name, parameter), part in zip(named, pool.map(lambda item: _tensor_digest(item[1]), named), strict=True):
            digest.update(f"\0{name}\0{tuple(parameter.shape)}\0".encode())
            digest.update(part)
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex digest (32 digits) of a tokenizer's vocabulary, merges and behaviour on awkward text."""
    digest = hashlib.sha256()
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(json.dumps(_segmentation(tokenizer)).encode())
    for probe in _PROBES:
        for special in (False, True):
            ids = tokenizer.encode(probe, add_special_tokens=special)
            digest.update(json.dumps(ids).encode())
    return digest.hexdigest()[:32]


def _segmentation(tokenizer: Any) -> list[Any]:
    """What decides between the ways to cut a word: BPE merges in their order, unigram scores; else nothing.

    No probe can be long enough to meet every merge.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if "merges" in model:
        return [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    return model["vocab"] if isinstance(model["vocab"], list) else []


def _tensor_digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous().view(torch.int16).reshape(-1)
    return hashlib.sha256(flat.numpy().astype("<i2", copy=False).data).digest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _stable(v) for k, v in value.items() if k not in _VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_stable(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
