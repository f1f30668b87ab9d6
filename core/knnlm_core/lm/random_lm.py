"""A tiny language model made on the spot, with a reference in float64: to see whether everything here works together.

It knows nothing, but it is a real one: a Llama of two layers and a byte-level tokenizer, in a folder like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_VOCAB = 384
_END = "<|end|>"
_WEIGHTS = "model.safetensors"


def save_random_lm(folder: Path, text: str, *, seed: int = 0) -> Path:
    """Write a random causal LM with a context of 256 tokens to ``folder``; its tokenizer is trained on ``text``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=_VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,  # far from uniform, so that a wrong row shows
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / _WEIGHTS, metadata={"format": "pt"})
    train_tokenizer([text], _VOCAB).save_pretrained(folder)
    return folder


class ReferenceLM:
    """A model of `save_random_lm` in float64, without cache, slots or batches: slow and obvious."""

    def __init__(self, folder: Path) -> None:
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        model.load_state_dict(load_file(folder / _WEIGHTS))
        self._model = model.double().eval()

    @torch.inference_mode()
    def run(self, token_ids: list[int]) -> tuple[Tensor, Tensor]:
        """Of one forward pass over T tokens: log-probabilities of the next token (T, V), and keys (T, D).

        The key is the input of the last layer's feed-forward block, after its norm.
        """
        seen: list[Tensor] = []
        handle = self._model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits = self._model(torch.tensor([token_ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
        return torch.log_softmax(logits, dim=1), seen[0][0]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on some texts; every text is encodable."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=_END, pad_token=_END)
