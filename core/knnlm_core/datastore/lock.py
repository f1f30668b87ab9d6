"""One build, compaction, purge, rollback or pruning at a time per name: whatever writes CURRENT or removes versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.durable import try_lock
from knnlm_core.errors import DatastoreBusy, DatastoreNotFound, DatastoreReadOnly


@contextmanager
def lock_versions(root: Path, name: str) -> Iterator[Path]:
    """Hold the right to write versions of a name; yields its folder. The lock ends with the process.

    Raises:
        DatastoreNotFound: no such name.
        DatastoreBusy: a build, a calibration, a compaction or a purge of the name is under way.
        DatastoreReadOnly: the folder cannot be written.
    """
    folder = layout.name_folder(root, name)
    if not folder.is_dir():
        raise DatastoreNotFound(f"there is no folder {folder}")
    try:
        file = (folder / layout.BUILD_LOCK).open("w")
    except OSError as error:
        raise DatastoreReadOnly(f"{folder} cannot be written: {error.strerror}") from error
    with file:
        if not try_lock(file):
            raise DatastoreBusy(f"a build, a calibration, a compaction or a purge of {name!r} is under way in {folder}")
        yield folder
