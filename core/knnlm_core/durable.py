"""Files that survive a crash: whole or absent, never half; and locks that do not."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk: what was renamed or created in it stays so."""
    sync_file(path)


def replace_file(part: Path, path: Path) -> None:
    """Make ``part`` appear under its final name, after its content is on the disk."""
    sync_file(part)
    os.replace(part, path)
    sync_folder(path.parent)


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its final name."""
    return path.with_name(path.name + ".part")


def write_text(path: Path, text: str) -> None:
    """Write a small file at once: readers see the old content or the new, and nothing else."""
    part = part_of(path)
    part.write_text(text, encoding="utf-8", newline="\n")
    replace_file(part, path)


def try_lock(file: IO[str] | int) -> bool:
    """Lock an open file for this process alone, until it closes the file or ends; False where another holds it.

    Raises: OSError: the file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
