"""Claims about the repository's own files: the wheel, the pins, the Makefile, the entry points."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGES = ("knnlm_core", "knnlm_builder", "knnlm_server", "knnlm_cli")
TARGETS = ("help", "install", "model", "demo", "test", "check", "bench", "clean")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("knnlm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


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
