"""Claims about Dockerfiles and docker-compose.yml, as far as they can be held without Docker."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from knnlm_cli.main import make_app
from knnlm_core.lm.random_lm import save_random_lm

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
DOCKER_COMPOSE = shutil.which("docker-compose")
PATIENCE_S = 120.0
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return [(name, rest.strip()) for name, _, rest in pairs]


def image_environment(dockerfile: Path) -> dict[str, str]:
    """What the last stage sets; none of it names another variable but PATH."""
    last = [rest for name, rest in instructions(dockerfile) if name == "ENV"][-1]
    pairs = (word.split("=", 1) for word in shlex.split(last))
    return {name: value for name, value in pairs if name != "PATH"}


def health_command(dockerfile: Path) -> list[str]:
    (text,) = [rest for name, rest in instructions(dockerfile) if name == "HEALTHCHECK"]
    command: list[str] = json.loads(text[text.index("CMD") + len("CMD") :])
    return command


def dockerfile_of(service: dict[str, Any]) -> Path:
    return ROOT / service["build"]["dockerfile"]


def settled(text: str) -> str:
    """A line of the compose file where no variable is set."""
    return _VARIABLE.sub(lambda found: found[2] or "", text)


def build_arguments(service: dict[str, Any]) -> dict[str, str]:
    given = dict(
        rest.split("=", 1) for name, rest in instructions(dockerfile_of(service)) if name == "ARG" and "=" in rest
    )
    return given | dict(line.split("=", 1) for line in service["build"].get("args", ()) if "=" in line)


# -- Dockerfiles -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, str(dockerfile)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_reaches_docker(dockerfile: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = [
        source
        for name, rest in instructions(dockerfile)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert {source for source in copied if not (ROOT / source).exists()} == set()
    assert set(copied) <= allowed
    assert not any(fnmatch(source, rule) for source in copied for rule in rules if rule.startswith("**"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_package_of_the_wheel_is_copied(dockerfile: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = {source for name, rest in instructions(dockerfile) if name == "COPY" for source in rest.split()[:-1]}
    assert {package.split("/")[0] for package in packages} <= copied
    assert {"pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"} <= copied


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_packages_come_from_the_lock(dockerfile: Path) -> None:
    installs = [rest for name, rest in instructions(dockerfile) if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("-c constraints.txt" in line for line in installs)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_runs_as_nobody_in_particular(dockerfile: Path) -> None:
    given = instructions(dockerfile)
    bases = [rest.split()[0] for name, rest in given if name == "FROM"]
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", bases[0])
    users = [rest for name, rest in given if name == "USER"]
    assert users == ["10001"]
    environment = image_environment(dockerfile)
    assert environment["HOME"] == "/tmp"
    assert not [name for name in environment if name.startswith("KNNLM_")]


@pytest.mark.parametrize("name", OURS)
def test_extras_that_are_installed_exist_and_hold_one_faiss(name: str) -> None:
    service = OURS[name]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    arguments = build_arguments(service)
    (line,) = [rest for name, rest in instructions(dockerfile_of(service)) if "pip install" in rest and ".[" in rest]
    for argument, value in arguments.items():
        line = line.replace(f"${{{argument}}}", value)
    found = re.search(r"\.\[([^\]]*)\]", line)
    assert found is not None
    chosen = found[1].split(",")
    assert set(chosen) <= extras.keys()
    assert len({"cpu", "gpu"} & set(chosen)) == 1


# -- docker-compose.yml ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DOCKER_COMPOSE is None, reason="docker-compose is not installed")
def test_docker_compose_understands_the_file_with_no_variable_set(tmp_path: Path) -> None:
    profiles = sorted({profile for service in SERVICES.values() for profile in service.get("profiles", ())})
    assert DOCKER_COMPOSE is not None
    done = subprocess.run(
        [DOCKER_COMPOSE, *(f"--profile={profile}" for profile in profiles), "config"],
        cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = yaml.safe_load(done.stdout)
    assert shown["services"].keys() == SERVICES.keys()
    assert shown["services"]["server"]["command"][1] == "--model=/models/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert service["pids_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    if name in OURS:
        assert re.fullmatch(r"\d+:\d+", settled(service["user"]))
        assert settled(service["user"]) != "0:0"


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_from_elsewhere_is_of_one_version(name: str) -> None:
    if name not in OURS:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_a_health_check_unless_it_runs_once(name: str) -> None:
    service = SERVICES[name]
    if "healthcheck" in service:
        assert service["healthcheck"]["test"][0] == "CMD"
        return
    given = dict(instructions(dockerfile_of(service)))["HEALTHCHECK"]
    assert (given == "NONE") == (name == "builder")


def test_no_secret_has_a_default_and_grafana_lets_nobody_in_unasked() -> None:
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    secrets = [found for found in _VARIABLE.finditer(text) if re.search("KEY|PASSWORD|SECRET|TOKEN", found[1])]
    assert secrets
    assert not [found[1] for found in secrets if found[2]]
    for name in ("KNNLM_API_KEY", "KNNLM_ADMIN_KEY"):
        assert name in SERVICES["server"]["environment"]  # alone: passed on where it is set
    grafana = SERVICES["grafana"]
    assert "GF_AUTH_ANONYMOUS_ENABLED=false" in grafana["environment"]
    check = grafana["entrypoint"][2].replace("$$", "$").replace("exec /run.sh", "echo started")
    for password, status, shown in (("", 1, ""), ("s3cret", 0, "started\n")):
        done = subprocess.run(
            ["sh", "-c", check], env={"GF_SECURITY_ADMIN_PASSWORD": password, "PATH": os.environ["PATH"]},
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (status, shown)


@pytest.mark.parametrize("name", SERVICES)
def test_files_that_are_mounted_and_ours_are_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source, target = settled(volume).split(":")[:2]
        if source.startswith("./docker/"):
            assert list((ROOT / source).iterdir()), source
        elif source.startswith("./"):
            assert target in ("/datastores", "/models", "/corpus")
        else:
            assert source in COMPOSE["volumes"]


def test_prometheus_and_grafana_find_what_their_files_name() -> None:
    targets = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    scraped = [
        target for job in targets["scrape_configs"] for each in job["static_configs"] for target in each["targets"]
    ]
    assert scraped == ["server:8000"]
    assert "--port=8000" in SERVICES["server"]["command"]
    assert "server" in SERVICES["server-gpu"]["networks"]["default"]["aliases"]
    mounts = {volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]}
    folder = ROOT / "docker/grafana/provisioning"
    for file in sorted((folder / "dashboards").glob("*.yml")):
        for provider in yaml.safe_load(file.read_text(encoding="utf-8"))["providers"]:
            assert provider["options"]["path"] in mounts
    for file in sorted((folder / "datasources").glob("*.yml")):
        for source in yaml.safe_load(file.read_text(encoding="utf-8"))["datasources"]:
            assert source["url"] == "http://prometheus:9090"


@pytest.mark.parametrize("name", OURS)
def test_the_command_line_of_a_service_is_one_that_knnlm_understands(name: str) -> None:
    words = [settled(word) for word in OURS[name]["command"]]
    commands = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    context = commands[words[0]].make_context(words[0], words[1:])
    assert context.args == []
    if "host" in context.params:
        assert context.params["host"] == "0.0.0.0"  # of the container; ports are published on loopback alone
        (port,) = (settled(port).split(":") for port in OURS[name]["ports"])
        assert int(port[2]) == context.params["port"]


# -- what a container runs ---------------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``knnlm …`` with nothing in its environment but what the image and the service give it, and no home."""
    clean = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "LANG": "C.UTF-8"}
    # Tighter than an image's /tmp: a place where not even root can make a folder.
    clean |= environment | {"HOME": "/proc/nowhere", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "knnlm_cli", *command], stdout=output, stderr=output, env=clean, cwd="/"
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_healthy(command: list[str], url: str) -> bool:
    assert command[0] == "python"
    environment = {"HEALTH_URL": url, "http_proxy": "http://127.0.0.1:9", "HOME": "/proc/nowhere"}
    done = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, timeout=30, cwd="/")
    return done.returncode == 0


