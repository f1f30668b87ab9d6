"""Learning and deleting survive a process's death at any moment: whole operations, and all that were acknowledged."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from ledger_crasher import intercept
from small_segments import NAME, check_segments, check_state, perform_next, planned, tail_folders

from knnlm_core.datastore.ledger import LedgerState, ledger_lock, read_ledger

KILLED = signal.SIGKILL
RANDOM_KILLS = 60
MEMORY = Path("/dev/shm")  # a killed process loses nothing that it wrote there either, and nobody waits for a disk


class Fate(NamedTuple):
    """What became of a child."""

    done: list[int]  # revisions that it acknowledged
    killed: bool


class Crasher:
    """The process whose children die."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("ledger_crasher.py")
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(self, root: Path, *, operations: int, crash_at: int | None = None, children: int = 1) -> list[int]:
        """Start children and return their process ids; what they say is for `read`."""
        order = {"root": str(root), "operations": operations, "crash_at": crash_at, "children": children}
        self._write(json.dumps(order))
        self._said: list[str] = []
        pids: list[int] = []
        while len(pids) < children:
            line = self._read()
            pids.append(int(line.split()[1])) if line.startswith("start") else self._said.append(line)
        return pids

    def wait_for_operations(self, number: int) -> None:
        """Wait until that many more have been acknowledged; `fate` reports them too."""
        self._said += [self._read() for _ in range(number)]

    def fate(self) -> Fate:
        """Wait until a child has ended."""
        done = []
        while True:
            kind, number = (self._said.pop(0) if self._said else self._read()).split()
            if kind == "end":
                status = int(number)
                assert status == 0 or os.WTERMSIG(status) == KILLED, f"a child failed with status {status}"
                return Fate(done, status != 0)
            done.append(int(number))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0
        self._process.stdout.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the crasher has ended"
        return line


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    crasher = Crasher()
    yield crasher
    crasher.close()


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def root(scratch: Path) -> Path:
    root = scratch / "root"
    (root / NAME).mkdir(parents=True)
    return root


def copied(root: Path) -> Path:
    """Another root of the same content."""
    copy = root.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    return copy


def audited(root: Path) -> list[int]:
    """Revisions of the whole lines of audit.jsonl."""
    path = root / NAME / "audit.jsonl"
    revisions = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        assert content["documents"] == list(planned(content["revision"]).ids)
        revisions.append(content["revision"])
    return revisions


def check_after_crash(root: Path, acknowledged: int) -> LedgerState:
    """The state is that before or after the operation under way, and nothing acknowledged is lost."""
    state = read_ledger(root, NAME)
    assert state.revision in {acknowledged, acknowledged + 1}
    check_state(state)
    check_segments(root, state)
    logged = audited(root)
    assert logged == sorted(set(logged))
    assert max(logged, default=0) <= state.revision
    return state


def recover(root: Path) -> None:
    """The next writer removes the leftovers and goes on."""
    before = read_ledger(root, NAME)
    with ledger_lock(root, NAME, timeout_s=0) as writer:  # the dead hold no lock
        assert writer.state == before
        assert tail_folders(root) == [f"{record.revision:016d}" for record in before.segments]
    assert perform_next(root) == before.revision + 1
    after = check_after_crash(root, before.revision + 1)
    assert after.revision == before.revision + 1
    assert audited(root)[-1] == after.revision


class Scene(NamedTuple):
    """A root, and how many of the next operations are to be disturbed."""

    root: Path
    operations: int


@pytest.fixture(params=[(0, 1), (4, 2)], ids=["a new name", "a name with segments"])
def scene(request: pytest.FixtureRequest, root: Path) -> Scene:
    """The very first add; or operations 5 and 6, which add and delete, and the deletion lets a segment die."""
    before, operations = request.param
    for _ in range(before):
        perform_next(root)
    return Scene(root, operations)


