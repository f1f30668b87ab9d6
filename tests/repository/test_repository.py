"""Claims about the repository's own files: the wheel and its installation, the pins, the Makefile, the entry points."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = ("knnlm_core", "knnlm_builder", "knnlm_server", "knnlm_cli", "knnlm_playground")
SWIG = "ignore:builtin type:DeprecationWarning"  # of FAISS's bindings, as in pyproject.toml
TARGETS = ("help", "install", "model", "demo", "test", "check", "bench", "clean")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("knnlm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class Installed(NamedTuple):
    """The wheel as pip has put it into a folder of its own; dependencies are those of the test's environment."""

    folder: Path
    elsewhere: Path  # an empty working directory

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python with the folder first on its path, and neither the checkout nor the working directory before."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "KNNLM_"))}
        environment |= {"PYTHONPATH": str(self.folder), "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", *arguments]
        return subprocess.run(command, cwd=self.elsewhere, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder, elsewhere = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installed(folder, elsewhere)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_carries_every_package_with_its_types(wheel_files: set[str], package: str) -> None:
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= wheel_files


def test_the_wheel_carries_the_module_of_every_entry_point(wheel_files: set[str], project: dict[str, Any]) -> None:
    entries = project["entry-points"]["knnlm.commands"] | project["scripts"]
    modules = {name: value.partition(":")[0].replace(".", "/") for name, value in entries.items()}
    missing = {
        name: module for name, module in modules.items() if not {f"{module}.py", f"{module}/__init__.py"} & wheel_files
    }
    assert not missing


def test_the_wheel_carries_every_module_of_the_checkout(wheel_files: set[str], project: dict[str, Any]) -> None:
    folders = [ROOT / folder for folder in ("core", "datastore_builder", "server", "cli")]
    modules = {str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.py")}
    assert modules <= wheel_files


def test_the_wheel_carries_nothing_but_the_packages_and_its_own_metadata(wheel_files: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


# Modules are named one by one: a walk through the packages passes over folders without an `__init__.py`.
IMPORT_ALL = """
import importlib, json, sys
modules = [importlib.import_module(name) for name in sys.argv[1:]]
print(json.dumps({module.__name__: module.__file__ for module in modules}))
"""


def test_every_module_of_the_installed_wheel_can_be_imported(installed: Installed, wheel_files: set[str]) -> None:
    paths = {name for name in wheel_files if name.endswith(".py")}
    modules = {path.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): path for path in paths}
    assert modules.keys() > set(PACKAGES)
    done = installed.python("-W", "error", "-W", SWIG, "-c", IMPORT_ALL, *sorted(modules))
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout)
    assert imported == {module: str(installed.folder / path) for module, path in modules.items()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ("build", "serve", "model", "demo", "--version", "--debug")),
        (["build", "--help"], ("--model", "--input", "--output", "--name", "--held-out-fraction")),
        (
            ["datastore", "--help"],
            ("list", "inspect", "verify", "diff", "compact", "purge", "prune", "rollback", "export"),
        ),
        (["datastore", "purge", "--help"], ("ROOT/NAME", "--yes", "--json")),
        (["serve", "--help"], ("--model", "--datastores", "--load", "--admin-key", "--drain-timeout-s")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_installed_wheel_explains_its_commands(
    installed: Installed, arguments: list[str], words: tuple[str, ...]
) -> None:
    done = installed.python("-m", "knnlm_cli", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    missing = [word for word in words if word not in done.stdout]
    assert not missing, done.stdout
    assert "Not available" not in done.stdout


def test_the_installed_console_script_runs_and_knows_its_version(installed: Installed, wheel: Path) -> None:
    done = installed.python(str(installed.folder / "bin" / "knnlm"), "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"knnlm {wheel.name.split('-')[1]}\n"


FILES_OF_COMMANDS = """
import json, sys
from importlib.metadata import entry_points
entries = entry_points(group="knnlm.commands")
print(json.dumps({entry.name: (entry.load(), sys.modules[entry.module].__file__)[1] for entry in entries}))
"""


def test_the_installed_wheel_declares_every_command_as_its_own(installed: Installed, project: dict[str, Any]) -> None:
    done = installed.python("-c", FILES_OF_COMMANDS)
    assert done.returncode == 0, done.stderr
    entries = project["entry-points"]["knnlm.commands"].items()
    modules = {name: value.partition(":")[0].replace(".", "/") for name, value in entries}
    assert json.loads(done.stdout) == {name: f"{installed.folder / module}.py" for name, module in modules.items()}


def test_every_dependency_is_pinned_to_a_version_that_the_project_allows(project: dict[str, Any]) -> None:
    pins = constraints()
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["cpu"], *extras["gguf"], *extras["plot"], *extras["dev"]]
    requirements = [Requirement(line) for line in named]
    for requirement in requirements:
        if requirement.name == project["name"]:  # dev includes our own extras
            assert requirement.extras <= extras.keys()
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert pin in requirement.specifier, f"constraints.txt pins {requirement.name} to {pin}, not {requirement}"


def test_constraints_name_plain_public_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    odd = [line for line in lines[1:] if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert lines[0].startswith("#")
    assert not odd


def test_the_two_faiss_extras_exclude_each_other(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    dev = {extra for line in extras["dev"] for extra in Requirement(line).extras}
    assert not dev & {"cpu", "gpu"}
    assert [name for name in constraints() if name.startswith("faiss")] == ["faiss-cpu"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_makefile_has_the_documented_target(target: str) -> None:
    dry_run = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert dry_run.returncode == 0, dry_run.stderr
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=20).stdout
    assert f"make {target} " in listed


def test_the_demo_target_hands_every_text_to_the_demo() -> None:
    command = ["make", "--dry-run", "demo", "TEXT=a.txt b.md"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout
    assert "--text a.txt --text b.md" in printed


def test_licence_is_the_apache_text_and_is_the_one_declared(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project["license"] == "Apache-2.0"


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}
