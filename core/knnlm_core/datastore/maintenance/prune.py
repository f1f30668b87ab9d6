"""Retention: removing versions that nobody goes back to, and learned documents that every kept version holds itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore import layout
from knnlm_core.datastore.history import previous, read_history, revise_history
from knnlm_core.datastore.ledger import ledger_lock
from knnlm_core.datastore.ledger_file import LedgerState, read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.maintenance.removal import orphaned_calibrations, remove_calibration, remove_version
from knnlm_core.datastore.maintenance.rewrite import discard_leftover
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.errors import InvalidParameter


class Retention(NamedTuple):
    """What is to be kept of a name, and what is not."""

    kept: tuple[str, ...]  # versions, the newest first
    versions: tuple[str, ...]  # to be removed
    calibrations: tuple[str, ...]
    segments: tuple[int, ...]  # revisions


def prune(root: Path, name: str, keep: int, *, protect: Collection[str] = (), dry_run: bool = False) -> list[str]:
    """Remove old versions with their calibrations, and segments that no kept version needs; returns what, by folder.

    Kept are: the current version, the one that `rollback` would go back to, the last ``keep`` that were current, and
    ``protect``. A segment goes when all its documents are dead, or when every kept version has it folded in. Documents
    that were learned are then only in the versions that hold them: one that is built later does not have them.

    Args:     keep: how many versions, the current one included.
              protect: versions that somebody serves.
              dry_run: only say what would be removed.
    Raises:
        InvalidParameter: ``keep`` is below 1.
        DatastoreNotFound: nothing of the name is published.
        DatastoreBusy, DatastoreReadOnly: see `lock_versions` and `ledger_lock`.
    """
    if keep < 1:
        raise InvalidParameter(f"`keep` must be at least 1, got {keep}", param="keep")
    if dry_run:
        return _folders(choose(root, name, keep, protect))
    with lock_versions(root, name):
        discard_leftover(root, name)
        chosen = choose(root, name, keep, protect)
        gone = frozenset(chosen.versions)
        if gone:
            revise_history(root, name, lambda entry: None if entry.version in gone else entry)
        for version in chosen.versions:
            remove_version(root, name, version)
        for calibration in chosen.calibrations:
            remove_calibration(root, name, calibration)
        if (layout.name_folder(root, name) / layout.TAIL).is_dir():
            with ledger_lock(root, name) as writer:
                # What was learned or deleted meanwhile changes nothing: dead documents stay dead.
                if chosen.segments:
                    writer.commit(writer.state.without_segments(chosen.segments))
                writer.remove_leftovers()
        return _folders(chosen)


def choose(root: Path, name: str, keep: int, protect: Collection[str] = ()) -> Retention:
    """What `prune` would keep and remove."""
    current = layout.read_current(root, name).version
    before = previous(root, name)
    order = _newest_first(root, name)
    wanted = {current, *order[:keep], *protect, *([before.version] if before is not None else [])}
    kept = tuple(version for version in order if version in wanted)
    gone = tuple(version for version in order if version not in wanted)
    revisions = [_revision(root, name, version) for version in kept]
    return Retention(
        kept,
        gone,
        tuple(orphaned_calibrations(root, name, frozenset(gone))),
        _unneeded(read_ledger(root, name), min(revisions)),
    )


def _newest_first(root: Path, name: str) -> list[str]:
    """Published versions: those that were current by when they were last, then the others by when they were written."""
    published = layout.published_versions(root, name)
    was_current = dict.fromkeys(entry.version for entry in reversed(read_history(root, name)))
    order = [version for version in was_current if version in published]
    others = [version for version in published if version not in was_current]

    def written(version: str) -> int:
        return (layout.version_folder(root, name, version) / layout.MANIFEST).stat().st_mtime_ns

    return order + sorted(others, key=written, reverse=True)


def _revision(root: Path, name: str, version: str) -> int:
    return Manifest.read(layout.version_folder(root, name, version) / layout.MANIFEST).revision


def _unneeded(state: LedgerState, folded: int) -> tuple[int, ...]:
    """Segments without a living document, or that versions of a revision ≥ ``folded`` do not show."""
    alive = set(state.learned.values())
    return tuple(r.revision for r in state.segments if r.revision not in alive or r.revision <= folded)


def _folders(chosen: Retention) -> list[str]:
    return [
        *chosen.versions,
        *(f"{layout.CALIBRATIONS}/{calibration}" for calibration in chosen.calibrations),
        *(f"{layout.TAIL}/{revision:016d}" for revision in chosen.segments),
    ]