def test_killed_at_any_file_operation_an_add_or_delete_has_happened_or_has_not(crasher: Crasher, scene: Scene) -> None:
    start = read_ledger(scene.root, NAME).revision
    before, after = 0, 0
    for crash_at in range(1000):
        root = copied(scene.root)
        crasher.order(root, operations=scene.operations, crash_at=crash_at)
        fate = crasher.fate()
        acknowledged = max(fate.done, default=start)
        state = check_after_crash(root, acknowledged)
        if not fate.killed:
            break
        before, after = before + (state.revision == acknowledged), after + (state.revision > acknowledged)
        assert set(range(1, acknowledged + 1)) <= set(audited(root))
        recover(root)
    assert acknowledged == start + scene.operations
    assert crash_at > 30  # deaths in this test
    assert before > after > 0  # most of the work comes before the commit, some after it


def test_killed_at_random_moments_nothing_acknowledged_is_lost(crasher: Crasher, root: Path) -> None:
    rng = random.Random(0)
    killed, acknowledged = 0, 0
    while killed < RANDOM_KILLS:
        (pid,) = crasher.order(root, operations=1000)
        crasher.wait_for_operations(rng.randrange(3))
        time.sleep(rng.uniform(0, 0.012))  # about as long as an operation takes
        os.kill(pid, KILLED)
        fate = crasher.fate()
        assert fate.killed
        killed += 1
        assert fate.done == list(range(acknowledged + 1, acknowledged + 1 + len(fate.done)))
        state = check_after_crash(root, max(fate.done, default=acknowledged))
        assert set(fate.done) <= set(audited(root))
        acknowledged = state.revision
    assert acknowledged > RANDOM_KILLS // 2
    recover(root)


def test_two_processes_take_turns_and_readers_see_whole_states(crasher: Crasher, root: Path) -> None:
    crasher.order(root, operations=12, children=2)
    deadline = time.monotonic() + 60
    while (state := read_ledger(root, NAME)).revision < 24 and time.monotonic() < deadline:
        check_state(state)
    first, second = crasher.fate(), crasher.fate()
    assert sorted(first.done + second.done) == list(range(1, 25))
    assert not first.killed
    assert not second.killed
    assert audited(root) == list(range(1, 25))
    check_after_crash(root, 24)


def test_a_disk_that_fails_at_any_file_operation_loses_nothing(scene: Scene) -> None:
    def fail() -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    start = read_ledger(scene.root, NAME).revision
    for crash_at in range(1000):
        root = copied(scene.root)
        done, undo = [start], intercept(crash_at, fail)
        try:
            while len(done) <= scene.operations:
                done.append(perform_next(root))
            break
        except OSError:
            pass
        finally:
            undo()
        check_after_crash(root, done[-1])
        recover(root)
    assert done[-1] == start + scene.operations
    assert crash_at > 30


@pytest.mark.parametrize("before", [0, 4])
def test_everything_is_on_the_disk_before_the_ledger_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """What a power cut could undo: file contents before their fsync, names before that of their folder."""
    for _ in range(before):
        perform_next(root)
    synced = set[tuple[int, int]]()  # inode and time of its last change
    changed = set[int]()  # inodes of folders in which a name is new
    fsync, mkdir, rename, replace = os.fsync, os.mkdir, os.rename, os.replace
    renamed: list[str] = []

    def last_change(status: os.stat_result) -> tuple[int, int]:
        return (status.st_ino, status.st_ctime_ns if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns)

    def is_on_disk(path: Path) -> bool:
        return last_change(path.stat()) in synced

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(last_change(os.fstat(descriptor)))
        changed.discard(os.fstat(descriptor).st_ino)

    def note_mkdir(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        changed.add(path.parent.stat().st_ino)

    def checked_rename(source: Path, target: Path) -> None:
        assert all(is_on_disk(path) for path in (source, *source.iterdir()))
        rename(source, target)
        changed.add(target.parent.stat().st_ino)
        renamed.append(target.name)

    def checked_replace(source: Path, target: Path) -> None:
        assert is_on_disk(source)
        if target.name == "LEDGER":
            assert not changed
        replace(source, target)
        changed.add(target.parent.stat().st_ino)

    for name, function in (
        ("fsync", note_fsync), ("mkdir", note_mkdir), ("rename", checked_rename), ("replace", checked_replace),
    ):  # fmt: skip
        monkeypatch.setattr(os, name, function)
    revision = perform_next(root)
    assert revision == before + 1
    assert renamed == [f"{revision:016d}"]
    assert is_on_disk(root / NAME)
    assert is_on_disk(root / NAME / "audit.jsonl")
