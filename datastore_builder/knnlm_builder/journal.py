"""One build at a time per name, and what an interrupted one left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.durable import try_lock
from knnlm_core.errors import BuildConflict, InvalidParameter

_PLAN = "plan.tmp"


@contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """Hold a name's folder for one build; yields an empty folder for the plan.

    The lock ends with the process, however it ends, so a killed build blocks nobody.

    Raises:
        BuildConflict: another process is building the same name.
        InvalidParameter: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / layout.BUILD_LOCK).open("w")
    except OSError as error:
        raise InvalidParameter(f"`output`: {folder} cannot be written: {error.strerror}", param="output") from error
    with file as lock:
        if not try_lock(lock):
            raise BuildConflict(
                f"another build of this datastore is under way, or a change of its versions, in {folder}"
            )
        plan = folder / _PLAN
        shutil.rmtree(plan, ignore_errors=True)
        plan.mkdir()
        try:
            yield plan
        finally:
            shutil.rmtree(plan, ignore_errors=True)


def discard_other_builds(folder: Path, keep: Path) -> list[Path]:
    """Remove half-built versions other than the one about to be built: their inputs have changed."""
    left = [path for path in folder.glob("*.tmp") if path != keep and path.name != _PLAN and path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return left


def discard_partial_files(folder: Path) -> None:
    """Remove files that an interrupted build was writing: they never got their final names."""
    for path in folder.rglob("*.part"):
        path.unlink()
