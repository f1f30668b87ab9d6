"""Shell completion of the assembled `knnlm`: commands, options and values, without loading what takes seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from knnlm_builder.settings import BuildSettings
from knnlm_cli.score_settings import ScoreSettings
from knnlm_core.knn.gates import GateMode
from knnlm_core.knn.lambdas import LambdaMode
from knnlm_core.lm.int8 import Weights
from knnlm_core.lm.loading import _DTYPES
from knnlm_server.settings import ServerSettings

SCRIPT = Path(sys.executable).with_name("knnlm")
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None or not SCRIPT.exists(), reason="needs bash and the installed script")


def offered(line: str) -> list[str]:
    """What the command offers bash where the cursor stands at the end of ``line``."""
    words = line.split()
    if line.endswith(" "):
        words.append("")
    asked = {"_KNNLM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "knnlm_cli"], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_are_offered_by_their_beginning() -> None:
    assert offered("knnlm s") == ["serve", "score"]
    assert {"build", "doctor", "datastore"} < set(offered("knnlm "))


def test_subcommands_are_offered() -> None:
    assert offered("knnlm datastore p") == ["purge", "prune"]


def test_options_are_offered() -> None:
    assert offered("knnlm serve --max-s") == ["--max-sequences"]
    assert offered("knnlm doctor --d") == ["--datastores"]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("knnlm serve --runtime ", get_args(ServerSettings.model_fields["runtime"].annotation)),
        ("knnlm serve --log-level ", get_args(ServerSettings.model_fields["log_level"].annotation)),
        ("knnlm serve --dtype ", ("auto", *_DTYPES)),
        ("knnlm build --weights ", get_args(Weights)),
        ("knnlm score --gate ", [mode.value for mode in GateMode]),
        ("knnlm score --lambda-mode ", [mode.value for mode in LambdaMode]),
        ("knnlm score --gate l", ["learned"]),
        ("knnlm serve --model=x --weights=i", ["int8"]),
    ],
)
def test_values_are_offered_all_of_them_and_no_others(line: str, values: tuple[str, ...]) -> None:
    assert sorted(offered(line)) == sorted(values)


@pytest.mark.parametrize("kind", [ServerSettings, BuildSettings, ScoreSettings])
def test_devices_that_are_offered_stand_in_the_help(kind: type) -> None:
    assert "cpu or cuda" in kind.model_fields["device"].description


def test_a_path_is_left_to_the_shell() -> None:
    assert offered("knnlm doctor --datastores ./d") == []


@pytest.mark.parametrize("line", ["knnlm ", "knnlm serve --ru", "knnlm score --gate ", "knnlm doctor --"])
def test_completing_imports_no_heavy_package(line: str) -> None:
    program = (
        "import atexit, sys\nfrom knnlm_cli.main import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'faiss', 'pyarrow', 'numpy', 'gradio'}"
        " & sys.modules.keys())))\nmain()"
    )
    asked = {"_KNNLM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert len(done.stdout.splitlines()) > 1


@needs_bash
def test_a_real_bash_completes_by_the_script_that_is_shown() -> None:
    program = (
        'source <("$0" --show-completion)\n'
        "COMP_WORDS=(knnlm serve --runtime lla)\nCOMP_CWORD=3\n"
        '_knnlm_completion "$0"\necho "${COMPREPLY[@]}"\ncomplete -p knnlm\n'
    )
    assert BASH is not None
    done = subprocess.run(
        [BASH, "--norc", "-c", program, str(SCRIPT)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["llamacpp", "complete -o default -F _knnlm_completion knnlm"]


@needs_bash
def test_installing_writes_the_script_and_sources_it(tmp_path: Path) -> None:
    assert BASH is not None
    done = subprocess.run(
        [BASH, "--norc", "-c", '"$0" --install-completion; exit $?', str(SCRIPT)],
        env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = tmp_path / ".bash_completions" / "knnlm.sh"
    assert "_knnlm_completion" in script.read_text(encoding="utf-8")
    assert str(script) in (tmp_path / ".bashrc").read_text(encoding="utf-8")
