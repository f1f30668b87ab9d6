"""A GGUF file whose RoPE is scaled is refused, since transformers would run it as another model; others are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_file import write_gguf

from knnlm_core.errors import UnsupportedModel
from knnlm_core.lm import gguf as gguf_loading
from knnlm_core.lm.gguf import convert_gguf
from knnlm_core.lm.gguf_identity import read_gguf
from knnlm_core.lm.gguf_rope import check_rope
from knnlm_core.lm.loading import load_lm
from tiny import tiny_model, tiny_tokenizer


def file(folder: Path, more: Callable[[GGUFWriter], None], family: str = "llama") -> Path:
    return write_gguf(folder / "scaled.gguf", tiny_model(family), tiny_tokenizer(), more)


def frequencies(*factors: float, name: str = "rope_freqs.weight") -> Callable[[GGUFWriter], None]:
    """As in files of Llama 3.1: a tensor, and no key at all."""
    return lambda writer: writer.add_tensor(name, np.array(factors, np.float32))


def keys(**values: float | str) -> Callable[[GGUFWriter], None]:
    def add(writer: GGUFWriter) -> None:
        for name, value in values.items():
            key = f"{writer.arch}.rope.{name.replace('__', '.')}"
            if isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_float32(key, value)

    return add


SCALED = {
    "llama 3": (frequencies(1, 1, 1, 1.2, 2.5, 8, 8, 8), "the tensor `rope_freqs.weight`"),
    "long": (frequencies(*[4.0] * 8, name="rope_factors_long.weight"), "the tensor `rope_factors_long.weight`"),
    "linear": (keys(scaling__type="linear", scaling__factor=4.0), "`llama.rope.scaling.factor` = 4 with the type lin"),
    "no type": (keys(scaling__factor=2.5), "`llama.rope.scaling.factor` = 2.5 scales"),
    "old name": (keys(scale_linear=2.0), "`llama.rope.scale_linear` = 2 scales"),
    "yarn": (keys(scaling__type="yarn", scaling__factor=8.0), "`llama.rope.scaling.factor` = 8 with the type yarn"),
    "attention": (keys(scaling__attn_factor=1.2), "`llama.rope.scaling.attn_factor` = 1.2 scales"),
}
NOT_SCALED = {
    "ones": frequencies(*[1.0] * 8),
    "type none": keys(scaling__type="none", scaling__factor=4.0),
    "factor one": keys(scaling__type="yarn", scaling__factor=1.0, scaling__original_context_length=256.0),
    "factor zero": keys(scaling__type="linear", scaling__factor=0.0),
    "trained so": lambda writer: writer.add_rope_scaling_finetuned(True),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rope_is_refused_by_both_readers_with_its_key_and_a_way_out(tmp_path: Path, kind: str) -> None:
    more, what = SCALED[kind]
    path = file(tmp_path, more)
    with pytest.raises(UnsupportedModel) as refused:
        load_lm(str(path))
    assert f"{path}: {what}" in refused.value.message
    assert "Use the model's safetensors (a folder or a hub id) instead" in refused.value.message
    with pytest.raises(UnsupportedModel, match="scales RoPE"):
        read_gguf(path, tmp_path / "cache")  # what llama.cpp's runtime asks first
    assert not [found for found in (tmp_path / "cache").iterdir() if found.is_dir()]


@pytest.mark.parametrize("kind", NOT_SCALED)
def test_keys_that_scale_nothing_are_not_minded(tmp_path: Path, kind: str) -> None:
    path = file(tmp_path, NOT_SCALED[kind])
    plain = write_gguf(tmp_path / "plain.gguf", tiny_model("llama"), tiny_tokenizer())
    assert load_lm(str(path)).identity.model_fingerprint == load_lm(str(plain)).identity.model_fingerprint


def test_the_key_of_another_architecture_is_found(tmp_path: Path) -> None:
    path = file(tmp_path, lambda writer: writer.add_rope_scaling_factor(4.0), "qwen2")
    with pytest.raises(UnsupportedModel, match=r"`qwen2\.rope\.scaling\.factor` = 4 scales RoPE"):
        load_lm(str(path))


def test_a_scaled_file_is_not_converted(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="scales RoPE"):
        convert_gguf(file(tmp_path, SCALED["yarn"][0]), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "llama3", "factor": 8.0},
        {"full_attention": {"rope_type": "proportional"}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_what_transformers_has_read_is_not_refused(tmp_path: Path, parameters: dict[str, object]) -> None:
    config = SimpleNamespace(rope_parameters=parameters)
    config.get_text_config = lambda: config
    check_rope(file(tmp_path, SCALED["llama 3"][0]), config)


@pytest.mark.parametrize("kind", ["llama 3", "linear", "yarn"])
def test_without_the_refusal_long_contexts_would_be_those_of_another_model(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails once transformers reads the keys: then the refusal can go."""
    pytest.importorskip("llama_cpp", reason="the extra llamacpp is not installed (make llamacpp)")
    from llamacpp_models import in_huggingface, in_llamacpp

    monkeypatch.setattr(gguf_loading, "check_rope", lambda path, config: None)
    monkeypatch.setattr("knnlm_core.lm.llamacpp.check_probe", lambda lm, path, reading, key_tap: None)
    path = file(tmp_path, SCALED[kind][0])
    ids = [(31 * i) % 400 + 1 for i in range(200)]
    scaled, lm = in_llamacpp(path), in_huggingface(path)
    have, need = (each.encode([ids], [0]).keys[-20:] for each in (scaled, lm))
    assert (have - need).square().mean() > 0.05 * need.var(dim=0).mean()
    scaled.close()
