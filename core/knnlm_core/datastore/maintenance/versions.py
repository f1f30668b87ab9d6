"""Which versions a name has, from their manifests alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from knnlm_core.datastore import layout
from knnlm_core.datastore.manifest import Manifest


class VersionFacts(NamedTuple):
    """A published version."""

    version: str
    parent_version: str | None
    revision: int  # what was learned and deleted up to it is part of the version
    entries: int
    documents: int
    bytes: int


def list_versions(root: Path, name: str) -> list[VersionFacts]:
    """All published versions, sorted. Raises DatastoreNotFound, DatastoreCorrupt, DatastoreMismatch."""
    versions = layout.published_versions(root, name)
    manifests = [Manifest.read(layout.version_folder(root, name, version) / layout.MANIFEST) for version in versions]
    return [
        VersionFacts(m.version, m.parent_version, m.revision, m.entries, m.documents.count, m.num_bytes)
        for m in manifests
    ]