def wait_until_healthy(process: subprocess.Popen[bytes], command: list[str], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_healthy(command, url):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := re.search(r"on (?:http://)?[\w.]+:(\d+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return f"http://127.0.0.1:{found[1]}"


def test_the_servers_command_and_health_check_work_without_a_home(tmp_path: Path) -> None:
    dockerfile = dockerfile_of(SERVICES["server"])
    environment, check = image_environment(dockerfile), health_command(dockerfile)
    model = save_random_lm(tmp_path / "models" / "lm", "The tenant may refuse to pay the rent. " * 9)
    (tmp_path / "datastores").mkdir()
    given = {"--model": str(model), "--datastores": str(tmp_path / "datastores"), "--port": "0"}
    words = [settled(word) for word in SERVICES["server"]["command"]]
    command = [f"{word.split('=')[0]}={given.get(word.split('=')[0], word.partition('=')[2])}" for word in words[1:]]
    log = tmp_path / "log"
    with running([words[0], *command], environment, log) as process:
        url = address(log, process)
        path = environment["HEALTH_URL"].removeprefix("http://127.0.0.1:8000")
        assert path == "/health"
        wait_until_healthy(process, check, f"{url}{path}", log)
        assert not is_healthy(check, f"{url}/nothing/here")
    assert not is_healthy(check, f"{url}{path}")
    assert process.returncode == 0, log.read_text()


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("knnlm_playground", "gradio")), reason="the playground is not installed"
)
def test_the_playgrounds_command_and_health_check_work_without_a_home(tmp_path: Path) -> None:
    service = SERVICES["playground"]
    dockerfile = dockerfile_of(service)
    (health,) = [line.partition("=")[2] for line in service["environment"] if line.startswith("HEALTH_URL=")]
    words = [settled(word) for word in service["command"]]
    command = ["--port=0" if word.startswith("--port=") else word for word in words]
    log = tmp_path / "log"
    with running(command, image_environment(dockerfile), log) as process:
        url = address(log, process)
        wait_until_healthy(process, health_command(dockerfile), health.replace("http://127.0.0.1:7860", url), log)
    assert process.returncode in (0, -signal.SIGTERM), log.read_text()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_that_is_run_without_words_shows_the_help_of_its_command(dockerfile: Path, tmp_path: Path) -> None:
    given = dict(instructions(dockerfile))
    entry, words = json.loads(given["ENTRYPOINT"]), json.loads(given["CMD"])
    assert entry == ["knnlm"]
    log = tmp_path / "log"
    with running(words, image_environment(dockerfile), log) as process:
        assert process.wait(60) == 0
    assert f"Usage: knnlm {words[0]}" in log.read_text().replace("__main__.py", "knnlm")
