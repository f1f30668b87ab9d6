"""`knnlm serve` in a process of its own, with the page that comes with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from knnlm_client import Client

PATIENCE_S = 90.0
# A tiny LM is done before anybody has pressed a button: `knnlm` with passes that take 20 ms longer.
_SLOWED = """
import time
from knnlm_core.lm.huggingface import HuggingFaceLM
forward = HuggingFaceLM.forward
HuggingFaceLM.forward = lambda self, batch: (time.sleep(0.02), forward(self, batch))[1]
from knnlm_cli.main import main
main()
"""


class ServerProcess:
    """Starts on entering and is ready then; told to stop on leaving, which must not take long.

    Args:
        arguments: of the command, besides the port.
        slowed: every pass of the LM takes 20 ms longer.
    """

    def __init__(self, log: Path, *arguments: str, slowed: bool = False) -> None:
        self._log = log
        self._start = ["-c", _SLOWED] if slowed else ["-m", "knnlm_cli"]
        self._arguments = arguments

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, *self._start, "serve", "--port", "0", "--log-level", "debug", *self._arguments]
        with self._log.open("wb") as stderr:
            self._process = subprocess.Popen(command, stderr=stderr, env=environment)
        self.url = self._wait_for(r"knnlm listens on (http://\S+)")
        self._wait_for("(ready) model=")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            assert self._process.wait(PATIENCE_S) == 0, self.log
        finally:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        """What the server has logged."""
        return self._log.read_text(encoding="utf-8")

    def is_idle(self) -> bool:
        """Whether it works on no request."""
        with Client(self.url) as client:
            return client.ready().running == 0

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.log)) is None:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        return found[1]
