"""What is different between two versions of a name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from knnlm_core.datastore import layout
from knnlm_core.datastore.documents import read_documents
from knnlm_core.datastore.maintenance.stages import StageProgress, counted, silent
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.errors import DatastoreNotFound

# Fields of the manifest that settle what entries mean and how they are found; the others follow from the documents.
_SETTINGS = ("lm", "key", "context", "index", "revision", "parent_version")


class Change(NamedTuple):
    """One setting in both versions."""

    a: object
    b: object


class VersionDiff(NamedTuple):
    """From version a to version b, as they were published: what was learned or deleted since is no part of them."""

    a: str
    b: str
    entries: Change
    added: tuple[str, ...]  # documents that only b has
    removed: tuple[str, ...]  # … that only a has
    changed: tuple[str, ...]  # … whose text is another one
    unchanged: int
    settings: dict[str, Change]  # by path in the manifest, those that differ


def diff(root: Path, name: str, a: str, b: str, *, progress: StageProgress = silent) -> VersionDiff:
    """Compare two published versions: documents by the digest of their text, and settings.

    Raises: DatastoreNotFound, DatastoreCorrupt.
    """
    manifests = [_manifest(root, name, version) for version in (a, b)]
    advance = counted(progress, "compare", sum(manifest.documents.count for manifest in manifests))
    old, new = (_digests(layout.version_folder(root, name, version) / layout.DOCUMENTS, advance) for version in (a, b))
    both = old.keys() & new.keys()
    return VersionDiff(
        a,
        b,
        Change(manifests[0].entries, manifests[1].entries),
        tuple(document_id for document_id in new if document_id not in old),
        tuple(document_id for document_id in old if document_id not in new),
        tuple(document_id for document_id in new if document_id in both and old[document_id] != new[document_id]),
        sum(old[document_id] == new[document_id] for document_id in both),
        _changes(*(_flat(manifest.model_dump(mode="json", include=set(_SETTINGS))) for manifest in manifests)),
    )


def _manifest(root: Path, name: str, version: str) -> Manifest:
    try:
        return Manifest.read(layout.version_folder(root, name, version) / layout.MANIFEST)
    except DatastoreNotFound:
        known = ", ".join(layout.published_versions(root, name)) or "none"
        raise DatastoreNotFound(f"datastore {name!r} has no version {version!r}; published: {known}") from None


def _digests(path: Path, advance: Any) -> dict[str, bytes]:
    """Document id → sha256 of its text, in entry order."""
    digests = {}
    for document in read_documents(path):
        digests[document.id] = hashlib.sha256(document.text.encode()).digest()
        advance(1)
    return digests


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _changes(a: Mapping[str, object], b: Mapping[str, object]) -> dict[str, Change]:
    return {field: Change(a.get(field), b.get(field)) for field in {**a, **b} if a.get(field) != b.get(field)}
