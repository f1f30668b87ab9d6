"""`knnlm build`: what it prints, and one line with exit code 1 for every kind of bad input."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from small_build import prose, write_jsonl
from typer.testing import CliRunner

from knnlm_builder.settings import BuildSettings
from knnlm_cli.main import make_app
from knnlm_core.datastore import layout
from knnlm_core.datastore.reader import Datastore
from knnlm_core.errors import DatastoreNotFound
from tiny import save_tiny

PAGES = [prose(seed) for seed in range(16)]
SMALL = ("--window", "48", "--stride", "20", "--held-out-fraction", "0.2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "pages.jsonl", PAGES)


class Outcome(NamedTuple):
    exit_code: int
    stderr: str


def knnlm(*arguments: str | Path) -> Outcome:
    """Run the command in this process, errors as the console script prints them."""

    result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(make_app(), [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stderr)


def refused(*arguments: str | Path) -> str:
    """The one line that a refused command prints last."""
    outcome = knnlm("build", *arguments)
    assert outcome.exit_code == 1, outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert outcome.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in outcome.stderr
    return lines[0]


def test_help_shows_every_option_with_its_default() -> None:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(make_app(), ["build", "--help"])
    assert result.exit_code == 0
    text = re.sub(r"[\s│]+", " ", result.stdout)
    for name, field in BuildSettings.model_fields.items():
        option = "--input" if name == "inputs" else "--" + name.replace("_", "-")
        assert f" {option} " in text, option
        assert field.description is not None
        assert field.description in text, option
    assert "(default: 0.05)" in text
    assert "by default half the window" in text


def test_a_build_prints_what_it_did_and_publishes(model: Path, pages: Path, tmp_path: Path) -> None:
    outcome = knnlm("build", "--model", model, "--input", pages, "--output", tmp_path, "--name", "law", *SMALL)
    assert outcome.exit_code == 0, outcome.stderr
    with Datastore.open(tmp_path, "law", checksums=True) as store:
        assert store.manifest.lm.model_name == "tiny"
        lines = re.sub(r"\s+", " ", outcome.stderr)
        assert f"Published law version {store.version}: {store.entries:,} entries" in lines
        assert f"Encode: {store.entries:,} tokens" in lines
        early = store.num_bytes - store.manifest.files[layout.CANARIES].bytes
        assert f"Checksums: {early:,} bytes" in lines
    again = knnlm("build", "--model", model, "--input", pages, "--output", tmp_path, "--name", "law", *SMALL)
    assert again.exit_code == 0
    assert "is published already" in again.stderr


def test_the_console_script_prints_an_error_as_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "knnlm_cli", "build", "--model", "/no/such/model", "--input", ".", "--output"]
    command += [str(tmp_path), "--name", "law"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: there is no model at '/no/such/model': no such folder or file, and not a hub id (model_not_found)"
    )
    assert "Traceback" not in done.stderr


def _file(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return ["--input", str(folder / name)]

    return make


def _empty_folder(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return ["--input", str(folder / "empty")]


BAD_INPUTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing": (lambda folder: ["--input", str(folder / "nowhere.txt")], r"nowhere\.txt' does not exist \(input_not"),
    "binary": (_file("a.txt", b"MZ\x00\x01\xff" * 99), r"a NUL byte, as binary files have, at byte 2 \(unreadable_in"),
    "latin-1": (_file("a.txt", "Fähre".encode("latin-1")), r"invalid UTF-8 \(0xe4\) at byte 1 \(unreadable_input\)"),
    "not gzip": (_file("a.jsonl.gz", b"{}"), r"a\.jsonl\.gz is not gzip, or damaged: .* \(unreadable_input\)"),
    "half a gzip": (
        _file("a.jsonl.gz", gzip.compress(b'{"text": "a b c"}\n' * 999)[:40]),
        r"a\.jsonl\.gz: the gzip stream is truncated \(unreadable_input\)",
    ),
    "not parquet": (
        _file("a.parquet", b"some text"),
        r"a\.parquet is not Parquet, or damaged: .* \(unreadable_input\)",
    ),
    "not JSON": (_file("a.jsonl", b"{oops\n"), r"a\.jsonl, line 1, column 2: not valid JSON: .* \(unreadable_input\)"),
    "no text": (_file("a.jsonl", b'{"id": "x"}\n'), r"a\.jsonl, line 1: field `text` is required \(unreadable_input"),
    "one id twice": (
        _file("a.jsonl", b'{"id": "x", "text": "aa"}\n' * 2),
        r"document id 'x' is given twice: in .*, line 1 and in .*, line 2 \(duplicate_document\)",
    ),
    "nothing in the file": (_file("a.txt", b""), r"nothing to build from in .*1 blank document \(empty_corpus\)"),
    "nothing in the folder": (_empty_folder, r"nothing to build from in .*empty: 0 files read.* \(empty_corpus\)"),
    "a few words": (
        _file("a.txt", b"Too few."),
        r"none for calibration: too few to hold any out; give more text \(empty",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_a_bad_input_is_told_in_one_line_and_leaves_nothing_published(model: Path, tmp_path: Path, kind: str) -> None:
    make, message = BAD_INPUTS[kind]
    line = refused("--model", model, *make(tmp_path), "--output", tmp_path / "stores", "--name", "law", *SMALL)
    assert re.search(message, line), line
    with pytest.raises(DatastoreNotFound):
        Datastore.open(tmp_path / "stores", "law")
    left = [path.name for path in (tmp_path / "stores").rglob("*") if path.is_file()]
    assert left == ([] if kind == "missing" else ["build.lock"])


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "model": (["--model", "no/such-model"], r"model 'no/such-model' cannot be read: .* \(model_not_found\)"),
    "name": (["--name", "Law & Order"], r"`name` of a datastore must be .*; got 'Law & Order' \(invalid_parameter\)"),
    "name with a path": (["--name", "../law"], r"`name` of a datastore must be .*; got '\.\./law' \(invalid_param"),
    "stride ≥ window": (["--stride", "48"], r"`stride` must be .* less than `window` \(48\), got 48 \(invalid_p"),
    "window too long": (["--window", "300"], r"`window` must be at most the model's context of 256 tokens, got 300"),
    "window of one": (["--window", "1"], r"`window`: .* greater than or equal to 2, got 1 \(invalid_parameter\)"),
    "fraction": (["--held-out-fraction", "0.6"], r"`held_out_fraction`: .* 0\.5, got 0\.6 \(invalid_parameter\)"),
    "max tokens": (["--max-tokens", "1"], r"`max_tokens`: .* 2, got 1 \(invalid_parameter\)"),
    "dtype": (["--dtype", "int4"], r"`dtype` must be auto, .*; got 'int4' \(invalid_parameter\)"),
    "device": (["--device", "tpu"], r"`device` must be auto, cpu or cuda\[:N\], got 'tpu' \(invalid_parameter\)"),
    "key tap": (["--key-tap", "attention"], r"`key_tap` must be .*, got 'attention' \(invalid_parameter\)"),
    "seed": (["--seed", "-1"], r"`seed`: .* 0, got -1 \(invalid_parameter\)"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_a_bad_option_is_told_in_one_line_with_limit_and_value(
    model: Path, pages: Path, tmp_path: Path, kind: str
) -> None:
    options, message = BAD_OPTIONS[kind]
    defaults = ["--model", model, "--input", pages, "--output", tmp_path / "stores", "--name", "law", *SMALL]
    line = refused(*defaults, *options)  # the last one given counts
    assert re.search(message, line), line
    assert not (tmp_path / "stores").exists()


def test_a_missing_input_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    line = refused("--model", "/no/such/model", "--input", tmp_path / "no.txt", "--output", tmp_path, "--name", "law")
    assert "no.txt' does not exist (input_not_found)" in line


def test_an_output_that_is_a_file_is_refused(model: Path, pages: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refused("--model", model, "--input", pages, "--output", output, "--name", "law", *SMALL)
        assert re.search(r"`output`: .* cannot be written: .* \(invalid_parameter\)", line), line


def test_a_missing_option_is_wrong_usage(pages: Path) -> None:
    outcome = knnlm("build", "--input", pages)
    assert outcome.exit_code == 2
    assert "Missing option '--model'" in outcome.stderr
