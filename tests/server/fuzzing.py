"""schemathesis, as its users run it, against a live server that its requests may change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from live_server import LiveServer

from knnlm_core.datastore.layout import published_versions
from knnlm_core.errors import DatastoreBusy
from knnlm_server.settings import ServerSettings

HERE = Path(__file__).parent
API_KEY, ADMIN_KEY = "user-key", "admin-key"
KEEP_EVERY_S = 0.2
DOCUMENT = "fuzzed"  # learned by every name


def fuzzed_settings(model: Path, root: Path) -> ServerSettings:
    """A server with both keys, and a context short enough that no case takes long.

    Args:
        model: with a chat template, or conversations would all be refused.
        root: datastores that requests may load and unload.
    """
    return ServerSettings(
        model=str(model),
        datastores=root,
        max_model_len=128,
        max_sequences=8,
        step_tokens=128,
        drain_timeout_s=5,
        api_key=(API_KEY,),  # type: ignore[arg-type]
        admin_key=ADMIN_KEY,  # type: ignore[arg-type]
    )


@contextmanager
def kept_loaded(server: LiveServer) -> Iterator[None]:
    """Load again what the requests have unloaded, every version once, and learn: the cases that follow need it."""
    done, root = threading.Event(), server.service.settings.datastores
    assert root is not None
    for name in server.backend.registry.published():
        for version in (*published_versions(root, name), None):  # rollbacks need another one before
            server.backend.registry.load(name, version)
        learn = {"documents": [{"id": DOCUMENT, "text": "The court must keep half of the rent."}], "update": True}
        answer = httpx.post(
            f"{server.url}/v1/datastores/{name}/documents", json=learn, headers={"Authorization": f"Bearer {ADMIN_KEY}"}
        )
        assert answer.is_success, answer.text

    def keep() -> None:
        registry = server.backend.registry
        while not done.wait(KEEP_EVERY_S):
            for name in set(registry.published()) - set(registry.names()):
                try:
                    registry.load(name)
                except DatastoreBusy:  # a request was faster
                    continue

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()


class Outcome(NamedTuple):
    """What a run found."""

    failed: bool
    cases: dict[str, Any]  # per route, as schemathesis_hooks counts them
    output: str  # of schemathesis


def fuzz(server: LiveServer, folder: Path, *, max_examples: int, seed: int) -> Outcome:
    """Run every phase over every route.

    Args:
        folder: for what schemathesis leaves behind.
        max_examples: cases per route of the fuzzing phase; the others add as many as the schema has corners.
    """
    counts, root = folder / "counts.json", server.service.settings.datastores
    assert root is not None
    versions = {name: published_versions(root, name) for name in server.backend.registry.published()}
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml")),
        *("run", f"{server.url}/openapi.json", "--max-examples", str(max_examples), "--seed", str(seed)),
        *("--generation-database", "none", "--no-color"),
    ]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONPATH": str(HERE),
        "FUZZ_COUNTS": str(counts),
        "FUZZ_API_KEY": API_KEY,
        "FUZZ_ADMIN_KEY": ADMIN_KEY,
        "FUZZ_DOCUMENT": DOCUMENT,
        "FUZZ_VERSIONS": json.dumps(versions),
    }
    with kept_loaded(server):
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    cases = json.loads(counts.read_text()) if counts.exists() else {}
    return Outcome(done.returncode != 0, cases, done.stdout + done.stderr)


def total(cases: dict[str, Any]) -> Counter[str]:
    """Cases of all routes, by status."""
    return sum((Counter(route["statuses"]) for route in cases.values()), Counter[str]())
