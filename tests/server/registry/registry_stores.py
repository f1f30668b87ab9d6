"""What the registry's tests load, and what they ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from small_store import Plan, build, random_keys

from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.entries import Entries
from knnlm_core.datastore.publish import publish
from knnlm_core.datastore.segments import NewDocument
from knnlm_server.registry.registry import Registry

DIM = 8
Open = Callable[..., Registry]  # with settings of its own
PATIENCE_S = 20.0


class Stores(NamedTuple):
    """Published datastores."""

    root: Path
    law: tuple[str, str, str]  # versions, each larger than the one before; the last one is current
    news: str


def publish_stores(root: Path) -> Stores:
    """Build and publish."""

    def make(name: str, salt: int, first_document: int) -> str:
        sizes = [first_document, *[5] * (2 * salt)]
        version = build(root, Plan(random_keys(sum(sizes), DIM, salt), document_sizes=sizes, name=name, salt=salt))
        publish(root, name, version)
        return version

    return Stores(root, (make("law", 0, 40), make("law", 1, 40), make("law", 2, 40)), make("news", 0, 20))


def new_document(document_id: str, entries: int = 3, seed: int = 0) -> NewDocument:
    """A document with keys, as the engine would make them."""
    text = "abcdefg " * (entries + 1)
    starts = 8 * (np.arange(entries) + 1)
    return NewDocument(
        Document(document_id, text),
        random_keys(entries, DIM, seed).astype(np.float32),
        np.arange(entries),
        np.stack([starts, starts + 8], axis=1),
    )


def is_open(datastore: Entries) -> bool:
    """Whether it can still be searched."""
    with suppress(AssertionError):  # "used after close"
        return len(datastore.search(torch.zeros(1, datastore.dim), 1).entry_ids) == 1
    return False


def held_from(root: Path) -> list[str]:
    """What this process holds open or mapped under a folder."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split(maxsplit=5)[5] for line in maps if str(root) in line]
    opened = [file.path for file in psutil.Process().open_files() if file.path.startswith(str(root))]
    return sorted([*mapped, *opened])


def wait_until(holds: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Fails unless the condition holds soon enough."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"still not true after {within_s:g} s"
        time.sleep(0.002)
