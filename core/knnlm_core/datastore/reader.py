"""An open datastore: one published version, mapped read-only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import Calibration, find_calibration, read_calibration
from knnlm_core.datastore.checksums import Progress, check_sizes, verify_files
from knnlm_core.datastore.documents import Document, DocumentTable, EntryLocation, read_documents
from knnlm_core.datastore.exact import search_exact
from knnlm_core.datastore.exclusion import check_ranges
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.merge import Found, merge_found
from knnlm_core.datastore.shard import Queries, Shard
from knnlm_core.errors import DatastoreCorrupt, DatastoreMismatch, DatastoreNotFound, InvalidKnnParams, InvalidParameter
from knnlm_core.types import EntryRange, LMIdentity, Neighbors

_PREFETCH_BYTES = 4 * 1024 * 1024


class Datastore:
    """A version of a datastore. Nothing in it changes, so any number of threads may use it until `close`."""

    def __init__(self, folder: Path, manifest: Manifest, calibration: Calibration | None) -> None:
        """Map a folder whose sizes have been checked; `open` and `open_folder` are the ways in."""
        self.folder = folder
        self.manifest = manifest
        self.calibration = calibration
        self._shards = tuple(Shard(folder / section.name, manifest, section) for section in manifest.shards)
        self._ends = np.array([shard.first_entry + shard.entries for shard in self._shards])
        self._documents = DocumentTable(
            folder / layout.DOCUMENTS, documents=manifest.documents.count, entries=manifest.entries
        )
        self._closed = False

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        version: str | None = None,
        *,
        calibration: str | None = None,
        checksums: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Open a published version.

        Args:
            version: None for the one that CURRENT names.
            calibration: an id; None for the one that CURRENT names if CURRENT names this version, else the version's
                newest.
            checksums: also read every file and compare its sha256; sizes are compared always.
            progress: gets the bytes of each block that was hashed.
        Raises:
            InvalidParameter: name, version or calibration cannot be one.
            DatastoreNotFound: no such name, version or calibration.
            DatastoreMismatch: of another format version, or the calibration is for another version.
            DatastoreCorrupt: a file is missing, unknown, or contradicts the manifest.
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
        store = cls.open_folder(folder, calibration=settings, checksums=checksums, progress=progress)
        for field, have, need in (("name", store.name, name), ("version", store.version, version)):
            if have != need:
                store.close()
                raise DatastoreCorrupt(f"{folder / layout.MANIFEST}: {field} is {have!r}, its folder needs {need!r}")
        return store

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
        try:
            manifest = Manifest.read(folder / layout.MANIFEST)
        except DatastoreNotFound as error:
            raise DatastoreCorrupt(f"{folder / layout.MANIFEST} is missing") from error
        if checksums:
            verify_files(folder, manifest, progress)
        else:
            check_sizes(folder, manifest)
        return cls(folder, manifest, calibration)

    @property
    def name(self) -> str:
        """The datastore's name."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """16 hex digits."""
        return self.manifest.version

    @property
    def entries(self) -> int:
        """N."""
        return self.manifest.entries

    @property
    def dim(self) -> int:
        """D."""
        return self.manifest.key.dim

    @property
    def num_bytes(self) -> int:
        """Size of all files but the manifest."""
        return self.manifest.num_bytes

    def require_fits(self, identity: LMIdentity) -> None:
        """Raises DatastoreMismatch: naming the first field in which the running LM is not the one of the keys."""
        built_for = self.manifest.lm.identity()
        for field in (field.name for field in fields(LMIdentity) if field.name != "model_name"):
            have, need = getattr(built_for, field), getattr(identity, field)
            if have != need:
                raise DatastoreMismatch(self.name, field=field, have=have, need=need)

    def search(
        self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = (), nprobe: int | None = None
    ) -> Neighbors:
        """The k nearest entries of each query by (distance, id), as far as the index finds them.

        Args:
            queries: (B, D), any float dtype, device and strides; computed in float32.
            exclude: entries that must not be found.
            nprobe: lists to visit instead of the manifest's number; an index without lists always looks at everything.
        Returns: on the CPU; fewer than k entries are filled up with id −1, value −1, distance +inf.
        Raises:
            InvalidKnnParams: k or nprobe out of range.
            InvalidParameter: queries of another shape or not finite; a range beyond this datastore.
        """
        spec = self.manifest.index
        if nprobe is not None and not (1 <= nprobe <= spec.nlist if spec.is_trained else nprobe >= 1):
            limits = f"in 1 … {spec.nlist}" if spec.is_trained else "at least 1"
            raise InvalidKnnParams(f"`knn.nprobe` must be {limits}, got {nprobe}", param="knn.nprobe")
        shards = self._open_shards()
        rows = self._check_search(queries, k, exclude)
        lists = nprobe or spec.nprobe
        parts = [shard.search(rows, k, exclude=exclude, nprobe=lists) for shard in shards]
        return self._neighbors(merge_found(parts, k))

    def search_exact(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """The k nearest entries of each query by (distance, id), all entries considered, without the index.

        For scoring many queries at once, and what `search` is measured against. Arguments and errors as there.
        """
        shards = self._open_shards()
        return self._neighbors(search_exact(shards, self._check_search(queries, k, exclude), k, exclude))

    def keys(self, entry_ids: Tensor) -> Tensor:
        """The stored keys of some entries: (…) int64 → (…, D) float32. Raises InvalidParameter: no such entry."""
        shards, ids = self._open_shards(), self._check_ids(entry_ids)
        keys = np.empty((ids.size, self.dim), dtype=np.float32)
        for shard, at, rows in self._by_shard(shards, ids.ravel()):
            keys[at] = shard.keys[rows]
        return torch.from_numpy(keys.reshape(*ids.shape, self.dim))

    def values(self, entry_ids: Tensor) -> Tensor:
        """The values of some entries, (…) int64; −1 for id −1. Raises InvalidParameter: no such entry."""
        ids = self._check_ids(entry_ids, missing_allowed=True)
        return torch.from_numpy(self._values(ids))

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        """The entry that follows each one in its document, (…) int64: −1 after a document's last entry, and for −1.

        Raises: InvalidParameter: no such entry.
        """
        return torch.from_numpy(self._documents.next_entry(self._check_ids(entry_ids, missing_allowed=True)))

    def locate(self, entry_ids: Sequence[int]) -> list[EntryLocation]:
        """Where the values of some entries stand. Raises InvalidParameter: no such entry."""
        shards = self._open_shards()
        ids = self._check_ids(torch.tensor(list(entry_ids), dtype=torch.int64))
        starts, ends = np.empty(ids.size, dtype=np.int64), np.empty(ids.size, dtype=np.int64)
        for shard, at, rows in self._by_shard(shards, ids):
            starts[at], ends[at] = shard.columns.char_starts[rows], shard.columns.char_ends[rows]
        # Without BOS a document's first token has no context: its first entry holds the second token.
        unscored = 0 if self.manifest.context.bos_token_ids else 1
        return [
            EntryLocation(
                entry_id=entry_id,
                document_id=source["id"],
                uri=source["uri"],
                title=source["title"],
                licence=source["licence"],
                token_offset=before + unscored,
                char_start=start,
                char_end=end,
            )
            for entry_id, (source, before), start, end in zip(
                ids.tolist(), self._documents.locate(ids), starts.tolist(), ends.tolist(), strict=True
            )
        ]

    def document_ids(self) -> list[str]:
        """Every document's id, in entry order."""
        return self._documents.ids()

    def document(self, document_id: str) -> Document:
        """A document with its text. Raises DatastoreNotFound: no such document."""
        self._open_shards()
        return self._documents.document(document_id)

    def document_entries(self, document_id: str) -> EntryRange:
        """The entries that a document made, perhaps none. Raises DatastoreNotFound: no such document."""
        return self._documents.entries_of(document_id)

    def held_out_documents(self) -> Iterator[Document]:
        """The documents that were kept out of the entries for calibration; none if the version keeps none."""
        if layout.HELD_OUT in self.manifest.files:
            yield from read_documents(self.folder / layout.HELD_OUT)

    def prefetch(self) -> None:
        """Read indexes and values once, so that the first searches find them in the page cache."""
        block = memoryview(bytearray(_PREFETCH_BYTES))
        for section in self.manifest.shards:
            for file in (layout.INDEX, layout.VALUES):
                with (self.folder / section.name / file).open("rb", buffering=0) as source:
                    while source.readinto(block):
                        pass

    def close(self) -> None:
        """Unmap everything; searches under way end normally, later ones fail. Closing again does nothing."""
        self._closed = True
        self._shards = ()
        self._documents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_shards(self) -> tuple[Shard, ...]:
        shards = self._shards
        assert shards, f"datastore {self.name!r} is used after close. This is a bug."
        return shards

    def _check_search(self, queries: Tensor, k: int, exclude: Sequence[EntryRange]) -> Queries:
        if k < 1:
            raise InvalidKnnParams(f"`knn.k` must be at least 1, got {k}", param="knn.k")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InvalidParameter(
                f"`queries` must have the shape (B, {self.dim}), got {tuple(queries.shape)}", param="queries"
            )
        check_ranges(exclude, self.entries)
        rows = queries.detach().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(rows).all()):
            raise InvalidParameter("`queries` must be finite, got NaN or infinity", param="queries")
        return rows.numpy()

    def _check_ids(self, entry_ids: Tensor, *, missing_allowed: bool = False) -> npt.NDArray[np.int64]:
        ids = entry_ids.detach().to("cpu", torch.int64).numpy()
        first = -1 if missing_allowed else 0
        if ids.size and (ids.min() < first or ids.max() >= self.entries):
            raise InvalidParameter(
                f"`entry_ids` must be in {first} … {self.entries - 1}, got {ids.min()} … {ids.max()}", param="entry_ids"
            )
        return ids

    def _by_shard(
        self, shards: tuple[Shard, ...], ids: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Shard, npt.NDArray[np.intp], npt.NDArray[np.int64]]]:
        """Split ids (n,) by shard: the shard, where in ``ids`` its entries are, their rows in it; −1 is left out."""
        owners = np.searchsorted(self._ends, ids, side="right")
        for number, shard in enumerate(shards):
            at = np.flatnonzero((owners == number) & (ids >= 0))
            if at.size:
                yield shard, at, ids[at] - shard.first_entry

    def _values(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        values = np.full(ids.size, -1, dtype=np.int64)
        for shard, at, rows in self._by_shard(self._open_shards(), ids.ravel()):
            values[at] = shard.columns.values[rows]
        if values.min(initial=-1) < -1 or values.max(initial=-1) >= self.manifest.lm.vocab_size:
            raise DatastoreCorrupt(
                f"{self.folder}: values must be in 0 … {self.manifest.lm.vocab_size - 1}, "
                f"some are {values.min()} or {values.max()}"
            )
        return values.reshape(ids.shape)

    def _neighbors(self, found: Found) -> Neighbors:
        values = self._values(found.entry_ids)
        return Neighbors(torch.from_numpy(found.entry_ids), torch.from_numpy(found.distances), torch.from_numpy(values))


def _current(root: Path, name: str, *, required: bool) -> layout.Current | None:
    try:
        return layout.read_current(root, name)
    except DatastoreNotFound:
        if required:
            raise
        return None
