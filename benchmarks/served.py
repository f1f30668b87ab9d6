"""The real server in a process of its own, for benchmarks that measure what users get."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

MODEL = "lm"  # what servers of benchmarks call the language model


class Served(NamedTuple):
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def served(model: str, root: Path, name: str, *, port: int, options: tuple[str, ...] = ()) -> Iterator[Served]:
    """`knnlm serve` over one datastore, ready to answer; ended when the block is left."""
    command = ["serve", "--model", model, "--datastores", str(root), "--load", name, "--port", str(port)]
    # Benchmarks ask the same prompts again, and what they time is the search.
    command += ["--served-model-name", MODEL, "--query-cache-bytes", "0", *options]
    process = subprocess.Popen([sys.executable, "-m", "knnlm_cli", *command])
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield Served(url, process)
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit("the server ended before it was ready")
