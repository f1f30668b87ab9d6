"""Fingerprints: the same for the same checkpoint however it is loaded, another one after any change that matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knnlm_core.lm.fingerprint import model_fingerprint, tokenizer_fingerprint
from knnlm_core.lm.loading import LoadOptions, load_lm
from tiny import TEXT, save_tiny, tiny_model, tiny_tokenizer


def fingerprint(model: Any) -> str:
    return model_fingerprint(model, model.config)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_saving_and_loading_changes_nothing_and_neither_does_the_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "quite-another")
    need = fingerprint(tiny_model("llama"))
    assert fingerprint(loaded(folder)) == need
    assert fingerprint(loaded(tmp_path / "quite-another")) == need
    one, other = (load_lm(str(path)).identity for path in (folder, tmp_path / "quite-another"))
    assert (one.model_fingerprint, one.tokenizer_fingerprint) == (need, other.tokenizer_fingerprint)
    assert (one.model_name, other.model_name) == ("one", "quite-another")


def test_a_bfloat16_checkpoint_is_one_model_in_float32_and_bfloat16(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert fingerprint(loaded(tmp_path, torch.bfloat16)) == fingerprint(loaded(tmp_path, torch.float32))


def test_a_float32_checkpoint_is_one_model_in_float32_and_bfloat16(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    one, other = (load_lm(str(folder), LoadOptions(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert one.identity == other.identity
    assert (one.dtype, other.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("block", [0, 2])
def test_one_small_training_step_on_one_layer_makes_another_model(block: int) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    layer = model.model.layers[block].mlp.down_proj
    layer.requires_grad_(True)
    ids = torch.arange(1, 40)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    largest = (layer.weight - tiny_model("llama").model.layers[block].mlp.down_proj.weight).abs().max()
    assert 0 < largest < 1e-2  # small indeed
    assert fingerprint(model) != before


def test_swapping_two_tensors_of_one_shape_makes_another_model() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    one, other = (model.model.layers[i].self_attn.q_proj.weight for i in (0, 1))
    one.data, other.data = other.data, one.data
    assert fingerprint(model) != before


CHANGES: dict[str, Callable[[LlamaConfig], None]] = {
    "rope theta": lambda config: config.rope_parameters.update(rope_theta=20_000.0),
    "norm epsilon": lambda config: setattr(config, "rms_norm_eps", 1e-5),
    "activation": lambda config: setattr(config, "hidden_act", "gelu"),
    "heads": lambda config: setattr(config, "num_key_value_heads", 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_configuration_makes_another_model(change: str) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    CHANGES[change](model.config)
    assert fingerprint(model) != before


def test_how_a_model_is_run_is_no_part_of_which_model_it_is() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    model.config.architectures = ["SomethingElse"]
    model.config._name_or_path = "/elsewhere"
    model.config.transformers_version = "9.9.9"
    assert fingerprint(model) == before


def arithmetic_model() -> LlamaForCausalLM:
    """A model without any randomness: parameter i of a tensor is ((37 i + its number) mod 257 − 128) / 512."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
        values = (37 * torch.arange(parameter.numel()) + number) % 257 - 128
        parameter.copy_((values / 512).reshape(parameter.shape))
    return model


def test_the_model_fingerprint_never_changes_between_releases() -> None:
    # Published datastores name it. If a library's new defaults brought this here, `_stable` must leave them out.
    assert fingerprint(arithmetic_model()) == "9d79f4aa55f3d22d12893e5a0fc9de94"


def test_float16_agrees_where_the_weights_fit_it() -> None:
    assert fingerprint(arithmetic_model().to(torch.float16)) == fingerprint(arithmetic_model())


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("e", "r")]


def bpe(merges: list[tuple[str, str]] = MERGES, normalizer: normalizers.Normalizer | None = None) -> Any:
    """A tokenizer written by hand; nothing is trained, so nothing depends on a trainer."""
    pieces = [*LETTERS, *("".join(pair) for pair in MERGES), "<|end|>"]
    raw = RawTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")


def test_the_tokenizer_fingerprint_never_changes_between_releases() -> None:
    assert tokenizer_fingerprint(bpe()) == "2ba8cb6010f1dbf84331995b2916e9d3"


def test_a_tokenizer_keeps_its_fingerprint_when_it_is_saved_loaded_and_used(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(TEXT, truncation=True, max_length=5, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before


def test_an_added_token_makes_another_tokenizer() -> None:
    tokenizer = bpe()
    tokenizer.add_tokens(["zebra"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(bpe())


@pytest.mark.parametrize("at", range(len(MERGES) - 1))
def test_two_merges_in_another_order_make_another_tokenizer(at: int) -> None:
    merges = list(MERGES)
    merges[at], merges[at + 1] = merges[at + 1], merges[at]
    assert tokenizer_fingerprint(bpe(merges)) != tokenizer_fingerprint(bpe())


def test_a_merge_less_makes_another_tokenizer() -> None:
    assert tokenizer_fingerprint(bpe(MERGES[:-1])) != tokenizer_fingerprint(bpe())


def test_how_merges_are_written_down_makes_no_difference(tmp_path: Path) -> None:
    # Older files hold "t h" where newer ones hold ["t", "h"].
    bpe().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    file.write_text(json.dumps(content))
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(bpe())


def test_a_bos_and_a_normaliser_make_other_tokenizers() -> None:
    with_bos = bpe()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", with_bos.eos_token_id)]
    )
    found = {tokenizer_fingerprint(t) for t in (bpe(), with_bos, bpe(normalizer=normalizers.NFC()))}
    assert len(found) == 3


def test_the_scores_of_a_unigram_tokenizer_are_part_of_it() -> None:
    def unigram(score: float) -> Any:
        pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", score)]
        return PreTrainedTokenizerFast(tokenizer_object=RawTokenizer(models.Unigram(pieces, unk_id=0)))

    assert tokenizer_fingerprint(unigram(-1.5)) == tokenizer_fingerprint(unigram(-1.5))
    assert tokenizer_fingerprint(unigram(-1.5)) != tokenizer_fingerprint(unigram(-1.6))
