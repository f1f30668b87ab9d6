"""Clients as their users start them: a process of its own that reaches nothing but the server under test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATIENCE_S = 270  # starting a process that imports torch takes a while on busy cores
# What a user of the outside world may have set, and would be taken to the test.
_NOT_TAKEN_ALONG = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def run_offline(arguments: list[str], folder: Path) -> str:
    """Run ``python arguments`` in a folder, with caches of its own there; it must succeed. Returns its log."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name.upper() not in _NOT_TAKEN_ALONG}
    environment |= {
        "HF_HOME": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        timeout=PATIENCE_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log = done.stdout.decode(errors="replace")
    assert done.returncode == 0, log[-5000:]
    return log
