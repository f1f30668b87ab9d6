"""Removing versions and what belongs to them; what is half removed is never taken for whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.durable import sync_folder

_DOOMED = ".gone" + layout.BUILDING_SUFFIX


def remove_version(root: Path, name: str, version: str) -> Path:
    """Remove a published version that nothing refers to; whoever has it open can go on reading what is mapped."""
    folder = layout.version_folder(root, name, version)
    # Renamed first: half of a version under its own name would be a damaged one.
    doomed = folder.with_name(folder.name + _DOOMED)
    os.rename(folder, doomed)
    sync_folder(folder.parent)
    shutil.rmtree(doomed)
    return folder


def remove_doomed(root: Path, name: str) -> None:
    """Remove what a removal that was killed has left of versions and calibrations."""
    home = layout.name_folder(root, name)
    for folder in (*home.glob(f"*{_DOOMED}"), *(home / layout.CALIBRATIONS).glob("*")):
        if folder.name.endswith(_DOOMED) or (folder.is_dir() and not (folder / layout.CALIBRATION).exists()):
            shutil.rmtree(folder)


def orphaned_calibrations(root: Path, name: str, gone: frozenset[str] = frozenset()) -> list[str]:
    """Calibrations of versions that are not published, or are about to be removed."""
    stay = set(layout.published_versions(root, name)) - gone
    return [
        calibration
        for calibration in layout.calibration_ids(root, name)
        if read_calibration(root, name, calibration).datastore_version not in stay
    ]


def remove_calibration(root: Path, name: str, calibration: str) -> Path:
    """Remove a calibration and what lies beside it."""
    folder = layout.calibration_folder(root, name, calibration)
    (folder / layout.CALIBRATION).unlink(missing_ok=True)  # without it the folder is nothing
    shutil.rmtree(folder)
    return folder
