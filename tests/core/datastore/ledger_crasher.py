"""A process whose children learn and delete until they are killed; run by `test_ledger_crashes`.

It imports everything once and forks for each line of its input, so that a death costs milliseconds:

    in   {"root": …, "operations": per child, "children": …, "crash_at": number of a file operation or null}
    out  start <pid of a child>   │   done <revision>   │   end <wait status, one per child>
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from small_segments import NAME, perform_next

_say = os.write
_SIMPLE = ("fsync", "ftruncate", "link", "mkdir", "open", "rename", "replace", "rmdir", "symlink", "truncate", "unlink")


def intercept(crash_at: int, crash: Callable[[], NoReturn]) -> Callable[[], None]:
    """Let the n-th operation on files (from 0) end in a crash: writes in the middle, others before they begin.

    Returns what undoes it.
    """
    calls = 0

    def is_due() -> bool:
        nonlocal calls
        calls += 1
        return calls > crash_at

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_due():
                crash()
            return function(*args, **kwargs)

        return call

    write, write_text = os.write, Path.write_text

    def torn_write(descriptor: int, data: bytes) -> int:
        if is_due():
            write(descriptor, data[: len(data) // 2])
            crash()
        return write(descriptor, data)

    def torn_text(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if is_due():
            write_text(path, text[: len(text) // 2], *args, **kwargs)
            crash()
        return write_text(path, text, *args, **kwargs)

    undo: list[tuple[Any, str, Any]] = [(os, name, getattr(os, name)) for name in _SIMPLE]
    for _, name, function in list(undo):
        setattr(os, name, wrap(function))
    undo += [(os, "write", write), (Path, "write_text", write_text)]
    os.write, Path.write_text = torn_write, torn_text  # type: ignore[assignment, method-assign]
    return lambda: [setattr(*original) for original in undo] and None


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives SIGKILL")


def _child(root: Path, operations: int, crash_at: int | None) -> None:
    if crash_at is not None:
        intercept(crash_at, die)
    for _ in range(operations):
        _say(1, b"done %d\n" % perform_next(root))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / NAME).mkdir()
        perform_next(Path(folder))  # what pyarrow imports at its first use need not be imported by every child
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for _ in range(order["children"]):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    _child(Path(order["root"]), order["operations"], order["crash_at"])
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children.append(pid)
            _say(1, b"start %d\n" % pid)
        for pid in children:
            _say(1, b"end %d\n" % os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
