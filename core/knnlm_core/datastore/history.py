"""What a name meant before: HISTORY, and the way back.

HISTORY is written before CURRENT is replaced, so after a crash it may name what never came into effect, or lack what
still holds. CURRENT decides: whatever stands after its last mention is dropped, and it is added where it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import read_calibration
from knnlm_core.datastore.layout import Current
from knnlm_core.datastore.ledger import append_audit, writing
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.lock import lock_versions
from knnlm_core.datastore.manifest import Digest16
from knnlm_core.durable import write_text
from knnlm_core.errors import DatastoreConflict, DatastoreCorrupt, DatastoreNotFound

MAX_HISTORY = 32
_MAX_BYTES = 64 * 1024


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Digest16
    calibration: Digest16 | None


class _History(RootModel[tuple[_Entry, ...]]):
    pass


def read_history(root: Path, name: str) -> tuple[Current, ...]:
    """What was current, newest last; the last is what CURRENT names. Empty where nothing is published.

    Raises: DatastoreCorrupt: HISTORY or CURRENT is not what it should be.
    """
    try:
        current = layout.read_current(root, name)
    except DatastoreNotFound:
        return ()
    written = _read(layout.name_folder(root, name) / layout.HISTORY)
    if current not in written:
        return (*written, current)
    last = max(at for at, entry in enumerate(written) if entry == current)
    return written[: last + 1]


def record_current(root: Path, name: str, current: Current) -> None:
    """Note what is about to become current. Raises: as `read_history`."""
    history = read_history(root, name)
    if not history or history[-1] != current:
        _write(root, name, (*history, current))


def revise_history(root: Path, name: str, revise: Callable[[Current], Current | None]) -> None:
    """Replace what was current by something else, or by nothing; for versions that are about to be removed.

    CURRENT itself is not touched: `layout.write_current` has to follow where what it names is replaced.
    """
    revised: list[Current] = []
    for entry in read_history(root, name):
        now = revise(entry)
        if now is not None and (not revised or revised[-1] != now):
            revised.append(now)
    _write(root, name, revised)


def previous(root: Path, name: str) -> Current | None:
    """What `rollback` would go back to: what was current before and is still published; None if there is nothing."""
    history = read_history(root, name)
    published = set(layout.published_versions(root, name)) if history else set()
    return next((e for e in reversed(history[:-1]) if e != history[-1] and e.version in published), None)


def rollback(root: Path, name: str, *, actor: str | None = None) -> Current:
    """Make current again what was current before; doing it again goes back further.

    What is left behind stays published, but HISTORY forgets that it was current. Documents that were deleted since
    stay deleted, and those learned since stay: both belong to the name, not to a version.

    Raises:
        DatastoreNotFound: nothing of the name is published, or the calibration is gone.
        DatastoreConflict: nothing came before.
        DatastoreBusy, DatastoreReadOnly: see `lock_versions`.
    """
    with lock_versions(root, name) as folder:
        now = layout.read_current(root, name)
        target = previous(root, name)
        if target is None:
            raise DatastoreConflict(
                f"nothing was current before version {now.version} of {name!r} and is still published"
            )
        if target.calibration is not None:
            read_calibration(root, name, target.calibration)
        history = read_history(root, name)
        at = max(number for number, entry in enumerate(history[:-1]) if entry == target)
        with writing(folder):
            _write(root, name, history[: at + 1])
            layout.write_current(root, name, target)
        append_audit(root, name, "rollback", read_ledger(root, name).revision, [], actor)
        return target


def _read(path: Path) -> tuple[Current, ...]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return ()
    try:
        entries = _History.model_validate_json(raw).root
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise DatastoreCorrupt(f"{path} is not a list of versions and calibrations: {reason}") from error
    return tuple(Current(entry.version, entry.calibration) for entry in entries)


def _write(root: Path, name: str, history: Iterable[Current]) -> None:
    kept = [entry._asdict() for entry in history][-MAX_HISTORY:]
    write_text(layout.name_folder(root, name) / layout.HISTORY, json.dumps(kept, indent=2) + "\n")
