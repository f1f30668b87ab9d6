"""What every command's help says, that its examples are true, and how wrong usage is told."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from knnlm_builder.settings import BuildSettings, CalibrateSettings
from knnlm_cli import score
from knnlm_cli.main import make_app
from knnlm_cli.score_settings import ScoreSettings
from knnlm_server.settings import ServerSettings


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that is ours, by its words."""
    root = typer.main.get_command(make_app())
    yield "knnlm", root
    for name, command in root.commands.items():
        if (command.callback or command).__module__.startswith(("knnlm_", "typer")):
            yield f"knnlm {name}", command
            for below, nested in getattr(command, "commands", {}).items():
                yield f"knnlm {name} {below}", nested


COMMANDS = dict(commands())
EXAMPLES = [
    line.strip() for command in COMMANDS.values() for line in (command.epilog or "").splitlines()[1:] if line.strip()
]


def run(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    environment |= {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "knnlm_cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_first_sentence_says_what_it_does(words: str) -> None:
    first = COMMANDS[words].help.split("\n\n")[0]
    assert re.match(r"[A-Z][a-z]+ ", first)
    assert first.endswith(".")
    assert not first.startswith("Not available")


@pytest.mark.parametrize("words", COMMANDS)
def test_there_are_examples_of_the_command_itself(words: str) -> None:
    epilog = COMMANDS[words].epilog
    assert epilog is not None
    assert epilog.startswith("Examples:\n")
    assert words in epilog


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_command_line_of_an_example_is_understood(example: str) -> None:
    line = re.split(r" \||  ", example)[0]
    words = shlex.split(re.sub(r"\$\([^)]*\)", "x", line))
    words = words[next(i for i, word in enumerate(words) if word == "knnlm") + 1 :]
    command, context = COMMANDS["knnlm"], None
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    if words in (["COMMAND", "--help"], ["--help"]):
        return
    context = command.make_context(command.name, list(words))
    assert context.args == []


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_is_explained(words: str) -> None:
    named = [parameter for parameter in COMMANDS[words].params if parameter.name != "help"]
    assert [parameter.name for parameter in named if not (parameter.help or "").strip()] == []


@pytest.mark.parametrize("words", ["knnlm serve", "knnlm build", "knnlm calibrate", "knnlm score"])
def test_settings_stand_in_panels(words: str) -> None:
    options = [each for each in COMMANDS[words].params if each.param_type_name == "option"]
    assert [each.name for each in options if each.rich_help_panel is None] == []


@pytest.mark.parametrize(
    ("words", "settings"),
    [("knnlm serve", ServerSettings), ("knnlm build", BuildSettings), ("knnlm calibrate", CalibrateSettings)],
)
def test_defaults_and_units_are_told(words: str, settings: Any) -> None:
    told = {each.name: each.help for each in COMMANDS[words].params if each.name in settings.model_fields}
    assert told.keys() == settings.model_fields.keys()
    for name, info in settings.model_fields.items():
        if info.default not in (None, ()) and info.default is not False and not info.is_required():
            assert "(default: " in told[name], name
        if name.endswith("_bytes"):
            assert "bytes" in told[name], name
        if name.endswith("_s"):
            assert "econds" in told[name], name
        if name.endswith("_ms"):
            assert "illiseconds" in told[name], name


def test_sizes_are_told_in_bytes_and_for_people() -> None:
    told = {each.name: each.help for each in COMMANDS["knnlm serve"].params}
    assert "(default: 4294967296, 4 GiB)" in told["kv_cache_bytes"]


def test_every_setting_of_scoring_is_an_option() -> None:
    assert {each.name for each in COMMANDS["knnlm score"].params} - {"json_"} == ScoreSettings.model_fields.keys()
    listed = {field for fields in score._PANELS.values() for field in fields}
    assert listed - {"json"} == ScoreSettings.model_fields.keys() - {"files"}


@pytest.mark.parametrize("words", ["knnlm", "knnlm serve", "knnlm datastore purge", "knnlm doctor"])
def test_help_shows_all_of_it_on_a_narrow_terminal(words: str) -> None:
    done = run(*words.split()[1:], "--help", columns=80)
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    shown = "".join(done.stdout.split())
    for text in (COMMANDS[words].help, COMMANDS[words].epilog):
        assert "".join(text.split()) in shown  # nothing was taken for markup


def test_commands_are_grouped() -> None:
    shown = run("--help").stdout
    places = [shown.index(name) for name in ("─ Make datastores ─", "│ build ", "─ Use them ─", "│ serve ")]
    assert places == sorted(places)
    assert places[-1] < shown.index("─ Begin and check ─") < shown.index("│ doctor ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("serv",), "No such command 'serv'. Did you mean 'serve'? See `knnlm --help`"),
        (("datastore", "lst"), "No such command 'lst'. Did you mean 'list'? See `knnlm datastore --help`"),
        (("serve", "--prot", "1"), "--port). See `knnlm serve --help`"),
        (("build",), "Missing option '--model'. See `knnlm build --help`"),
        (("serve", "--port", "many"), "See `knnlm serve --help`"),
        (("model", "--folder"), "requires an argument. See `knnlm"),
        (("--verzion",), "See `knnlm --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_that_says_where_to_read_on(arguments: tuple[str, ...], told: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(" (usage)\n")
    assert told in done.stderr


def test_a_command_without_arguments_shows_its_help() -> None:
    done = run("datastore")
    assert done.returncode == 2
    assert "─ Commands ─" in done.stdout
    assert done.stderr == ""


def run_with(body: str) -> subprocess.CompletedProcess[str]:
    """`knnlm act` in a process of its own, where one more command has this body."""
    program = (
        "import errno, typer\nfrom knnlm_cli import main\n"
        f"def act() -> None:\n    {body}\n"
        "root = typer.main.get_command(main.make_app())\n"
        "app = typer.Typer()\napp.command('act')(act)\napp.callback()(lambda: None)\n"
        "root.commands['act'] = typer.main.get_command(app).commands['act']\n"
        "root.main(prog_name='knnlm')\n"
    )
    return subprocess.run([sys.executable, "-c", program, "act"], capture_output=True, text=True, timeout=60)


def test_what_the_system_refuses_is_one_line_with_the_file() -> None:
    done = run_with("open('/nowhere/at/all')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: /nowhere/at/all: No such file or directory; `knnlm --debug …` shows where (system_error)\n"
    )


def test_a_question_that_is_answered_with_no_is_told_as_that() -> None:
    done = run_with("raise typer.Abort")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the question was not answered with yes, so nothing was done (aborted)\n"
