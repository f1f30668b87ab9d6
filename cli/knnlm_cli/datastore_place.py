"""Which datastore a command is about: ROOT/NAME or ROOT/NAME@VERSION."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore import layout
from knnlm_core.errors import DatastoreNotFound, InvalidParameter


class Place(NamedTuple):
    """A datastore under a root, and one of its versions."""

    root: Path
    name: str
    version: str | None  # None: the one that CURRENT names

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def read_place(given: str, *, with_version: bool = False) -> Place:
    """Take apart what was given on the command line.

    Raises:
        InvalidParameter: it is not ROOT/NAME, or names a version where that means nothing.
        DatastoreNotFound: there is no such folder.
    """
    form = "ROOT/NAME or ROOT/NAME@VERSION" if with_version else "ROOT/NAME"
    path, _, version = given.rpartition("@") if "@" in Path(given).name else (given, "", None)
    folder = Path(path).expanduser()
    if not folder.name or folder.name == ".." or (version is not None and not with_version):
        raise InvalidParameter(f"the datastore must be given as {form}, got {given!r}", param="datastore")
    layout.check_name(folder.name)
    if version is not None:
        layout.check_digest("version", version)
    if not folder.is_dir():
        known = ", ".join(layout.published_names(folder.parent)) if folder.parent.is_dir() else "none"
        raise DatastoreNotFound(f"there is no datastore {folder}; under {folder.parent}: {known or 'none'}")
    if not (folder / layout.CURRENT).exists() and (inside := layout.published_names(folder)):
        raise DatastoreNotFound(f"{folder} is a folder of datastores; add the name of one: {', '.join(inside)}")
    return Place(folder.parent, folder.name, version)


def actor() -> str | None:
    """Who is at the command line, for the audit log; None where the system does not know."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None
