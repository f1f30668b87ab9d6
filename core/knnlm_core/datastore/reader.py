"""An open datastore: one published version, mapped read-only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import Calibration, find_calibration, read_calibration, read_gate_trees
from knnlm_core.datastore.checksums import Progress, check_sizes, verify_files, verify_once
from knnlm_core.datastore.documents import Document, DocumentTable, read_documents
from knnlm_core.datastore.entries import Entries, Part, Section
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.shard import Shard
from knnlm_core.errors import DatastoreCorrupt, DatastoreMismatch, DatastoreNotFound
from knnlm_core.trees import Trees


class Datastore(Entries):
    """A version of a datastore; its files never change, so any number of threads may use it until `close`."""

    def __init__(
        self, folder: Path, manifest: Manifest, calibration: Calibration | None, gate_trees: Trees | None = None
    ) -> None:
        """Map a folder whose sizes have been checked; `open` and `open_folder` are the ways in."""
        self.folder = folder
        self.manifest = manifest
        self.calibration = calibration
        self.gate_trees = gate_trees
        self._mapped = tuple(
            Part(section.first_entry, Shard.open(folder / section.name, manifest, section))
            for section in manifest.shards
        )
        documents = DocumentTable(
            folder / layout.DOCUMENTS, documents=manifest.documents.count, entries=manifest.entries
        )
        self._tables = (Section(0, documents, manifest.revision),)

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        version: str | None = None,
        *,
        calibration: str | None = None,
        checksums: bool = False,
        verified: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Open a published version.

        Args:
            version: None for the one that CURRENT names.
            calibration: an id; None for the one that CURRENT names if CURRENT names this version, else the version's
                newest.
            checksums: also read every file and compare its sha256 before anything in it is looked at; sizes are
                compared always.
            verified: folder that remembers which versions were read in full on this machine: one that it does not know
                is, see `verify_once`.
            progress: gets the bytes of each block that was hashed.
        Raises:
            InvalidParameter: name, version or calibration cannot be one.
            DatastoreNotFound: no such name, version or calibration.
            DatastoreMismatch: of another format version, or the calibration is for another version.
            DatastoreCorrupt: a file is missing, unknown, or contradicts the manifest.
        """
        found = find_version(root, name, version, calibration=calibration)
        if verified is not None and not checksums:
            verify_once(found.folder, found.manifest, verified, progress)
        else:
            _check_files(found.folder, found.manifest, checksums, progress)
        return cls(*found)

    @classmethod
    def open_folder(
        cls,
        folder: Path,
        *,
        calibration: Calibration | None = None,
        checksums: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Open the folder of a version, such as a build that is still to be verified and published.

        Raises: as `open`.
        """
        manifest = _manifest(folder)
        _check_files(folder, manifest, checksums, progress)
        return cls(folder, manifest, calibration)

    @property
    def entries(self) -> int:
        """N."""
        return self.manifest.entries

    @property
    def num_bytes(self) -> int:
        """Size of all files but the manifest."""
        return self.manifest.num_bytes

    def held_out_documents(self) -> Iterator[Document]:
        """The documents that were kept out of the entries for calibration; none if the version keeps none."""
        if layout.HELD_OUT in self.manifest.files:
            yield from read_documents(self.folder / layout.HELD_OUT)

    def tokens(self) -> DocumentTokens:
        """The values of all entries, document after document."""
        values = np.concatenate([part.shard.columns.values for part in self._parts()])
        return DocumentTokens(values.astype(np.int64), self._tables[0].documents.starts)

    def close(self) -> None:
        """Unmap everything; searches under way end normally, later ones fail. Closing again does nothing."""
        self._mapped = ()
        self._tables[0].documents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(self) -> Sequence[Part]:
        parts = self._mapped
        assert parts, f"datastore {self.name!r} is used after close. This is a bug."
        return parts

    def _sections(self) -> Sequence[Section]:
        return self._tables

    def _is_deleted(self, document_id: str, revision: int) -> bool:
        return False


class DocumentTokens(NamedTuple):
    """Tokens of documents, one after the other."""

    values: npt.NDArray[np.int64]  # (N,)
    starts: npt.NDArray[np.int64]  # ascending, where each document begins


class PublishedVersion(NamedTuple):
    """A version that was found; of its files only the manifest has been looked at. What a `Datastore` is made of."""

    folder: Path
    manifest: Manifest
    calibration: Calibration | None
    gate_trees: Trees | None = None


def find_version(
    root: Path, name: str, version: str | None = None, *, calibration: str | None = None
) -> PublishedVersion:
    """The first half of `Datastore.open`, for whoever wants to decide by the manifest, or to check files in between.

    Arguments and errors as there. Sizes are to be compared before the files are mapped: `verify_files`, `verify_once`.
    """
    layout.check_name(name)
    if version is None or calibration is None:
        current = _current(root, name, required=version is None)
        version = version or (current.version if current else None)
        assert version is not None
        if calibration is None:
            is_current = current is not None and current.version == version
            calibration = current.calibration if current and is_current else find_calibration(root, name, version)
    folder = layout.version_folder(root, name, version)
    if not folder.is_dir():
        known = ", ".join(layout.published_versions(root, name)) or "none"
        raise DatastoreNotFound(f"datastore {name!r} has no version {version!r}; published: {known}")
    settings = None if calibration is None else read_calibration(root, name, calibration)
    if settings is not None and settings.datastore_version != version:
        raise DatastoreMismatch(
            name,
            field=f"datastore_version of calibration {calibration}",
            have=settings.datastore_version,
            need=version,
            needed_by="the version to be opened",
        )
    manifest = _manifest(folder)
    for field, have, need in (("name", manifest.name, name), ("version", manifest.version, version)):
        if have != need:
            raise DatastoreCorrupt(f"{folder / layout.MANIFEST}: {field} is {have!r}, its folder needs {need!r}")
    if settings is not None and settings.gate_trees is not None:
        need = manifest.lm.model_fingerprint
        if (have := settings.gate_trees.model_fingerprint) != need:
            raise DatastoreMismatch(
                name, field="gate_trees.model_fingerprint", have=have, need=need, needed_by="the version to be opened"
            )
    trees = None if settings is None else read_gate_trees(root, name, settings)
    return PublishedVersion(folder, manifest, settings, trees)


def _manifest(folder: Path) -> Manifest:
    try:
        return Manifest.read(folder / layout.MANIFEST)
    except DatastoreNotFound as error:
        raise DatastoreCorrupt(f"{folder / layout.MANIFEST} is missing") from error


def _check_files(folder: Path, manifest: Manifest, checksums: bool, progress: Progress | None) -> None:
    if checksums:
        verify_files(folder, manifest, progress)
    else:
        check_sizes(folder, manifest)


def _current(root: Path, name: str, *, required: bool) -> layout.Current | None:
    try:
        return layout.read_current(root, name)
    except DatastoreNotFound:
        if required:
            raise
        return None
