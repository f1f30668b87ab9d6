"""From a finished build to what a name means: rename, then CURRENT."""

from __future__ import annotations

import os
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.checksums import check_sizes
from knnlm_core.datastore.history import record_current
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.durable import sync_file, sync_folder
from knnlm_core.errors import BuildConflict, DatastoreCorrupt, DatastoreMismatch, DatastoreNotFound


def publish(root: Path, name: str, version: str, calibration: str | None = None) -> Path:
    """Publish a finished build and make it current; returns its folder, which nobody modifies from here on.

    A crash before the rename leaves a build; one after it leaves a published version that is not current yet, which
    `set_current` completes.

    Raises:
        BuildConflict: the version is published already.
        DatastoreNotFound: there is no such build, or no such calibration.
        DatastoreCorrupt: the build's files are not those of its manifest.
        DatastoreMismatch: the calibration is for another version.
    """
    _check_calibration(root, name, version, calibration)
    final = place(root, name, version)
    set_current(root, name, version, calibration)
    return final


def place(root: Path, name: str, version: str) -> Path:
    """Publish a finished build without making it current; returns its folder.

    Raises: as `publish`.
    """
    building = layout.building_folder(root, name, version)
    final = layout.version_folder(root, name, version)
    if final.exists():
        raise BuildConflict(f"version {version} of {name!r} is published already; a published version never changes")
    manifest = Manifest.read(building / layout.MANIFEST)
    for field, have, need in (("name", manifest.name, name), ("version", manifest.version, version)):
        if have != need:
            raise DatastoreCorrupt(f"{building / layout.MANIFEST}: {field} is {have!r}, its folder needs {need!r}")
    check_sizes(building, manifest)
    for folder, _, files in os.walk(building):
        for file in files:
            sync_file(Path(folder, file))
        sync_folder(Path(folder))
    try:
        os.rename(building, final)
    except OSError as error:
        if final.exists():
            raise BuildConflict(f"version {version} of {name!r} was published by another build") from error
        raise
    sync_folder(final.parent)
    return final


def set_current(root: Path, name: str, version: str, calibration: str | None = None) -> None:
    """Retarget a name to a published version and one of its calibrations, in one step; HISTORY notes it before.

    Raises:
        DatastoreNotFound: the version or the calibration does not exist.
        DatastoreMismatch: the calibration is for another version.
    """
    if not (layout.version_folder(root, name, version) / layout.MANIFEST).is_file():
        known = ", ".join(layout.published_versions(root, name)) or "none"
        raise DatastoreNotFound(f"version {version} of {name!r} is not published; published: {known}")
    _check_calibration(root, name, version, calibration)
    current = layout.Current(version, calibration)
    record_current(root, name, current)
    layout.write_current(root, name, current)


def _check_calibration(root: Path, name: str, version: str, calibration: str | None) -> None:
    if calibration is None:
        return
    made_for = read_calibration(root, name, calibration).datastore_version
    if made_for != version:
        raise DatastoreMismatch(
            name,
            field=f"datastore_version of calibration {calibration}",
            have=made_for,
            need=version,
            needed_by="the version to be made current",
        )
