"""`knnlm demo` as its users run it: a process that builds, serves, shows and leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from knnlm_cli.default_model import DEFAULT_MODEL
from knnlm_cli.demo import PROMPT_WORDS
from knnlm_core.datastore import layout
from tiny import TEXT, save_tiny

pytestmark = pytest.mark.slow

PATIENCE_S = 120
MAX_TOKENS = 2000
DOCUMENTS = 24
SENTENCES = 10
WHO = ("The tenant", "A buyer", "Der Käufer", "The court", "An owner", "The café’s landlord", "This index", "No server")
DOES = ("looks for", "returns", "must keep", "enthält", "has lost", "can sell", "never holds", "shall predict")
WHAT = ("a written notice", "its own key", "the next value", "half of the entries", "every token", "the whole model")
WHEN = ("before the search", "after two weeks", "in naïve prose", "for lack of text", "like a query", "as it came")


class Run(NamedTuple):
    """A demo that has ended."""

    status: int
    output: str  # stdout and stderr, as a terminal shows them
    port: int
    left: list[str]  # command lines of processes that outlive it


def write_documents(path: Path) -> None:
    """Documents of real sentences, varied enough that none nearly contains another, with brackets in their ids."""
    draw = random.Random(0)
    known = [sentence for line in TEXT.splitlines() for sentence in line.split(". ")]
    with path.open("w", encoding="utf-8") as file:
        for i in range(DOCUMENTS):
            said = [" ".join(map(draw.choice, (WHO, DOES, WHAT, WHEN))) for _ in range(SENTENCES)]
            text = ". ".join([f"Number {i}", draw.choice(known), *said])
            row = {"id": f"[/{i}]", "title": f"Document № {i}", "text": f"{text}."}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def texts(folder: Path) -> dict[str, str]:
    """Document id → text."""
    lines = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["text"] for row in map(json.loads, lines)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the default model's folder, with a tiny LM in it, and the text."""
    folder = tmp_path_factory.mktemp("demo")
    save_tiny(folder / "models" / DEFAULT_MODEL)
    write_documents(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[[], Run]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "120"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")  # where the server remembers what it has verified

    def run() -> Run:
        port = free_port()
        paths = [f"--models={folder / 'models'}", f"--folder={folder / 'made'}", f"--text={folder / 'text.jsonl'}"]
        limits = [f"--port={port}", f"--max-tokens={MAX_TOKENS}", "--exit"]
        process = subprocess.Popen(
            [sys.executable, "-m", "knnlm_cli", "demo", *paths, *limits],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # so that what it leaves behind can be told from other processes
        )
        try:
            output, _ = process.communicate(timeout=PATIENCE_S)
            left = [" ".join(child.cmdline()) for child in session(process.pid)]
        finally:
            for child in session(process.pid):
                child.kill()
            process.kill()
            process.wait()
        return Run(process.returncode, output, port, left)

    return run


def session(leader: int) -> list[psutil.Process]:
    """Processes of the leader's session, without itself."""
    others = (process for process in psutil.process_iter() if process.pid != leader)
    return [process for process in others if _session_of(process.pid) == leader]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended, or is none of ours
        return None


@pytest.fixture(scope="module")
def first(run: Callable[[], Run]) -> Run:
    return run()


def rows(output: str, title: str) -> list[list[str]]:
    """The cells of the table that follows a title, a list per printed line."""
    lines = output[output.index(title) :].splitlines()[1:]
    table = []
    for line in lines:
        if not line or line[0] not in "┏┡├└│┃╇╈":
            break
        if line[0] in "│┃":
            table.append([cell.strip() for cell in re.split("[│┃]", line)[1:-1]])
    return table


def held_out_document(run: Run) -> str:
    """The id of the document whose perplexity was measured."""
    found = re.search(r"A passage that the datastore has not seen: (\[/\d+\](#tail)?)\n", run.output)
    assert found, run.output
    return found[1]


def test_the_demo_builds_serves_and_ends_well(first: Run, folder: Path) -> None:
    assert first.status == 0, first.output
    assert "Traceback" not in first.output
    version = layout.read_current(folder / "made" / "datastores", "demo").version
    assert f"Published demo version {version}" in first.output
    assert "GET /" not in first.output, "the server's log belongs into its file"
    assert "ready model=" in (folder / "made" / "server.log").read_text(encoding="utf-8")


def test_the_demo_shows_both_completions_of_the_same_prompt(first: Run, folder: Path) -> None:
    head, *lines = rows(first.output, "The same prompt, completed greedily")
    assert head == ["base LM", "kNN-LM: the same LM with the datastore"]
    base, mixed = (" ".join(line[column] for line in lines) for column in (0, 1))
    words = [completion.split()[:PROMPT_WORDS] for completion in (base, mixed)]
    assert words[0] == words[1]
    assert " ".join(words[0]) in texts(folder)[held_out_document(first).removesuffix("#tail")]
    assert base != mixed
    assert min(len(base.split()), len(mixed.split())) > PROMPT_WORDS


def test_the_demo_shows_where_tokens_came_from(first: Run) -> None:
    head, *lines = rows(first.output, "Where the kNN-LM's tokens came from")
    assert head == ["tokens", "document", "p_lm → p"]
    assert any(re.fullmatch(r"Document № \d+", document) for _, document, _ in lines), lines
    assert all(re.fullmatch(r"[01]\.\d\d → [01]\.\d\d|", change) for _, _, change in lines), lines


def test_the_demo_shows_that_the_datastore_lowers_the_perplexity(first: Run) -> None:
    passage = held_out_document(first)
    _, base, mixed = rows(first.output, passage)
    assert [base[0], mixed[0]] == ["base LM", "kNN-LM"]
    assert float(base[1]) > float(mixed[1]) > 1
    assert float(base[2]) > float(mixed[2]) > 0
    scored = re.search(r"(\d+) tokens scored, (\d+) of them with a search", first.output)
    assert scored, first.output
    assert int(scored[1]) == int(scored[2]) > 0


def test_the_demo_leaves_no_server_behind(first: Run) -> None:
    assert first.left == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", first.port)) != 0


def test_a_second_demo_uses_what_the_first_has_published(first: Run, run: Callable[[], Run], folder: Path) -> None:
    version = layout.read_current(folder / "made" / "datastores", "demo").version
    second = run()
    assert second.status == 0, second.output
    assert f"demo version {version} is published already" in second.output
    assert "Published demo version" not in second.output
    assert layout.published_versions(folder / "made" / "datastores", "demo") == [version]
    assert second.left == []
    shown = "The same prompt, completed greedily"
    assert second.output[second.output.index(shown) :] == first.output[first.output.index(shown) :]
