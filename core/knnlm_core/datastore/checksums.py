"""Do the files of a folder agree with its manifest: names and sizes at every open, sha256 on demand.

The manifest is that of a version, or the ``segment.json`` of a segment.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from knnlm_core.datastore import layout
from knnlm_core.datastore.manifest import FileRecord
from knnlm_core.errors import DatastoreCorrupt

_BLOCK_BYTES = 4 * 1024 * 1024

Progress = Callable[[int], None]


class HasFiles(Protocol):
    """A manifest, as far as files go."""

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Every file of the folder but the manifest itself."""


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
        if path != layout.MANIFEST
    }


def check_sizes(folder: Path, manifest: HasFiles, *, manifest_file: str = layout.MANIFEST) -> None:
    """Compare names and sizes.

    Raises: DatastoreCorrupt: a file is missing, has another size, or is not in the manifest.
    """
    sizes = _list_files(folder)
    sizes.pop(manifest_file, None)
    for path, record in manifest.files.items():
        if path not in sizes:
            raise DatastoreCorrupt(f"{folder / path} is missing; the manifest has it with {record.bytes} bytes")
        if sizes[path] != record.bytes:
            raise DatastoreCorrupt(f"{folder / path} has {sizes[path]} bytes, the manifest needs {record.bytes}")
    if extra := sorted(sizes.keys() - manifest.files.keys()):
        raise DatastoreCorrupt(f"{folder / extra[0]} is not in the manifest; no other files belong here")


def verify_files(
    folder: Path, manifest: HasFiles, progress: Progress | None = None, *, manifest_file: str = layout.MANIFEST
) -> None:
    """Compare names, sizes and sha256 of every file: as much work as reading all of them.

    Raises: DatastoreCorrupt: the first file that differs.
    """
    check_sizes(folder, manifest, manifest_file=manifest_file)
    for path, record in manifest.files.items():
        try:
            have = hash_file(folder / path, progress)
        except OSError as error:
            raise DatastoreCorrupt(f"{folder / path} cannot be read: {error.strerror}") from error
        if have != record.sha256:
            raise DatastoreCorrupt(f"{folder / path} has sha256 {have}, the manifest needs {record.sha256}")


def verify_once(folder: Path, manifest: HasFiles, verified: Path, progress: Progress | None = None) -> bool:
    """`verify_files` at the first use of a version on this machine; later uses trust sizes and modification times.

    Args:     verified: folder of empty marker files, one per verified state of a version; made if absent. Where it
                  cannot be written, every use verifies.
              progress: gets the bytes of each block that was hashed.
    Returns:  whether the files were read now.
    Raises:   DatastoreCorrupt: as `verify_files`.
    """
    check_sizes(folder, manifest)
    if is_verified(folder, manifest, verified):
        return False
    verify_files(folder, manifest, progress)
    remember_verified(folder, manifest, verified)
    return True


def is_verified(folder: Path, manifest: HasFiles, verified: Path) -> bool:
    """Whether the version was verified on this machine, and looks as it did then."""
    try:
        return _marker(folder, manifest, verified).exists()
    except OSError:
        return False


def remember_verified(folder: Path, manifest: HasFiles, verified: Path) -> None:
    """Let `is_verified` be true from now on; nothing is remembered where the folder of markers cannot be written."""
    with suppress(OSError):
        marker = _marker(folder, manifest, verified)
        verified.mkdir(parents=True, exist_ok=True)
        marker.touch()


def _marker(folder: Path, manifest: HasFiles, verified: Path) -> Path:
    state = hashlib.sha256((folder / layout.MANIFEST).read_bytes())
    state.update(os.fsencode(folder.resolve()))
    for file in sorted(manifest.files):
        status = (folder / file).stat()
        state.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return verified / state.hexdigest()
