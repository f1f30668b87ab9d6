"""Which activation is the datastore key, and how it is read without touching the model.

The key is the input of the last block's feed-forward module, after its norm (Khandelwal et al. 2020, table 5). In a
*parallel* block the feed-forward does not see that block's attention, so there the key is the final hidden state:

    sequential   x ── norm ─ attn ─ + ── norm ─┬─ ffn ─ +
                                               └ key: `ffn_input`

    parallel     x ─┬─ norm ─ attn ─┐
                    └─ norm ─ ffn ──+── norm ── key: `final_hidden`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from knnlm_core.errors import InvalidParameter, UnsupportedModel

FFN_INPUT = "ffn_input"
FINAL_HIDDEN = "final_hidden"

_Rule = Callable[[Any], str]


def _always(tap: str) -> _Rule:
    return lambda config: tap


def _unless(flag: str, default: bool) -> _Rule:
    """`final_hidden` where the config's flag says that blocks are parallel."""
    return lambda config: FINAL_HIDDEN if getattr(config, flag, default) else FFN_INPUT


def _falcon(config: Any) -> str:
    return FINAL_HIDDEN if config.new_decoder_architecture or config.parallel_attn else FFN_INPUT


# model_type → tap. A family that is absent gets `ffn_input` if the probe below finds that it holds.
FAMILIES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3", "granite"),
        _always(FFN_INPUT),
    ),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "phi3", "starcoder2", "gpt2", "gpt_bigcode"), _always(FFN_INPUT)
    ),
    **dict.fromkeys(("gptj", "codegen", "phi", "cohere", "cohere2"), _always(FINAL_HIDDEN)),
    "gpt_neox": _unless("use_parallel_residual", True),
    "stablelm": _unless("use_parallel_residual", False),
    "falcon": _falcon,
}

_FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")


class KeyTap:
    """Reads the key activation of a forward pass through one hook that lives only as long as that pass."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        self.name = name
        self._module = module  # None: the key is the base model's own output

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """Collect the tapped module's input during the ``with`` block; the hook is gone afterwards."""
        seen: list[Tensor] = []
        if self._module is None:
            yield seen
            return

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handle = self._module.register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    def key(self, seen: list[Tensor], last_hidden: Tensor) -> Tensor:
        """The key activation (B, T, D) of the pass just made."""
        if self._module is None:
            return last_hidden
        if len(seen) != 1:
            raise UnsupportedModel(f"key tap {self.name!r} fired {len(seen)} times in one forward pass, need exactly 1")
        return seen[0].view(*last_hidden.shape[:2], -1)


def find_key_tap(base_model: nn.Module, config: Any, requested: str | None = None) -> KeyTap:
    """Choose the tap of a model and check that it holds.

    Args:
        base_model: the model without its head.
        config: its configuration; ``model_type`` selects the family's rule.
        requested: a tap by name, overriding the family's rule (still checked).
    Raises: UnsupportedModel: no feed-forward module is found, or its input does not see the block's attention.
    """
    if requested not in (None, FFN_INPUT, FINAL_HIDDEN):
        raise InvalidParameter(
            f"`key_tap` must be {FFN_INPUT!r} or {FINAL_HIDDEN!r}, got {requested!r}", param="key_tap"
        )
    model_type = config.model_type
    rule = FAMILIES.get(model_type)
    name = requested or (rule(config) if rule else FFN_INPUT)
    if name == FINAL_HIDDEN:
        return KeyTap(name, None)

    block = _last_block(base_model)
    ffn, attention = _child(block, _FFN_NAMES), _child(block, _ATTENTION_NAMES)
    if ffn is None or attention is None:
        children = ", ".join(n for n, _ in block.named_children())
        raise UnsupportedModel(
            f"model_type {model_type!r}: no feed-forward and attention found in the last block (it has {children}); "
            f"use --key-tap {FINAL_HIDDEN}"
        )
    tap = KeyTap(name, ffn)
    _probe(base_model, attention, tap, model_type)
    return tap


def _last_block(base_model: nn.Module) -> nn.Module:
    """The last of the longest list of equal blocks: the decoder's layers, whatever the family calls them."""
    lists = [m for m in base_model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UnsupportedModel(f"{type(base_model).__name__} has no list of blocks to tap")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))[-1]


def _child(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(block.named_children())
    return next((children[name] for name in names if name in children), None)


@torch.inference_mode()
def _probe(base_model: nn.Module, attention: nn.Module, tap: KeyTap, model_type: str) -> None:
    """Silence the last block's attention for one short pass: a key worth the name must notice."""
    device = next(base_model.parameters()).device
    ids = torch.arange(6, device=device)[None] % base_model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    def key() -> Tensor:
        with tap.reading() as seen:
            hidden = base_model(input_ids=ids, use_cache=False).last_hidden_state
        return tap.key(seen, hidden).clone()

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    normal = key()
    handle = attention.register_forward_hook(silence)
    try:
        silenced = key()
    finally:
        handle.remove()
    if torch.equal(normal, silenced):
        raise UnsupportedModel(
            f"model_type {model_type!r}: the last feed-forward's input does not see that block's attention "
            f"(a parallel block?); use --key-tap {FINAL_HIDDEN}"
        )
