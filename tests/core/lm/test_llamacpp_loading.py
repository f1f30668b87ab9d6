"""Which runtime runs what stands after `--model`, and what each refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from gguf_file import write_gguf

from knnlm_core.errors import InvalidParameter, ModelLoadError, ModelNotFound
from knnlm_core.lm import llamacpp_loading
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.llamacpp import LlamaCppLM
from knnlm_core.lm.llamacpp_context import is_installed, library
from knnlm_core.lm.llamacpp_loading import encode_budget
from knnlm_core.lm.loading import LoadOptions, load_lm
from tiny import save_tiny, tiny_model, tiny_tokenizer

needs_llama_cpp = pytest.mark.skipif(not is_installed(), reason="the extra llamacpp is not installed (make llamacpp)")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny.F32.gguf", tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def load(model: Path | str, **options: Any) -> Any:
    lm = load_lm(str(model), LoadOptions(**options))
    lm.close()
    return lm


@needs_llama_cpp
def test_auto_runs_a_gguf_file_in_llama_cpp_and_says_so(gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        lm = load(gguf, runtime="auto", max_sequences=2)
    assert isinstance(lm, LlamaCppLM)
    assert "runtime chosen runtime=llamacpp because the model is a GGUF file" in caplog.text
    assert "numerics=llama.cpp" in caplog.text


@pytest.mark.parametrize(
    ("installed", "options", "reason"),
    [
        (False, {}, "the extra llamacpp is not installed"),
        (True, {"dtype": "float32"}, "dtype float32 with full weights was asked for"),
        (True, {"weights": "int8"}, "dtype auto with int8 weights was asked for"),
    ],
)
def test_auto_runs_a_gguf_file_in_transformers_otherwise_and_says_why(
    gguf: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, installed: bool,
    options: dict[str, Any], reason: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(llamacpp_loading, "is_installed", lambda: installed)
    with caplog.at_level(logging.INFO):
        assert isinstance(load(gguf, runtime="auto", device="cpu", **options), HuggingFaceLM)
    assert f"runtime chosen runtime=huggingface because {reason}" in caplog.text


def test_auto_runs_a_folder_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert isinstance(load(save_tiny(tmp_path / "tiny"), runtime="auto"), HuggingFaceLM)
    assert "runtime=huggingface because the model is not a GGUF file" in caplog.text


def test_builders_and_scorers_run_a_gguf_file_in_transformers(gguf: Path) -> None:
    assert isinstance(load(gguf), HuggingFaceLM)


@needs_llama_cpp
def test_both_can_be_asked_for_by_name(gguf: Path) -> None:
    assert isinstance(load(gguf, runtime="llamacpp"), LlamaCppLM)
    assert isinstance(load(gguf, runtime="huggingface"), HuggingFaceLM)


def test_a_runtime_that_there_is_not_is_refused(gguf: Path) -> None:
    with pytest.raises(InvalidParameter, match="`runtime` must be auto, huggingface or llamacpp, got 'onnx'"):
        load(gguf, runtime="onnx")


def test_llama_cpp_takes_nothing_but_gguf_files(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(InvalidParameter, match="`runtime` llamacpp runs GGUF files only, got the model"):
        load(folder, runtime="llamacpp")
    with pytest.raises(ModelNotFound, match="no such file"):
        load(tmp_path / "none.gguf", runtime="llamacpp")


@pytest.mark.parametrize(("option", "value"), [("dtype", "float32"), ("dtype", "bfloat16"), ("weights", "int8")])
def test_llama_cpp_takes_weights_as_they_are(gguf: Path, option: str, value: str) -> None:
    with pytest.raises(InvalidParameter, match=f"`{option}` must be .* with the runtime llamacpp, .*; got '{value}'"):
        load(gguf, runtime="llamacpp", **{option: value})


@needs_llama_cpp
def test_a_file_that_llama_cpp_does_not_read_is_told_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more")
    with pytest.raises(ModelLoadError, match=r"broken\.gguf: llama\.cpp does not read it"):
        load(broken, runtime="llamacpp")


def test_without_the_extra_its_name_is_told(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    library.cache_clear()
    with pytest.raises(ModelLoadError, match="the runtime llamacpp needs the extra `llamacpp`"):
        load(gguf, runtime="llamacpp")


@needs_llama_cpp
def test_rows_as_wide_as_the_vocabulary_come_in_smaller_passes(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_loading, "_WIDE_ROW_BYTES", 100 * 4 * 512)
    assert encode_budget(load(gguf, runtime="llamacpp"), 4096) == 100
    assert encode_budget(load(gguf, runtime="llamacpp"), 64) == 64
    assert encode_budget(load(gguf, runtime="huggingface"), 4096) == 4096
