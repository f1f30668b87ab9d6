"""Looking at everything that a name has on the disk: every checksum, the ledger and the tail, the canaries."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration, read_gate_trees
from knnlm_core.datastore.canaries import SelfTest, self_test
from knnlm_core.datastore.history import read_history
from knnlm_core.datastore.ledger_file import LedgerState, read_ledger, segment_folders
from knnlm_core.datastore.maintenance.rewrite import UNDER_WAY
from knnlm_core.datastore.maintenance.stages import StageProgress, counted, silent
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import open_segment
from knnlm_core.errors import DatastoreNotFound


class VersionCheck(NamedTuple):
    """A version that is whole and finds its canaries."""

    version: str
    files: int
    num_bytes: int
    self_test: SelfTest


class Verification(NamedTuple):
    """What was looked at; a name that is not whole raises instead."""

    versions: tuple[VersionCheck, ...]
    revision: int
    segments: int
    calibrations: int
    leftovers: tuple[str, ...]  # of interrupted work, or of work under way; nobody reads them


def verify(root: Path, name: str, version: str | None = None, *, progress: StageProgress = silent) -> Verification:
    """Compare the sha256 of every file with its manifest, read what has none as a reader does, ask all canaries.

    Args:     version: None for all published ones.
    Raises:
        DatastoreNotFound: no such name or version.
        DatastoreCorrupt: the first file that is damaged, or an index that misses what it used to find.
        DatastoreMismatch: a file of another format version, or a document learned with another language model.
    """
    current = layout.read_current(root, name)
    read_history(root, name)
    published = layout.published_versions(root, name)
    if version is not None and version not in published:
        known = ", ".join(published) or "none"
        raise DatastoreNotFound(f"datastore {name!r} has no version {version!r}; published: {known}")
    versions = published if version is None else [version]
    manifests = [Manifest.read(layout.version_folder(root, name, each) / layout.MANIFEST) for each in versions]
    advance = counted(progress, "checksums", sum(manifest.num_bytes for manifest in manifests))
    for each in versions:
        calibration = current.calibration if each == current.version else None
        Datastore.open(root, name, each, calibration=calibration, checksums=True, progress=advance).close()
    state = read_ledger(root, name)
    _verify_tail(root, name, state, progress)
    calibrations = [read_calibration(root, name, id_) for id_ in layout.calibration_ids(root, name)]
    for each_calibration in calibrations:
        read_gate_trees(root, name, each_calibration)
    advance = counted(progress, "self-test", len(versions))
    checks = []
    for manifest in manifests:
        with Datastore.open_folder(layout.version_folder(root, name, manifest.version)) as store:
            tested = self_test(store)
        checks.append(VersionCheck(manifest.version, len(manifest.files), manifest.num_bytes, tested))
        advance(1)
    orphans = [c.id for c in calibrations if c.datastore_version not in published]
    return Verification(
        tuple(checks), state.revision, len(state.segments), len(calibrations), _leftovers(root, name, state, orphans)
    )


def _verify_tail(root: Path, name: str, state: LedgerState, progress: StageProgress) -> None:
    current = layout.read_current(root, name).version
    shown = Manifest.read(layout.version_folder(root, name, current) / layout.MANIFEST)
    alive = set(state.learned.values())
    advance = counted(progress, "tail", len(state.segments))
    for record in state.segments:
        with open_segment(root, name, record, checksums=True) as segment:
            if record.revision > shown.revision and record.revision in alive:
                segment.require_fits(shown.lm.identity())
        advance(1)


def _leftovers(root: Path, name: str, state: LedgerState, orphans: list[str]) -> tuple[str, ...]:
    home = layout.name_folder(root, name)
    listed = {layout.segment_folder(root, name, record.revision) for record in state.segments}
    left = {*home.glob(f"*{layout.BUILDING_SUFFIX}"), *home.rglob("*.part"), *home.glob(UNDER_WAY)}
    left |= set(segment_folders(home)) - listed
    left |= {layout.calibration_folder(root, name, calibration) for calibration in orphans}
    return tuple(sorted(path.relative_to(home).as_posix() for path in left))
