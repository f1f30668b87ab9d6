"""From what stands after `--model` to a running LM, or to one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf

from knnlm_core.errors import InvalidParameter, KnnlmError, ModelLoadError, ModelNotFound
from knnlm_core.lm.gguf import convert_gguf
from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.loading import LoadOptions, load_lm, model_name
from knnlm_core.lm.tokenizer import Tokenizer
from tiny import TEXT, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.randint(1, 400, (50,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "Tiny-Llama.F32.gguf"
    return write_gguf(path, tiny_model("llama"), tiny_tokenizer())


def original() -> HuggingFaceLM:
    return HuggingFaceLM(tiny_model("llama"), Tokenizer(tiny_tokenizer()), name="original")


def assert_equal(have: HuggingFaceLM, need: HuggingFaceLM) -> None:
    one, other = have.encode([IDS], [0]), need.encode([IDS], [0])
    torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(have.logits(one.hidden), need.logits(other.hidden), atol=1e-4, rtol=1e-5)
    assert have.tokenizer.encode(TEXT) == need.tokenizer.encode(TEXT)


def test_a_folder_loads_as_the_model_that_was_saved(folder: Path) -> None:
    lm = load_lm(str(folder))
    assert_equal(lm, original())
    assert lm.identity.model_name == "tiny-llama"
    assert lm.identity.model_fingerprint == original().identity.model_fingerprint
    assert lm.num_sequences == 0


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_weights_are_held_in_the_dtype_asked_for(folder: Path, dtype: str, expected: torch.dtype) -> None:
    lm = load_lm(str(folder), LoadOptions(dtype=dtype, device="cpu", max_sequences=2, max_length=64))
    assert (lm.dtype, lm.num_sequences, lm.max_length) == (expected, 2, 64)


def test_the_model_trains_nothing_and_drops_nothing_out(folder: Path) -> None:
    model = load_lm(str(folder))._model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "name"), [("org/model-7b", "model-7b"), ("here/x.Q4_1.gguf", "x.Q4_1"), ("gpt2", "gpt2")]
)
def test_a_model_is_named_after_its_last_path_component(given: str, name: str) -> None:
    assert model_name(given) == name


def test_a_folder_given_as_a_dot_is_named_after_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert model_name(".") == "tiny-llama"


@pytest.mark.parametrize("hub_id", ["knnlm-tests/there-is-no-such-model", "there-is-no-such-model"])
def test_a_hub_id_that_cannot_be_reached_is_not_found(hub_id: str) -> None:
    with pytest.raises(ModelNotFound, match=f"model '{hub_id}' cannot be read: ") as caught:
        load_lm(hub_id)
    assert caught.value.param == "model"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("model", ["/no/such/folder", "./no such folder", "no-such.gguf", "a/b/c", "~/no/such/one"])
def test_a_path_that_does_not_exist_is_not_found(model: str) -> None:
    with pytest.raises(ModelNotFound, match="no such folder or file, and not a hub id"):
        load_lm(model)


@pytest.mark.parametrize("model", ["", "  "])
def test_nothing_is_no_model(model: str) -> None:
    with pytest.raises(ModelNotFound, match="`model` must be a folder, a hub id or a GGUF file, got"):
        load_lm(model)


def test_a_folder_without_a_configuration_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no model in the folder .*: it has no config\.json"):
        load_lm(str(tmp_path))


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a configuration that is no JSON": (lambda m: (m / "config.json").write_text("{nope"), "not a valid JSON file"),
    "an unknown architecture": (lambda m: _edit(m / "config.json", model_type="nonesuch"), "nonesuch"),
    "no language model": (lambda m: (m / "config.json").write_text('{"model_type": "vit"}'), "AutoModelForCausalLM"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no file named model.safetensors"),
    "half of the weights": (lambda m: _truncate(m / "model.safetensors"), "incomplete metadata"),
    "weights that are none": (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 999), "header"),
    "a layer too few in the weights": (
        lambda m: _edit(m / "config.json", num_hidden_layers=4),
        r"is incomplete: its files lack 9 of the parameters .* \(model\.layers\.3\.input_layernorm\.weight, .*, …\)",
    ),
    "weights of another size": (lambda m: _edit(m / "config.json", intermediate_size=80), "mismatched"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer of model"),
    "a tokenizer that is no JSON": (lambda m: _truncate(m / "tokenizer.json"), "tokenizer of model"),
    "a tokenizer of other fields": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer of model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_there_but_do_not_load_are_told_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    act, message = DAMAGES[damage]
    act(broken)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_lm(str(broken))
    assert "broken" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoadOptions(dtype="int8"), "`dtype` must be auto, float32, bfloat16, float16; got 'int8'"),
        (LoadOptions(device="tpu"), r"`device` must be auto, cpu or cuda\[:N\], got 'tpu'"),
        (LoadOptions(device="meta"), r"`device` must be auto, cpu or cuda\[:N\], got 'meta'"),
        (LoadOptions(device="cuda:x"), r"`device` must be auto, cpu or cuda\[:N\], got 'cuda:x'"),
        (LoadOptions(device="cuda:99"), r"`device` is 'cuda:99', but torch finds \d+ CUDA devices here"),
        (LoadOptions(key_tap="attention"), "`key_tap` must be 'ffn_input' or 'final_hidden', got 'attention'"),
        (LoadOptions(max_length=257), r"`max_model_len` must be in 2 … 256 \(the model's context\), got 257"),
        (LoadOptions(max_length=1), r"`max_model_len` must be in 2 … 256 \(the model's context\), got 1"),
        (
            LoadOptions(max_sequences=1, kv_cache_bytes=1000),
            "`kv_cache_bytes` must be at least 197376 for one sequence of 256 tokens, got 1000",
        ),
    ],
)
def test_options_outside_their_limits_are_refused(folder: Path, options: LoadOptions, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        load_lm(str(folder), options)


# -- GGUF ------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_loads_as_the_model_that_it_was_made_from(gguf: Path) -> None:
    lm = load_lm(str(gguf))
    assert_equal(lm, original())
    assert lm.identity.model_name == "Tiny-Llama.F32"
    assert lm.tokenizer.bos_token_ids == ()
    assert lm.tokenizer.eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"GGUF", r"is a file but not a \.gguf; give a folder, a hub id or a GGUF file"),
        ("text.gguf", b"some text", "is not a GGUF file: it does not start with the bytes 'GGUF'"),
        ("empty.gguf", b"", "is not a GGUF file"),
        ("zeros.gguf", b"GGUF" + bytes(60), r"zeros\.gguf: "),
    ],
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_lm(str(tmp_path / name))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_gguf_is_refused(gguf: Path, tmp_path: Path, part: float) -> None:
    data = gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        load_lm(str(cut))


def test_a_gguf_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    del model.model.layers[1].mlp.up_proj.weight
    path = write_gguf(tmp_path / "less.gguf", model, tiny_tokenizer())
    with pytest.raises(ModelLoadError, match=r"lack 1 of the parameters .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_lm(str(path))


def test_a_converted_gguf_is_the_same_model_readable_by_everybody(gguf: Path, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        convert_gguf(gguf, tmp_path / "new" / "converted")
    finally:
        os.umask(mask)
    converted = tmp_path / "new" / "converted"
    assert load_lm(str(converted)).identity.model_fingerprint == load_lm(str(gguf)).identity.model_fingerprint
    assert_equal(load_lm(str(converted)), original())
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in converted.iterdir()} == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "0o644",
    )
    assert oct(converted.stat().st_mode & 0o777) == "0o755"
    assert [path.name for path in converted.parent.iterdir() if not path.name.startswith(".")] == ["converted"]
    assert not list(converted.parent.glob("*.part"))


KILLED_BETWEEN_WEIGHTS_AND_TOKENIZER = """
import os, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerBase
from knnlm_core.lm.gguf import convert_gguf
PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_conversion_killed_in_the_middle_leaves_no_folder_and_the_next_one_completes(
    gguf: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "converted"
    command = [sys.executable, "-c", KILLED_BETWEEN_WEIGHTS_AND_TOKENIZER, str(gguf), str(folder)]
    killed = subprocess.run(command, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list(tmp_path.rglob("model.safetensors"))  # it had come that far
    assert not folder.exists()
    convert_gguf(gguf, folder)
    assert_equal(load_lm(str(folder)), original())
    assert [path.parent for path in tmp_path.rglob("model.safetensors")] == [folder]


def test_conversions_at_once_end_in_one_whole_folder(gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    errors: list[BaseException] = []
    begin = threading.Barrier(3)

    def convert() -> None:
        begin.wait()
        try:
            convert_gguf(gguf, folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=convert) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_equal(load_lm(str(folder)), original())


def test_a_converted_folder_is_left_as_it_is(gguf: Path, tmp_path: Path) -> None:
    convert_gguf(gguf, tmp_path / "converted")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "converted").iterdir()}
    convert_gguf(gguf, tmp_path / "converted")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "converted").iterdir()} == before


def test_a_folder_of_other_things_is_not_overwritten(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelLoadError, match=r"converted cannot be made: .*; remove what is there"):
        convert_gguf(gguf, tmp_path / "converted")
    assert (tmp_path / "converted" / "thesis.tex").read_text() == "years of work"


def test_a_file_that_does_not_convert_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(KnnlmError):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out" / "converted")
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")] == []
