"""Every command of README.md and docs/*.md is run as it stands, or stands in a table with the reason why not.

Per page, in order, in a folder that has what the pages take for granted: a language model, texts, datastores built by
README's own command. `knnlm serve` goes into the background and is awaited; a page that asks a server without starting
one finds README's. Free ports stand for those that pages name, and `knnlm` is the real one without its imports.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from doc_exceptions import ANNOUNCED, NOT_RUN, OLDER_VERSION_OF_LAW, announced_error, reason_not_to_run
from doc_stage import ROOT, USUAL_SERVER, PageShell, copy_stage, furnish, warm_programs
from markdown_commands import PROGRAMS, Command, commands, output_lines, pages

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages(ROOT)}
TOLD = {page: list(commands(text)) for page, text in PAGES.items()}
BUILD = next(command.text for command in TOLD["README.md"] if command.text.startswith("knnlm build "))


class Stage(NamedTuple):
    """Where pages are tried."""

    folder: Path
    programs: Path
    older_version: str  # of `law`, which has two

    def shell(self, page: str) -> PageShell:
        """A shell in a folder of the page's own."""
        return PageShell(copy_stage(self.folder / "made", self.folder / page.replace("/", "-")), self.programs)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("docs")
    made = folder / "made"
    made.mkdir()
    furnish(made)
    law = BUILD.replace("--name manuals", "--name law")
    with warm_programs(folder / "bin") as programs:
        with PageShell(made, programs) as shell:
            for build in (BUILD, f"{law} --input chapter.md", law):
                done = shell.run(build)
                assert done.status == 0, f"{build}\n{done.err}"
        history = json.loads((made / "datastores" / "law" / "HISTORY").read_text())
        yield Stage(folder, programs, history[0]["version"])


def run_page(page: str, shell: PageShell, older_version: str) -> None:
    for told in TOLD[page]:
        command = told._replace(text=told.text.replace(OLDER_VERSION_OF_LAW, older_version))
        where = f"{page}:{command.line}: {command.text}"
        if reason_not_to_run(page, command.text):
            continue
        if asks_server(command.text) and not shell.has_server():
            shell.start(USUAL_SERVER)
        if command.program == "knnlm" and is_server(command.text):
            shell.start(without_comment(command.text))
            continue
        done = shell.run_python(command.text) if command.language == "python" else shell.run(command.text)
        found = f"{where}\nstatus {done.status}\n{done.out[-3000:]}\n{done.err[-3000:]}"
        error = announced_error(page, command.text)
        assert done.status == 0 or (error is not None and error in done.err), found
        assert error_code(done.out) == (error if "curl" in command.text else None), found


def asks_server(text: str) -> bool:
    return "localhost:8000" in text or "127.0.0.1:8000" in text


def is_server(text: str) -> bool:
    words = text.split()
    verb = words[words.index("knnlm") + 1]
    return verb in ("serve", "playground") and not {"--help", "-h"} & set(words)


def without_comment(text: str) -> str:
    lines = (line.partition(" #")[0].rstrip() for line in text.splitlines())
    return "\n".join(lines)


def error_code(out: str) -> str | None:
    """The code of an error's body, or of an event that is one; None for answers."""
    for line in (out, *out.splitlines()):
        try:
            body = json.loads(line.removeprefix("data: "))
        except ValueError:
            continue
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            return str(body["error"].get("code"))
    return None


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, told in TOLD.items() if told])
def test_the_commands_of_the_page_work(page: str, stage: Stage) -> None:
    if all(reason_not_to_run(page, command.text) for command in TOLD[page]):
        pytest.skip("nothing on the page is run")
    with stage.shell(page) as shell:
        run_page(page, shell, stage.older_version)


@pytest.mark.parametrize("page", PAGES)
def test_every_line_among_commands_is_a_command_that_is_known(page: str) -> None:
    unknown = [
        f"{page}:{command.line}: {command.text}"
        for command in TOLD[page]
        if command.language == "shell" and command.program and command.program not in PROGRAMS
    ]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_a_block_of_another_language(page: str) -> None:
    if page == "docs/cli.md":  # nothing but what --help prints
        return
    hidden = [
        f"{page}:{number}: {line}"
        for number, line in output_lines(PAGES[page])
        if line.startswith(("curl ", "pip ", "docker ", "make ", "lm_eval ")) or is_knnlm(line)
    ]
    assert not hidden, "\n".join(hidden)


def is_knnlm(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and words[0] == "knnlm" and words[1] != "listens"


def test_no_reason_not_to_run_is_without_a_command() -> None:
    told = [(page, command.text) for page, found in TOLD.items() for command in found]
    idle = [entry for entry in NOT_RUN if not any(entry.holds(*one) for one in told)]
    assert not idle


@pytest.mark.parametrize("entry", ANNOUNCED, ids=lambda entry: entry.code)
def test_an_error_that_a_command_gets_is_announced_on_its_page(entry: tuple[str, str, str]) -> None:
    page, begins, code = entry
    assert code in PAGES[page]
    assert any(command.text.startswith(begins) for command in TOLD[page])


# -- the parser itself -------------------------------------------------------------------------------------------------


PAGE = """# A page

    knnlm build --model M \\
      --name a     # comment, don't count
    curl localhost:8000/v1/x -d '{
      "a": 1}'

    no command at all

```python
print("x")
```

```json
{"knnlm": 1}
```

    MODEL=$(knnlm model)
    A=1 knnlm serve
"""


def test_the_parser_finds_statements_whole_and_nothing_else() -> None:
    assert [(c.line, c.language, c.program) for c in commands(PAGE)] == [
        (3, "shell", "knnlm"),
        (5, "shell", "curl"),
        (8, "shell", "no"),
        (11, "python", "python"),
        (18, "shell", ""),
        (19, "shell", "knnlm"),
    ]


def test_the_programs_that_are_run_are_told_from_outputs() -> None:
    assert list(commands("    a  b\n    c\n")) == []
    command = next(commands("    curl x\n"))
    assert isinstance(command, Command)
    assert command.program == "curl"
