"""The `knnlm` command: subcommands from entry points, one-line errors, exit codes, what importing it costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from knnlm_core import __version__

ROOT = Path(__file__).parents[2]

PLUGIN = '''
import time
import typer
from knnlm_core.errors import InvalidParameter

def fine(times: int = 1) -> None:
    """Say hello."""
    for _ in range(times):
        print("hello " + "x" * 60)

def refuse() -> None:
    """Refuse."""
    raise InvalidParameter("`k` must be at most 1024, got 9000", param="k")

def defect() -> None:
    """Fail."""
    raise ZeroDivisionError("a defect")

def sleep() -> None:
    """Sleep."""
    print("asleep", flush=True)
    time.sleep(60)

group = typer.Typer(help="Several commands.")

@group.command()
def one() -> None:
    """The first."""
    print("one")

@group.command()
def two() -> None:
    """The second."""
    raise InvalidParameter("two is refused")

number = 7
'''

ENTRY_POINTS = """
[knnlm.commands]
fine = knnlm_test_plugin:fine
refuse = knnlm_test_plugin:refuse
defect = knnlm_test_plugin:defect
sleep = knnlm_test_plugin:sleep
group = knnlm_test_plugin:group
number = knnlm_test_plugin:number
absent = knnlm_test_absent:run
broken = knnlm_test_broken:run
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that sees one more installed distribution, with commands of every kind."""
    site = tmp_path_factory.mktemp("site")
    (site / "knnlm_test_plugin.py").write_text(PLUGIN, encoding="utf-8")
    (site / "knnlm_test_broken.py").write_text("raise RuntimeError('no driver here')\n", encoding="utf-8")
    metadata = site / "knnlm_test_plugin-2.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: knnlm-test-plugin\nVersion: 2.5\n", encoding="utf-8"
    )
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH", "")
    inherited_environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return inherited_environment | {"PYTHONPATH": f"{site}{os.pathsep}{inherited}", "COLUMNS": "120", "NO_COLOR": "1"}


def knnlm(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "knnlm_cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_version_is_the_packages_version(environment: dict[str, str]) -> None:
    result = knnlm(environment, "--version")
    assert (result.returncode, result.stdout) == (0, f"knnlm {__version__}\n")


def test_help_lists_every_declared_subcommand(environment: dict[str, str]) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    result = knnlm(environment, "--help")
    assert result.returncode == 0
    first_words = {line.strip("│ ").partition(" ")[0] for line in result.stdout.splitlines()}
    assert first_words >= declared["knnlm.commands"].keys() | {"fine", "group"}
    assert "Not available" not in "\n".join(
        line for line in result.stdout.splitlines() if line.strip("│ ").partition(" ")[0] in declared["knnlm.commands"]
    )


def test_functions_and_typer_groups_are_both_commands(environment: dict[str, str]) -> None:
    assert knnlm(environment, "fine", "--times", "2").stdout.count("hello") == 2
    assert knnlm(environment, "group", "one").stdout == "one\n"


@pytest.mark.parametrize("options", [(), ("--help",)], ids=["called", "asked for help"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "ModuleNotFoundError: No module named 'knnlm_test_absent'"),
        ("broken", "RuntimeError: no driver here"),
        ("number", "TypeError: expected a function or a typer.Typer, got int"),
    ],
)
def test_an_entry_point_that_does_not_load_is_named_when_called(
    environment: dict[str, str], name: str, reason: str, options: tuple[str, ...]
) -> None:
    result = knnlm(environment, name, *options)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for part in (repr(name), "knnlm-test-plugin 2.5", reason, "unsupported_feature"):
        assert part in result.stderr


def test_an_entry_point_that_does_not_load_leaves_the_others_alone(environment: dict[str, str]) -> None:
    listed = knnlm(environment, "--help").stdout
    assert "Not available: RuntimeError: no driver here" in listed
    assert knnlm(environment, "fine").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("refuse",), "error: `k` must be at most 1024, got 9000 (invalid_parameter)\n"),
        (("group", "two"), "error: two is refused (invalid_parameter)\n"),
    ],
)
def test_an_error_of_ours_is_one_line_on_stderr(
    environment: dict[str, str], arguments: tuple[str, ...], line: str
) -> None:
    result = knnlm(environment, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_debug_shows_the_traceback_of_an_error_of_ours(environment: dict[str, str]) -> None:
    result = knnlm(environment, "--debug", "refuse")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "InvalidParameter: `k` must be at most 1024, got 9000" in result.stderr


def test_a_defect_shows_its_traceback_even_without_debug(environment: dict[str, str]) -> None:
    result = knnlm(environment, "defect")
    assert result.returncode == 1
    assert "ZeroDivisionError: a defect" in result.stderr


def test_an_unknown_subcommand_is_wrong_usage_and_suggests_the_nearest(environment: dict[str, str]) -> None:
    result = knnlm(environment, "refus")
    assert result.returncode == 2
    assert "refuse" in result.stderr


def test_an_interrupt_ends_quietly_with_130(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "knnlm_cli", "sleep"]
    pipe = subprocess.PIPE
    # A run in the background ignores interrupts, and its children would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asleep\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.parametrize("times", ["1", "100000"], ids=["before the last flush", "while writing"])
def test_a_reader_that_leaves_early_is_no_error(environment: dict[str, str], times: str) -> None:
    command = [sys.executable, "-m", "knnlm_cli", "fine", "--times", times]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_help_imports_no_heavy_package() -> None:
    program = (
        "import sys\nfrom knnlm_cli.main import make_app\n"
        "make_app()(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'faiss', 'pyarrow', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_shell_can_complete_subcommands(environment: dict[str, str]) -> None:
    asked = environment | {"_KNNLM_COMPLETE": "complete_bash", "COMP_WORDS": "knnlm refu", "COMP_CWORD": "1"}
    assert knnlm(asked).stdout.split() == ["refuse"]
