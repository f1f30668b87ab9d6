"""What `knnlm datastore list` and `inspect` say, as the JSON that they print; field names are those of the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knnlm_cli.datastore_place import Place
from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import find_calibration, read_calibration
from knnlm_core.datastore.history import previous, read_history
from knnlm_core.datastore.ledger_file import LedgerState, read_ledger
from knnlm_core.datastore.maintenance.versions import list_versions
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.errors import DatastoreNotFound, KnnlmError


def list_datastores(root: Path) -> list[dict[str, Any]]:
    """A card of every published datastore; one that cannot be read has an ``error`` instead."""
    cards = []
    for name in layout.published_names(root):
        try:
            cards.append(card(Place(root, name, None)))
        except KnnlmError as error:
            told = {"message": error.message, "code": error.code}
            cards.append({"object": "datastore", "name": name, "version": None, "error": told})
    return cards


def card(place: Place) -> dict[str, Any]:
    """The identity of a version and what was learned and deleted beside it; nothing but small files is read."""
    root, name, _ = place
    current = layout.read_current(root, name)
    version = place.version or current.version
    if version not in (published := layout.published_versions(root, name)):
        raise DatastoreNotFound(f"datastore {name!r} has no version {version!r}; published: {', '.join(published)}")
    manifest = Manifest.read(layout.version_folder(root, name, version) / layout.MANIFEST)
    state = read_ledger(root, name)
    shown = [record for record in state.segments if record.revision > manifest.revision]
    on_disk = {record.revision for record in shown}
    before = previous(root, name)
    calibration = current.calibration if version == current.version else find_calibration(root, name, version)
    return {
        "object": "datastore",
        "name": name,
        "version": version,
        "current": version == current.version,
        "previous": before.version if before is not None else None,
        "revision": state.revision,
        "entries": manifest.entries,
        "bytes": manifest.num_bytes,
        "unit": manifest.unit,
        "documents": manifest.documents.count,
        "learned_documents": sum(revision in on_disk for revision in state.learned.values()),
        "learned_entries": sum(record.entries for record in shown),
        "deleted_documents": sum(revision > manifest.revision for revision in state.deleted.values()),
        "versions": len(published),
        "model_name": manifest.lm.model_name,
        "model_fingerprint": manifest.lm.model_fingerprint,
        "calibration": read_calibration(root, name, calibration).settings() if calibration is not None else None,
    }


def inspect(place: Place) -> dict[str, Any]:
    """Everything that is known without reading entries."""
    root, name, _ = place
    known = card(place)
    folder = layout.version_folder(root, name, known["version"])
    manifest = Manifest.read(folder / layout.MANIFEST)
    state = read_ledger(root, name)
    return {
        **known,
        "path": str(folder),
        "history": [entry._asdict() for entry in read_history(root, name)],
        "versions": [version._asdict() for version in list_versions(root, name)],
        "tail": _tail(state, manifest),
        "manifest": manifest.model_dump(mode="json", exclude={"files", "shards"}),
        "shards": [shard.entries for shard in manifest.shards],
        "files": len(manifest.files),
    }


def _tail(state: LedgerState, manifest: Manifest) -> list[dict[str, Any]]:
    living: dict[int, int] = {}
    for revision in state.learned.values():
        living[revision] = living.get(revision, 0) + 1
    return [
        {
            "revision": record.revision,
            "entries": record.entries,
            "documents": record.documents,
            "living_documents": living.get(record.revision, 0),
            "folded_in": record.revision <= manifest.revision,
        }
        for record in state.segments
    ]
