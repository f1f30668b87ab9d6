"""What is known of a GGUF file is found out once, kept by the file's content, and never believed when damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf

from knnlm_core.errors import ModelLoadError
from knnlm_core.lm import gguf_identity
from knnlm_core.lm.gguf_identity import probe_ids, read_gguf, user_cache
from knnlm_core.lm.loading import load_lm
from tiny import TEXT, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny.F32.gguf", tiny_model("llama"), tiny_tokenizer())


@pytest.fixture
def never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> None:
        raise AssertionError("transformers reads the file again")

    monkeypatch.setattr(gguf_identity, "_read", read)


def kept(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def test_a_reading_is_what_the_hugging_face_runtime_finds(gguf: Path, tmp_path: Path) -> None:
    reading, lm = read_gguf(gguf, tmp_path), load_lm(str(gguf))
    assert reading.facts.identity(gguf.stem, "ffn_input") == lm.identity
    assert reading.facts.context_length == lm.max_length
    rows = lm.encode([probe_ids(512)], [0])
    torch.testing.assert_close(reading.probe["ffn_input"], rows.keys)
    torch.testing.assert_close(reading.probe["final_hidden"], rows.hidden)
    torch.testing.assert_close(reading.logits, lm.logits(rows.hidden)[: len(reading.logits)])


def test_it_is_read_once(gguf: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = read_gguf(gguf, tmp_path)
    request.getfixturevalue("never_again")
    copy = tmp_path / "another name.gguf"
    copy.write_bytes(gguf.read_bytes())
    second = read_gguf(copy, tmp_path)
    assert second.facts == first.facts
    assert {tap: keys.tolist() for tap, keys in second.probe.items()} == {
        tap: keys.tolist() for tap, keys in first.probe.items()
    }
    assert second.logits.tolist() == first.logits.tolist()
    assert second.tokenizer.encode(TEXT) == first.tokenizer.encode(TEXT)


def test_another_content_is_another_model(gguf: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / gguf.name, tiny_model("llama", seed=1), tiny_tokenizer())
    one, two = read_gguf(gguf, tmp_path / "c").facts, read_gguf(other, tmp_path / "c").facts
    assert one.model_fingerprint != two.model_fingerprint
    assert one.tokenizer_fingerprint == two.tokenizer_fingerprint


@pytest.mark.parametrize("name", ["identity.json", "probe.npz", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_damaged_reading_is_made_anew(
    gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    first = read_gguf(gguf, tmp_path)
    file = kept(tmp_path) / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:30])
    with caplog.at_level(logging.WARNING):
        assert read_gguf(gguf, tmp_path).facts == first.facts
    assert "gguf reading is damaged and made anew" in caplog.text
    assert file.is_file()


def test_another_models_tokenizer_is_not_believed(gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = read_gguf(gguf, tmp_path)
    tiny_tokenizer(400).save_pretrained(kept(tmp_path) / "tokenizer")
    with caplog.at_level(logging.WARNING):
        assert read_gguf(gguf, tmp_path).facts == first.facts
    assert "its tokenizer has the fingerprint" in caplog.text


def test_what_cannot_be_kept_is_found_all_the_same(
    gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with caplog.at_level(logging.WARNING):
        assert read_gguf(gguf, in_the_way).facts == read_gguf(gguf, tmp_path).facts
    assert "gguf reading cannot be kept" in caplog.text


def test_a_failure_keeps_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more")
    with pytest.raises(ModelLoadError):
        read_gguf(broken, tmp_path / "c")
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()]


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "knnlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache() == tmp_path / "home" / ".cache" / "knnlm"
