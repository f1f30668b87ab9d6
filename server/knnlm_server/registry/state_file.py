"""The file that remembers what a server serves: written at every change, read at the next start."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pydantic import ValidationError

from knnlm_core.durable import try_lock, write_text
from knnlm_core.errors import DatastoreCorrupt
from knnlm_server.registry.serving import Serving

logger = logging.getLogger(__name__)

MAX_STATE_BYTES = 4 * 1024 * 1024


class StateFile:
    """A server's own file of state, from `open` to `close`.

    Two servers over one root must not overwrite each other's state: the first one to open a file owns it, others read
    it and write nothing.

    Args:     path: None for a server that remembers nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock: int | None = None
        self._problem: str | None = "no file for it (--state)"

    @property
    def is_persistent(self) -> bool:
        """Whether the last change was written."""
        return self._problem is None

    def open(self) -> Serving:
        """Take the file and read it; nothing is served yet where there is none.

        Raises: DatastoreCorrupt: the file is not what a server writes.
        """
        if self._path is None:
            return Serving()
        self._problem = self._take(self._path)
        if self._problem is not None:
            logger.warning("state not persistent file=%s reason=%s", self._path, self._problem)
        return _read(self._path)

    def write(self, serving: Serving) -> None:
        """Replace the content in one step; where that fails, says so once and goes on without."""
        if self._path is None or self._lock is None:
            return
        try:
            write_text(self._path, serving.model_dump_json(indent=1) + "\n")
        except OSError as error:
            if self._problem is None:
                logger.warning("state not persistent file=%s reason=%s", self._path, error)
            self._problem = str(error)
        else:
            self._problem = None

    def close(self) -> None:
        """Let another server have the file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, path: Path) -> str | None:
        """Why the file cannot be this server's own, if so."""
        try:
            descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            return str(error)
        try:
            is_ours = try_lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            return str(error)
        if not is_ours:
            os.close(descriptor)
            return "another server uses it"
        self._lock = descriptor
        return None


def _read(path: Path) -> Serving:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_STATE_BYTES + 1)
    except FileNotFoundError:
        return Serving()
    except OSError as error:
        raise _corrupt(path, str(error)) from error
    if len(content) > MAX_STATE_BYTES:
        raise _corrupt(path, f"it must have at most {MAX_STATE_BYTES} bytes, it has more")
    try:
        return Serving.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise _corrupt(path, f"{field}: {first['msg']}" if field else first["msg"]) from error


def _corrupt(path: Path, problem: str) -> DatastoreCorrupt:
    return DatastoreCorrupt(f"{path} is not a server's state: {problem}; mend it, or remove it to start without")
