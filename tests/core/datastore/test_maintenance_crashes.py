"""Compaction, purge, prune and rollback killed at any file operation leave before or after; the next run completes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from maintained_store import NAME, all_entries, change_a_lot, living, new_document, publish_store, teach
from maintenance_crasher import PURGED

from knnlm_core.datastore import layout
from knnlm_core.datastore.canaries import self_test
from knnlm_core.datastore.history import read_history
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.reader import Datastore

KILLS = {"compact": 24, "purge": 24, "prune": 10, "rollback": 6}


class Crasher:
    """The process whose children die."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("maintenance_crasher.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, root: Path, operation: str, crash_at: int | None) -> tuple[int, int]:
        """Wait status and number of file operations."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"root": str(root), "operation": operation, "crash_at": crash_at}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status, calls = self._process.stdout.readline().split()
        return int(status), int(calls)

    def close(self) -> None:
        _, errors = self._process.communicate(timeout=30)
        assert self._process.returncode == 0, errors


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    crasher = Crasher()
    yield crasher
    crasher.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where there is such a place: a killed process, unlike a power cut, loses nothing that it wrote."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("crashes")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    root = folder / "store"
    root.mkdir()
    publish_store(root, salt=1, cuts=())
    publish_store(root, cuts=())
    change_a_lot(root)
    return root


@pytest.fixture(scope="module")
def compacted(crasher: Crasher, store: Path) -> Path:
    """Four versions, of which some can go, and dead segments."""
    root = store.with_name("compacted")
    shutil.copytree(store, root)
    assert crasher.run(root, "compact", None)[0] == 0
    teach(root, new_document("new/later", 3, 60))
    assert crasher.run(root, "compact", None)[0] == 0
    return root


Content = dict[tuple[str, int], tuple[bytes, int, int, int]]
Files = frozenset[tuple[str, bytes]]


def files_of(root: Path) -> Files:
    """Everything but what nobody reads for state: the log for people, and what an interrupted write has left."""
    home = root / NAME
    paths = (
        path for path in home.rglob("*") if path.is_file() and path.suffix != ".part" and path.name != "audit.jsonl"
    )
    return frozenset((path.relative_to(home).as_posix(), path.read_bytes()) for path in paths)


def seen(root: Path) -> Content:
    """What a server that starts now shows, every file of it compared with its checksum."""
    Datastore.open(root, NAME, checksums=True).close()
    snapshot = living(root)
    content = all_entries(snapshot)
    snapshot.datastore.close()
    return content


@pytest.mark.parametrize("operation", KILLS)
def test_a_kill_leaves_before_or_after_and_the_next_run_ends_as_if_nothing_had_happened(
    crasher: Crasher, store: Path, compacted: Path, folder: Path, operation: str
) -> None:
    original = compacted if operation in {"prune", "rollback"} else store
    whole = folder / f"{operation}-whole"
    shutil.copytree(original, whole)
    status, calls = crasher.run(whole, operation, None)
    assert status == 0
    before, after, end = seen(original), seen(whole), files_of(whole)
    gone = {document_id for document_id, _ in before} - {document_id for document_id, _ in after}
    assert gone == ({"doc/3", "new/c"} if operation == "purge" else set())
    known: set[Files] = set()
    points = np.unique(np.linspace(0, calls - 1, KILLS[operation]).astype(int)).tolist()
    assert len(points) == KILLS[operation]
    for crash_at in points:
        root = folder / f"{operation}-{crash_at}"
        shutil.copytree(original, root)
        assert crasher.run(root, operation, crash_at)[0] == signal.SIGKILL, f"file operation {crash_at} of {calls}"
        # What a reader looks at: the same files show the same.
        visible = frozenset(file for file in files_of(root) if not file[0].partition("/")[0].endswith(".tmp"))
        if visible not in known:
            known.add(visible)
            assert seen(root) in (before, after)
        if operation == "rollback":  # nothing to complete: whoever rolls back again looks first
            assert read_history(root, NAME) in (read_history(original, NAME), read_history(whole, NAME))
        else:
            assert crasher.run(root, operation, None)[0] == 0
            assert files_of(root) == end
        shutil.rmtree(root)
    with Datastore.open(whole, NAME) as opened:
        self_test(opened)


def test_the_kills_are_enough_to_meet_every_kind_of_operation() -> None:
    assert sum(KILLS.values()) >= 60


def test_from_the_first_commit_of_a_purge_on_no_version_shows_the_documents(
    crasher: Crasher, store: Path, folder: Path
) -> None:
    root = folder / "halfway"
    shutil.copytree(store, root)
    _, calls = crasher.run(root, "purge", None)
    shutil.rmtree(root)
    shutil.copytree(store, root)
    crasher.run(root, "purge", calls // 2)
    assert all(map(read_ledger(root, NAME).is_deleted, PURGED))
    for version in layout.published_versions(root, NAME):
        assert not set(living(root, version).document_ids()) & set(PURGED)
