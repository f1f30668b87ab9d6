"""Do the files of a version agree with its manifest: names and sizes at every open, sha256 on demand."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.manifest import FileRecord, Manifest
from knnlm_core.errors import DatastoreCorrupt

_BLOCK_BYTES = 4 * 1024 * 1024

Progress = Callable[[int], None]


def _list_files(folder: Path) -> dict[str, int]:
    """Relative POSIX path → size of every regular file; anything else but a folder is refused."""
    sizes: dict[str, int] = {}
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    sizes[Path(entry.path).relative_to(folder).as_posix()] = status.st_size
                else:
                    raise DatastoreCorrupt(f"{entry.path} must be a regular file; links and devices are refused")
    sizes.pop(layout.MANIFEST, None)
    return sizes


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """sha256 of a file in hex, read in blocks; ``progress`` gets the bytes of each."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            if progress is not None:
                progress(size)
    return digest.hexdigest()


def record_files(folder: Path, progress: Progress | None = None) -> dict[str, FileRecord]:
    """What the manifest says about every file of a finished build, by path."""
    return {
        path: FileRecord(bytes=size, sha256=hash_file(folder / path, progress))
        for path, size in sorted(_list_files(folder).items())
    }


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare names and sizes.

    Raises: DatastoreCorrupt: a file is missing, has another size, or is not in the manifest.
    """
    sizes = _list_files(folder)
    for path, record in manifest.files.items():
        if path not in sizes:
            raise DatastoreCorrupt(f"{folder / path} is missing; the manifest has it with {record.bytes} bytes")
        if sizes[path] != record.bytes:
            raise DatastoreCorrupt(f"{folder / path} has {sizes[path]} bytes, the manifest needs {record.bytes}")
    if extra := sorted(sizes.keys() - manifest.files.keys()):
        raise DatastoreCorrupt(f"{folder / extra[0]} is not in the manifest; a version has no other files")


def verify_files(folder: Path, manifest: Manifest, progress: Progress | None = None) -> None:
    """Compare names, sizes and sha256 of every file: as much work as reading all of them.

    Raises: DatastoreCorrupt: the first file that differs.
    """
    check_sizes(folder, manifest)
    for path, record in manifest.files.items():
        if (have := hash_file(folder / path, progress)) != record.sha256:
            raise DatastoreCorrupt(f"{folder / path} has sha256 {have}, the manifest needs {record.sha256}")


def verify_once(folder: Path, manifest: Manifest, verified: Path) -> None:
    """`verify_files` at the first use of a version on this machine; later uses trust sizes and modification times.

    Args:     verified: folder of empty marker files, one per verified state of a version; made if absent. Where it
                  cannot be written, every use verifies.
    Raises:   DatastoreCorrupt: as `verify_files`.
    """
    state = hashlib.sha256((folder / layout.MANIFEST).read_bytes())
    state.update(os.fsencode(folder.resolve()))
    for file in sorted(manifest.files):
        status = (folder / file).stat()
        state.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    marker = verified / state.hexdigest()
    with suppress(OSError):
        if marker.exists():
            return
    verify_files(folder, manifest)
    with suppress(OSError):
        verified.mkdir(parents=True, exist_ok=True)
        marker.touch()
