"""Where everything lives under a root; the only module that turns names into paths.

ROOT/<name>/CURRENT                        "<version> <calibration id or ->\\n"
           /HISTORY                        what CURRENT was
           /LEDGER                         what was learned and deleted while serving
           /audit.jsonl                    who did so, and when
           /<version>/                     a published version, never modified
           /<version>.tmp/                 a build under way
           /calibrations/<id>/             for one version each
           /tail/<revision>/               documents learned by one request
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from knnlm_core.durable import write_text
from knnlm_core.errors import DatastoreCorrupt, DatastoreNotFound, InvalidParameter

AUDIT = "audit.jsonl"
BUILD_LOCK = "build.lock"
BUILDING_SUFFIX = ".tmp"
CALIBRATION = "calibration.json"
CALIBRATIONS = "calibrations"
CANARIES = "canaries.arrow"
CURRENT = "CURRENT"
DOCUMENTS = "documents.parquet"
HELD_OUT = "held_out.parquet"
HISTORY = "HISTORY"
INDEX = "index.faiss"
KEYS = "keys.arrow"
LEDGER = "LEDGER"
LEDGER_LOCK = "ledger.lock"
MANIFEST = "manifest.json"
SEGMENT = "segment.json"
TAIL = "tail"
TRAINED = "trained.faiss"
VALUES = "values.arrow"

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
DIGEST_PATTERN = r"[0-9a-f]{16}"
_NAME = re.compile(NAME_PATTERN)
_DIGEST = re.compile(DIGEST_PATTERN)
_RESERVED = frozenset({CALIBRATIONS, "tombstones", TAIL, "current"})
_CURRENT_BYTES = 64  # the longest valid line has 34


class Current(NamedTuple):
    """What a name means now."""

    version: str
    calibration: str | None


def check_name(name: str) -> str:
    """Return a datastore's name unchanged. Raises InvalidParameter: it is not fit to be one."""
    if not is_name(name):
        raise InvalidParameter(
            "`name` of a datastore must be 1 to 63 of a-z, 0-9, '.', '_', '-', start with a letter or digit, not end "
            f"in {BUILDING_SUFFIX!r} and be none of {', '.join(sorted(_RESERVED))}; got {name[:100]!r}",
            param="name",
        )
    return name


def check_digest(field: str, value: str) -> str:
    """Return a version or calibration id unchanged. Raises InvalidParameter: not 16 lowercase hex digits."""
    if not _DIGEST.fullmatch(value):
        raise InvalidParameter(f"`{field}` must be 16 lowercase hex digits, got {value[:100]!r}", param=field)
    return value


def name_folder(root: Path, name: str) -> Path:
    """Everything of one name."""
    return root / check_name(name)


def version_folder(root: Path, name: str, version: str) -> Path:
    """A published version."""
    return name_folder(root, name) / check_digest("version", version)


def building_folder(root: Path, name: str, version: str) -> Path:
    """A version while it is being built."""
    folder = version_folder(root, name, version)
    return folder.with_name(folder.name + BUILDING_SUFFIX)


def calibration_folder(root: Path, name: str, calibration: str) -> Path:
    """One calibration."""
    return name_folder(root, name) / CALIBRATIONS / check_digest("calibration", calibration)


def segment_folder(root: Path, name: str, revision: int) -> Path:
    """What one request taught the name."""
    return name_folder(root, name) / TAIL / f"{revision:016d}"


def shard_name(number: int) -> str:
    """``shard-00000``, ``shard-00001``, …"""
    return f"shard-{number:05d}"


def published_names(root: Path) -> list[str]:
    """Names under the root that have a current version, sorted.

    Raises: DatastoreNotFound: the root is not a folder.
    """
    return [name for name in _valid_subfolders(root, is_name) if (root / name / CURRENT).is_file()]


def published_versions(root: Path, name: str) -> list[str]:
    """Published versions of a name, sorted; there is no order in time among them.

    Raises: DatastoreNotFound: no such name.
    """
    folder = name_folder(root, name)
    versions = _valid_subfolders(folder, lambda entry: _DIGEST.fullmatch(entry) is not None)
    return [version for version in versions if (folder / version / MANIFEST).is_file()]


def calibration_ids(root: Path, name: str) -> list[str]:
    """Calibrations of a name, for whichever version, sorted."""
    folder = name_folder(root, name) / CALIBRATIONS
    if not folder.is_dir():
        return []
    ids = _valid_subfolders(folder, lambda entry: _DIGEST.fullmatch(entry) is not None)
    # An interrupted write leaves a folder without its calibration.
    return [calibration for calibration in ids if (folder / calibration / CALIBRATION).is_file()]


def read_current(root: Path, name: str) -> Current:
    """What the name means now.

    Raises:
        DatastoreNotFound: no such name, or nothing of it is published.
        DatastoreCorrupt: CURRENT is not one valid line.
    """
    path = name_folder(root, name) / CURRENT
    try:
        with path.open("rb") as file:
            line = file.read(_CURRENT_BYTES + 1)
    except FileNotFoundError:
        known = ", ".join(published_names(root)) or "none"
        raise DatastoreNotFound(f"no datastore {name!r} is published under {root}; published: {known}") from None
    except OSError as error:
        raise DatastoreCorrupt(f"{path} cannot be read: {error.strerror}") from error
    match = re.fullmatch(rb"([0-9a-f]{16}) ([0-9a-f]{16}|-)\n", line)
    if match is None:
        raise DatastoreCorrupt(f"{path} must be one line `<version> <calibration id or ->`, it is {line!r}")
    version, calibration = match[1].decode(), match[2].decode()
    return Current(version, None if calibration == "-" else calibration)


def write_current(root: Path, name: str, current: Current) -> None:
    """Retarget a name in one step. Does not look whether the target exists; `publish.set_current` does."""
    version = check_digest("version", current.version)
    calibration = "-" if current.calibration is None else check_digest("calibration", current.calibration)
    write_text(name_folder(root, name) / CURRENT, f"{version} {calibration}\n")


def is_name(entry: str) -> bool:
    """Whether a string may be a datastore's name."""
    return bool(_NAME.fullmatch(entry)) and not entry.endswith(BUILDING_SUFFIX) and entry not in _RESERVED


def _valid_subfolders(folder: Path, valid: Callable[[str], bool]) -> list[str]:
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise DatastoreNotFound(f"there is no folder {folder}") from None
    return sorted(entry.name for entry in entries if valid(entry.name) and entry.is_dir())
