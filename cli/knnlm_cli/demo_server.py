"""The demo's other processes: a build that must end well, and a server that must answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from knnlm_core.errors import BuildError, InvalidParameter, NotReady

if TYPE_CHECKING:
    from knnlm_client import Client

STOP_S = 20.0  # after this long a child that was asked to stop is killed
READY_S = 600.0
POLL_S = 0.5
LOG_LINES = 20


def run_knnlm(arguments: Sequence[str]) -> None:
    """Run ``knnlm …`` to its end, its output being ours.

    Raises: BuildError: it exits with anything but 0.
    """
    process = subprocess.Popen([sys.executable, "-m", "knnlm_cli", *arguments], env=_environment())
    with _stopped_at_the_end(process):
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal has interrupted it too: let it leave its journal in order
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            raise
    if status != 0:
        raise BuildError(f"`knnlm {arguments[0]}` ended with exit code {status}; its messages stand above")


@contextmanager
def running_server(arguments: Sequence[str], *, client: Client, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``knnlm serve …`` until the block ends; the block starts when the server is ready.

    Args:     client: speaks to the address where it will listen.
              log: file for what it prints.
    Raises:   NotReady: it exits before it is ready (with its last lines), or is not ready after `READY_S` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A process group of its own: Ctrl-C reaches us alone, and we stop the server in order.
        process = subprocess.Popen(
            [sys.executable, "-m", "knnlm_cli", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            process_group=0,
        )
    with _stopped_at_the_end(process):
        _wait_until_ready(process, client, log)
        yield process


def check_port_is_free(host: str, port: int) -> None:
    """Raises InvalidParameter: a server could not listen there, and why."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will; TIME_WAIT is no obstacle
            probe.bind(address)
    except OSError as error:
        raise InvalidParameter(
            f"`port` {port} on {host} cannot be listened on ({error.strerror}); choose another with --port",
            param="port",
        ) from error


def ended(process: subprocess.Popen[bytes], log: Path) -> str:
    """What to say about a server that ended by itself: its exit code and the end of its log."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        last = "".join(deque(lines, maxlen=LOG_LINES)).rstrip()
    return f"the server ended with exit code {process.returncode}; {log} ends with:\n{last}"


def _environment() -> dict[str, str]:
    """Ours without KNNLM_*: settings of another server, a required key say, are not the demo's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}


@contextmanager
def _stopped_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], client: Client, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    told = ""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotReady(ended(process, log))
        reason = _why_not_ready(client)
        if reason is None:
            return
        if reason != told:
            typer.echo(f"waiting for the server: {reason}")
            told = reason
        time.sleep(POLL_S)
    raise NotReady(f"the server is not ready after {READY_S:.0f} s ({told}); see {log}")


def _why_not_ready(client: Client) -> str | None:
    from knnlm_client import APIError, ConnectionFailed, TimedOut

    try:
        status = client.ready()
    except ConnectionFailed:
        return "it does not listen yet"
    except (APIError, TimedOut) as error:
        return str(error)
    return None if status else status.reason or "it gives no reason"
