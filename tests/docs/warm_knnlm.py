"""The real `knnlm` without its second of imports: a process that has imported everything forks for each command.

    python warm_knnlm.py SOCKET            imports, says "warm", and forks for whoever connects
    python -SE warm_knnlm.py SOCKET ...    what `knnlm ...` calls: hands over arguments, environment and streams, and
                                           ends with the status of the command

The documentation has dozens of commands; importing torch anew for each would take minutes.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import NoReturn

PRELOADED = (
    "knnlm_cli.main",
    "knnlm_cli.score",
    "knnlm_cli.datastore",
    "knnlm_builder.pipeline",
    "knnlm_builder.recalibrate",
    "knnlm_server.app",
    "knnlm_server.run",
    "knnlm_core.datastore.maintenance",
    "sklearn.ensemble",
    "matplotlib.pyplot",
)
JEMALLOC = "jemalloc_bg_thd"  # pyarrow's allocator, which minds forks
_MAX_MESSAGE = 1 << 17


def wait_for_commands(path: str) -> None:
    """Fork for each connection; the fork runs the command as the console script does, and ends as it does."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    assert _threads() <= {"python", JEMALLOC}, f"a process with threads must not fork: {_threads()}"
    gc.collect()
    gc.freeze()  # what is shared stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        print("warm", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _handle(connection)


def _threads() -> set[str]:
    """Names of this process' threads; its first one is called as its program."""
    folder = "/proc/self/task"
    names = set()
    for thread in os.listdir(folder):
        with open(f"{folder}/{thread}/comm") as file:
            name = file.read().strip()
        names.add("python" if int(thread) == os.getpid() else name)
    return names


def _handle(connection: socket.socket) -> None:
    """In a fork: another one becomes the command, this one tells how it ended."""
    message, streams, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 3)
    pid = os.fork()
    if pid:
        connection.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    given = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["environment"])
    sys.argv = ["knnlm", *given["arguments"]]
    _run_and_end()


def _run_and_end() -> NoReturn:
    """What the console script does, ended as multiprocessing ends its forks.

    Taking the interpreter apart would copy every page that it shares, which takes longer than most commands.
    """
    from knnlm_cli.main import main

    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def call(path: str, arguments: list[str]) -> int:
    """Run a command there; signals that end this process end the command."""
    message = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(message).encode()], [0, 1, 2])
        pid = int(connection.recv(64))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(connection.recv(64))
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if len(sys.argv) == 2:
        wait_for_commands(sys.argv[1])
    else:
        sys.exit(call(sys.argv[1], sys.argv[3:]))
