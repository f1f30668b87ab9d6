"""A process whose children compact, purge, prune and roll back until they are killed; for `test_maintenance_crashes`.

It imports everything once and forks for each line of its input. It must not search itself: faiss does not survive a
fork after that.

    in   {"root": …, "operation": …, "crash_at": number of a file operation or null}
    out  <wait status> <file operations, where nothing crashed; else −1>
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from ledger_crasher import _SIMPLE, die, intercept
from maintained_store import NAME

from knnlm_core.datastore.history import rollback
from knnlm_core.datastore.maintenance.compact import compact
from knnlm_core.datastore.maintenance.prune import prune
from knnlm_core.datastore.maintenance.purge import purge

PURGED = ["doc/3", "new/c", "held/1"]  # in the version, in the tail beside others, in held-out text
OPERATIONS: dict[str, Callable[[Path], Any]] = {
    "compact": lambda root: compact(root, NAME),
    "purge": lambda root: purge(root, NAME, PURGED),
    "prune": lambda root: prune(root, NAME, 1),
    "rollback": lambda root: rollback(root, NAME),
}


def count_calls() -> Callable[[], int]:
    """Count what `intercept` would intercept."""
    calls = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    for owner, name in [*((os, name) for name in (*_SIMPLE, "write")), (Path, "write_text")]:
        setattr(owner, name, counting(getattr(owner, name)))
    return lambda: calls


def main() -> None:
    pa.array([0]).to_numpy()  # what pyarrow imports at its first use need not be imported by every child
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            status = 1
            try:
                if order["crash_at"] is None:
                    calls = count_calls()
                    OPERATIONS[order["operation"]](Path(order["root"]))
                    os.write(writer, b"%d" % calls())
                else:
                    intercept(order["crash_at"], die)
                    OPERATIONS[order["operation"]](Path(order["root"]))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writer)
        ended = os.waitpid(pid, 0)[1]
        print(ended, os.read(reader, 32).decode() or -1, flush=True)
        os.close(reader)


if __name__ == "__main__":
    main()
