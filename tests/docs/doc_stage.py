"""What the documentation takes for granted, in a folder of its own, and a shell in it.

The language model is a tiny one under the name of the real one: it says nothing sensible, and every command works.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx

from tiny import TEXT, save_tiny

ROOT = Path(__file__).parents[2]
MODEL = ".models/SmolLM2-135M-Instruct"
USUAL_SERVER = f"knnlm serve --model {MODEL} --datastores datastores"
PATIENCE_S = 240.0
_PORTS = re.compile(r"(?<=:)(8000|8001|7860)\b|(?<=--port )(\d+)\b|(?<=--port=)(\d+)\b")
_CHAT = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"
_SHIM = """#!/bin/sh
exec {python} -SE {warm} {socket} knnlm "$@"
"""


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def furnish(folder: Path) -> None:
    """A model, texts, and what single pages name."""
    model = save_tiny(folder / MODEL)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    (model / "chat_template.jinja").write_text(_CHAT)
    manuals = folder / "manuals"
    manuals.mkdir()
    for number, name in enumerate((*(f"chapter-{i}.md" for i in range(1, 8)), "typesmapping.txt")):
        (manuals / name).write_text(_chapter(number), encoding="utf-8")
    (folder / "chapter.md").write_text(_chapter(8), encoding="utf-8")
    rows = [{"id": f"chapter-{number}", "text": _chapter(number)} for number in (9, 10)]
    (folder / "chapters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _chapter(number: int) -> str:
    draw = random.Random(number)
    words = TEXT.split()
    sentences = (" ".join(draw.sample(words, 4) + words[: draw.randint(5, 20)]) + "." for _ in range(14))
    return f"# Chapter {number}\n\n" + "\n\n".join(sentences) + "\n"


@contextmanager
def warm_programs(folder: Path) -> Iterator[Path]:
    """A folder for the PATH, whose `knnlm` is the real one; see warm_knnlm."""
    folder.mkdir()
    warm, path = Path(__file__).with_name("warm_knnlm.py"), folder / "socket"
    (folder / "knnlm").write_text(_SHIM.format(python=sys.executable, warm=warm, socket=path))
    (folder / "knnlm").chmod(0o755)
    with subprocess.Popen(
        [sys.executable, str(warm), str(path)], stdout=subprocess.PIPE, env=_environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"warm\n"
        yield folder
        process.terminate()


def _environment() -> dict[str, str]:
    """Ours, without settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("KNNLM_", "COV_"))} | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "NO_PROXY": "*",
        "COLUMNS": "120",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }


class Running(NamedTuple):
    """A server in the background."""

    pid: int
    url: str
    log: Path


class PageShell:
    """A shell in which the commands of one page are run, one after the other.

    What a page starts is stopped when it starts another one on the same port, and at the end. Ports that pages name
    stand for free ones: 8000 for one, 8001 for another.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self._notes = folder / ".steps"
        self._notes.mkdir()
        self._steps = 0
        self._ports: dict[str, int] = {}
        self._servers: dict[str, Running] = {}
        told, tell = os.pipe()
        environment = _environment() | {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder / ".home"),
            "XDG_CACHE_HOME": str(folder / ".cache"),
            "KNNLM_PORT": str(self._port("8000")),
        }
        command = ["bash", "--norc", "--noprofile", "-o", "pipefail"]
        self._bash = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=folder, env=environment, pass_fds=[tell]
        )
        os.close(tell)
        self._told, self._tell = told, tell

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            for port in list(self._servers):
                self.stop(port)
        finally:
            assert self._bash.stdin is not None
            self._bash.stdin.close()
            self._bash.wait(timeout=PATIENCE_S)
            os.close(self._told)

    def run(self, text: str) -> Done:
        """Run it as it stands, but for ports."""
        script, out, err = self._written(self._with_ports(text))
        status = int(self._ask(f". {script} </dev/null >{out} 2>{err}; echo $? >&{self._tell}"))
        return Done(status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    def run_python(self, text: str) -> Done:
        """Run a block of Python."""
        path = self._notes / f"block-{self._steps}.py"
        path.write_text(self._with_ports(text), encoding="utf-8")
        return self.run(f"python -W error {path}")

    def start(self, text: str) -> None:
        """Start a server in the background and wait until it can be used; one that listens there already is stopped."""
        is_page = " playground" in text
        given = re.search(r"--port[ =](\d+)", text)
        port = given[1] if given else "7860" if is_page else "8000"
        if port in self._servers:
            self.stop(port)
        text = self._with_ports(text)
        if is_page:  # its port has no variable
            text += "" if given else f" --port {self._port(port)}"
            text += "" if "--url" in text else f" --url http://127.0.0.1:{self._port('8000')}"
        assigned = re.match(r"(?:[A-Za-z_]\w*=\S*\s+)*", text)
        assert assigned is not None
        script, out, err = self._written(f"{assigned[0]}exec {text[assigned.end() :]}")
        pid = int(self._ask(f"(. {script}) </dev/null >{out} 2>{err} & echo $! >&{self._tell}"))
        ready = "/" if is_page else "/ready"
        server = self._servers[port] = Running(pid, f"http://127.0.0.1:{self._port(port)}", err)
        try:
            _await(f"{server.url}{ready}", server)
        except AssertionError:
            if not _runs(pid):
                del self._servers[port]
            raise

    def stop(self, port: str) -> None:
        """Stop a server as a service manager does; it must end well."""
        server = self._servers.pop(port)
        status = self._ask(f"kill {server.pid} && wait {server.pid}; echo $? >&{self._tell}")
        # One that knows nothing of the signal ends by it, with 143.
        assert status in ("0", "143"), f"the server ended with status {status}:\n{server.log.read_text()}"

    def has_server(self, port: str = "8000") -> bool:
        """Whether something was started there."""
        return port in self._servers

    def _port(self, named: str) -> int:
        if named not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._ports[named] = free.getsockname()[1]
        return self._ports[named]

    def _with_ports(self, text: str) -> str:
        return _PORTS.sub(lambda found: str(self._port(found[1] or found[2] or found[3])), text)

    def _written(self, text: str) -> tuple[Path, Path, Path]:
        self._steps += 1
        script = self._notes / f"{self._steps:03}.sh"
        script.write_text(text + "\n", encoding="utf-8")
        return script, script.with_suffix(".out"), script.with_suffix(".err")

    def _ask(self, line: str) -> str:
        """Have bash run a line that writes one word to us."""
        assert self._bash.stdin is not None
        self._bash.stdin.write(line.encode() + b"\n")
        self._bash.stdin.flush()
        readable, _, _ = select.select([self._told], [], [], PATIENCE_S)
        assert readable, f"no answer within {PATIENCE_S:g} s: {line}"
        return os.read(self._told, 64).decode().strip()


def _await(url: str, server: Running) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with httpx.Client(trust_env=False, timeout=PATIENCE_S, follow_redirects=True) as client:
        while True:
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            log = server.log.read_text(encoding="utf-8")
            assert _runs(server.pid), f"the server has ended:\n{log}"
            assert time.monotonic() < deadline, f"not ready within {PATIENCE_S:g} s:\n{log}"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether it runs; what has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def copy_stage(made: Path, folder: Path) -> Path:
    """The furnished folder once more, for one page to change; the model is shared."""
    shutil.copytree(made, folder, symlinks=True, ignore=shutil.ignore_patterns(".models", ".steps"))
    (folder / ".models").symlink_to(made / ".models")
    return folder
