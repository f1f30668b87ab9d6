"""The parts of the demo that need no model: ports, child processes, which text is shown and whose tokens they are."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from knnlm_cli.demo import PASSAGE_CHARACTERS, first_paragraphs, first_words, held_out_passage, reported_documents
from knnlm_cli.demo_report import LM_ALONE, document_of, print_sources, sources
from knnlm_cli.demo_server import _stopped_at_the_end, check_port_is_free, run_knnlm, running_server
from knnlm_client import Client, TraceEntry, TraceNeighbor
from knnlm_core.datastore.layout import Current, write_current
from knnlm_core.errors import BuildError, DatastoreCorrupt, InvalidParameter, NotReady


def test_a_port_in_use_is_named_and_a_free_one_passes() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidParameter, match=rf"`port` {port} on 127\.0\.0\.1 .*in use.*--port"):
            check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(InvalidParameter, match=r"192\.0\.2\.1"):  # reserved for documentation
        check_port_is_free("192.0.2.1", 8000)


def test_a_step_that_fails_stops_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BuildError, match="`knnlm model` ended with exit code 2"):
        run_knnlm(["model", "--no-such-option"])
    assert "--no-such-option" in capfd.readouterr().err  # the step's own words are visible


def test_settings_of_another_server_do_not_reach_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KNNLM_API_KEY", "of another server")
    written = tmp_path / "environment"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, pathlib\npathlib.Path({str(written)!r}).write_text('\\n'.join(os.environ))\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run_knnlm(["--version"])
    names = written.read_text(encoding="utf-8").splitlines()
    assert "PATH" in names
    assert not [name for name in names if name.startswith("KNNLM_")]


def test_a_server_that_ends_early_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "demo" / "server.log"
    with (
        Client("http://127.0.0.1:9") as client,
        pytest.raises(NotReady, match=r"(?s)exit code [12]; .*server\.log ends with:\n.+"),
        running_server(["--no-such-option"], client=client, log=log),
    ):
        pytest.fail("the block must not run")
    assert log.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, None])
def test_a_child_does_not_outlive_its_block(error: type[BaseException] | None) -> None:
    program = "import time; print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with suppress(KeyboardInterrupt, SystemExit), _stopped_at_the_end(process):
            if error is not None:
                raise error
        assert process.poll() == -signal.SIGTERM


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 60))
def test_first_paragraphs_are_a_beginning_within_the_limit(text: str, limit: int) -> None:
    beginning = first_paragraphs(text, limit)
    stripped = text.strip()
    assert stripped.startswith(beginning)
    assert len(beginning) <= limit
    assert bool(beginning) == bool(stripped)
    assert beginning == beginning.strip()


def test_first_paragraphs_end_with_a_paragraph() -> None:
    assert first_paragraphs("one\n\ntwo\n\nthree", 10) == "one\n\ntwo"
    assert first_paragraphs("one\n\ntwo\n\nthree", 8) == "one\n\ntwo"
    assert first_paragraphs("one\n\ntwo\n\nthree", 7) == "one"
    assert first_paragraphs("a paragraph without end", 11) == "a paragraph"


def test_first_words_are_joined_by_single_spaces() -> None:
    assert first_words("  The\nwith   statement wraps", 3) == "The with statement"
    assert first_words("short", 3) == "short"


def publish_held_out(root: Path, rows: dict[str, str]) -> None:
    version = "0123456789abcdef"
    folder = root / "demo" / version
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": list(rows), "text": list(rows.values())}), folder / "held_out.parquet")
    write_current(root, "demo", Current(version, None))


def test_the_passage_is_the_beginning_of_a_held_out_document(tmp_path: Path) -> None:
    publish_held_out(tmp_path, {"empty": " \n", "long": "word\n\n" * 2000, "short": "a short one"})
    assert held_out_passage(tmp_path, "demo") == ("long", ("word\n\n" * (PASSAGE_CHARACTERS // 6)).strip())
    assert held_out_passage(tmp_path, "demo", ["short", "absent"]) == ("short", "a short one")
    assert held_out_passage(tmp_path, "demo", ["empty"]).document_id == "long"


def test_a_datastore_without_held_out_text_is_refused(tmp_path: Path) -> None:
    publish_held_out(tmp_path, {"empty": ""})
    with pytest.raises(DatastoreCorrupt, match=r"holds no text: 1 documents"):
        held_out_passage(tmp_path, "demo")
    (tmp_path / "demo" / "0123456789abcdef" / "held_out.parquet").unlink()
    with pytest.raises(DatastoreCorrupt, match="is missing"):
        held_out_passage(tmp_path, "demo")


def test_documents_that_the_calibration_was_judged_on_are_read_from_its_report() -> None:
    assert reported_documents({"report": {"held_out_documents": ["a", "b"]}}) == ["a", "b"]
    assert reported_documents({"report": {}}) == reported_documents({}) == reported_documents(None) == []


def entry(token: str, *neighbors: TraceNeighbor, p_lm: float = 0.25, p: float = 0.5) -> TraceEntry:
    return TraceEntry(
        token_id=1, token=token, searched=True, decision="searched", lmbda=0.3, p_lm=p_lm, p=p, neighbors=[*neighbors]
    )


def neighbor(document: str, token: str, weight: float) -> TraceNeighbor:
    return TraceNeighbor(entry_id=7, distance=1.0, weight=weight, token=token, document_id=document)


def test_the_document_with_most_weight_on_this_token_speaks_for_it() -> None:
    shown = entry(
        " with",
        neighbor("other token", " try", 0.5),
        neighbor("nearest", " with", 0.2),
        neighbor("twice", " with", 0.15),
        neighbor("twice", " with", 0.15),
    )
    assert document_of(shown) == "twice"


def test_a_token_that_no_neighbour_holds_is_the_language_models_own() -> None:
    assert document_of(entry(" with", neighbor("other token", " try", 1.0))) == LM_ALONE
    assert document_of(entry(" with")) == LM_ALONE


def test_consecutive_tokens_of_one_document_become_one_row() -> None:
    trace = [
        entry(" a", neighbor("x", " a", 0.6), p_lm=0.1, p=0.4),
        entry(" context", neighbor("x", " context", 0.6), p_lm=0.4, p=0.9),
        entry(" manager"),
        entry(".", neighbor("x", ".", 0.6), p_lm=0.0, p=0.3),
    ]
    rows = sources(trace)
    assert [(row.text, row.document) for row in rows] == [(" a context", "x"), (" manager", LM_ALONE), (".", "x")]
    assert rows[0].p_lm == pytest.approx(0.2)
    assert rows[0].p == pytest.approx(0.6)
    assert rows[2].p_lm == 0.0


def test_brackets_in_tokens_and_titles_are_text_not_markup() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_sources(console, [entry("[bold]x[/red]", neighbor("[link=y]Title[/link]", "[bold]x[/red]", 1.0))])
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "[bold]x[/red]" in printed
    assert "[link=y]Title[/link]" in printed
