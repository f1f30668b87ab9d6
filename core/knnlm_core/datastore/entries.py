"""Entries that can be searched and looked up: what an open version and a request's snapshot have in common.

parts       what is searched:      │ shard 0 │ shard 1 │ … │ learned │     each with the id of its first entry
sections    where it comes from:   │     the version       │  │  │    │     each with a table of documents
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_core.datastore.calibration import Calibration
from knnlm_core.datastore.documents import Document, DocumentTable, EntryLocation
from knnlm_core.datastore.exact import ExactPart, search_exact
from knnlm_core.datastore.exclusion import Bitmap, allowed_bitmap, check_ranges
from knnlm_core.datastore.manifest import Manifest
from knnlm_core.datastore.merge import Found, merge_found, sort_found
from knnlm_core.datastore.shard import Queries, Shard
from knnlm_core.errors import (
    DatastoreCorrupt,
    DocumentNotFound,
    InvalidKnnParams,
    InvalidParameter,
)
from knnlm_core.trees import Trees
from knnlm_core.types import EntryRange, LMIdentity, Neighbors

Ids = npt.NDArray[np.int64]


class Part(NamedTuple):
    """A shard among others."""

    first_entry: int
    shard: Shard

    @property
    def stop(self) -> int:
        """The id after its last entry."""
        return self.first_entry + self.shard.entries


class Section(NamedTuple):
    """Documents that were written together, and the id of their first entry."""

    first_entry: int
    documents: DocumentTable
    revision: int  # of the datastore's name when they were written


class Entries(ABC):
    """Read access to the entries of a datastore. Entry ids count from 0 without gaps, hidden entries included."""

    manifest: Manifest
    calibration: Calibration | None
    gate_trees: Trees | None = None  # of the calibration

    @property
    def name(self) -> str:
        """The datastore's name."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """16 hex digits."""
        return self.manifest.version

    @property
    def dim(self) -> int:
        """D."""
        return self.manifest.key.dim

    @property
    @abstractmethod
    def entries(self) -> int:
        """N."""

    @abstractmethod
    def _parts(self) -> Sequence[Part]:
        """In the order of their entries."""

    @abstractmethod
    def _sections(self) -> Sequence[Section]:
        """In the order of their entries; of two documents with one id the later one counts."""

    @abstractmethod
    def _is_deleted(self, document_id: str, revision: int) -> bool:
        """Whether the copy of a document that was written at a revision has been deleted or replaced since."""

    def require_fits(self, identity: LMIdentity) -> None:
        """Raises DatastoreMismatch: naming the first field in which the running LM is not the one of the keys."""
        self.manifest.lm.require_fits(self.name, identity)

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
        parts = self._parts()
        rows = self._check_search(queries, k, exclude)
        found = []
        for part in parts:
            in_part = part.shard.search(rows, k, bitmap=_allowed(part, exclude), nprobe=nprobe or spec.nprobe)
            if part.first_entry:
                in_part.entry_ids[in_part.entry_ids >= 0] += part.first_entry
            found.append(in_part)
        return self._neighbors(merge_found(found, k))

    def search_exact(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """The k nearest entries of each query by (distance, id), all entries considered, without the index.

        For scoring many queries at once, and what `search` is measured against. Arguments and errors as there.
        """
        # A bitmap of its own: what is hidden meanwhile must not change between the passes of one search.
        allowed = [_allowed(part, exclude) for part in self._parts()]
        parts = [
            ExactPart(part.first_entry, part.shard, None if bitmap is None else bitmap.copy())
            for part, bitmap in zip(self._parts(), allowed, strict=True)
        ]
        return self._neighbors(search_exact(parts, self._check_search(queries, k, exclude), k))

    def lookup(self, queries: Tensor, entry_ids: Tensor, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """Chosen entries as a search would return them, at their distances to each query, without any search.

        Args:
            queries: (B, D), as for `search`.
            entry_ids: (B, K) int64, each entry at most once in a row; −1 for none.
            exclude: entries that must not be found.
        Returns: (B, K) by (distance, id); what is hidden or excluded is missing.
        Raises: InvalidParameter: no such entry, or as `search`.
        """
        ids = self._check_ids(entry_ids, missing_allowed=True).copy()
        rows = self._check_search(queries, 1, exclude)
        ids[~self._is_visible(ids.ravel()).reshape(ids.shape)] = -1
        for first, stop in exclude:
            ids[(ids >= first) & (ids < stop)] = -1
        row, column = np.nonzero(ids >= 0)
        distances = np.full(ids.shape, np.inf, dtype=np.float32)
        keys = self.keys(torch.from_numpy(ids[row, column])).numpy()
        distances[row, column] = np.square(keys - rows[row]).sum(axis=1)
        return self._neighbors(sort_found(Found(distances, ids)))

    def keys(self, entry_ids: Tensor) -> Tensor:
        """The stored keys of some entries: (…) int64 → (…, D) float32. Raises InvalidParameter: no such entry."""
        ids = self._check_ids(entry_ids)
        keys = np.empty((ids.size, self.dim), dtype=np.float32)
        for shard, at, rows in self._by_part(ids.ravel()):
            keys[at] = shard.keys[rows]
        return torch.from_numpy(keys.reshape(*ids.shape, self.dim))

    def values(self, entry_ids: Tensor) -> Tensor:
        """The values of some entries, (…) int64; −1 for id −1. Raises InvalidParameter: no such entry."""
        ids = self._check_ids(entry_ids, missing_allowed=True)
        return torch.from_numpy(self._values(ids))

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        """The entry that follows each one in its document, (…) int64.

        −1 after a document's last entry, where that entry is hidden, and for −1.

        Raises: InvalidParameter: no such entry.
        """
        ids = self._check_ids(entry_ids, missing_allowed=True)
        following = np.full(ids.size, -1, dtype=np.int64)
        for section, at, rows in self._by_section(ids.ravel()):
            next_rows = section.documents.next_entry(rows)
            following[at] = np.where(next_rows < 0, -1, next_rows + section.first_entry)
        following[~self._is_visible(following)] = -1
        return torch.from_numpy(following.reshape(ids.shape))

    def continuations(self, entry_ids: Tensor, length: int) -> Tensor:
        """The values of some entries and of those that follow them in their documents: (M,) int64 → (M, length) int64.

        −1 from where a document ends or an entry is hidden, and for −1. Raises InvalidParameter: no such entry.
        """
        ids = self._check_ids(entry_ids, missing_allowed=True)
        rows = ids[:, None] + np.arange(length)  # entries keep the order of their text
        rows[ids < 0] = -1
        np.minimum(rows, self.entries - 1, out=rows)
        follows = self.next_entry(torch.from_numpy(rows[:, :-1])).numpy() == rows[:, 1:]
        first = (ids >= 0) & self._is_visible(ids)
        there = np.concatenate([first[:, None], follows], axis=1)
        rows[~np.logical_and.accumulate(there, axis=1)] = -1
        return torch.from_numpy(self._values(rows))

    def locate(self, entry_ids: Sequence[int]) -> list[EntryLocation | None]:
        """Where the values of some entries stand; None for one whose document has been deleted.

        Raises: InvalidParameter: no such entry.
        """
        ids = self._check_ids(torch.tensor(list(entry_ids), dtype=torch.int64))
        starts, ends = np.empty(ids.size, dtype=np.int64), np.empty(ids.size, dtype=np.int64)
        for shard, at, rows in self._by_part(ids):
            starts[at], ends[at] = shard.columns.char_starts[rows], shard.columns.char_ends[rows]
        # Without BOS a document's first token has no context: its first entry holds the second token.
        unscored = 0 if self.manifest.context.bos_token_ids else 1
        places: list[EntryLocation | None] = [None] * ids.size
        for section, at, rows in self._by_section(ids):
            for i, (source, before) in zip(at.tolist(), section.documents.locate(rows), strict=True):
                if not self._is_deleted(source["id"], section.revision):
                    places[i] = EntryLocation(
                        entry_id=int(ids[i]),
                        document_id=source["id"],
                        uri=source["uri"],
                        title=source["title"],
                        licence=source["licence"],
                        token_offset=before + unscored,
                        char_start=int(starts[i]),
                        char_end=int(ends[i]),
                    )
        return places

    def document_ids(self) -> list[str]:
        """The id of every document that is not deleted, in entry order."""
        return [
            document_id
            for section in self._sections()
            for document_id in section.documents.ids()
            if not self._is_deleted(document_id, section.revision)
        ]

    def has_document(self, document_id: str) -> bool:
        """Whether there is such a document, not deleted."""
        return self._find(document_id) is not None

    def document(self, document_id: str) -> Document:
        """A document with its text. Raises DocumentNotFound: no such document."""
        self._parts()  # refuses use after close
        return self._section_of(document_id).documents.document(document_id)

    def document_entries(self, document_id: str) -> EntryRange:
        """The entries that a document made, perhaps none. Raises DocumentNotFound: no such document."""
        section = self._section_of(document_id)
        first, stop = section.documents.entries_of(document_id)
        return EntryRange(first + section.first_entry, stop + section.first_entry)

    def is_visible(self, first: int, stop: int) -> npt.NDArray[np.bool_]:
        """(stop − first,): which of the entries ``first … stop − 1`` are not hidden."""
        return self._is_visible(np.arange(first, stop))

    def are_visible(self, entry_ids: Tensor) -> Tensor:
        """Which of some entries are not hidden, (…) bool; true for −1. Raises InvalidParameter: no such entry."""
        ids = self._check_ids(entry_ids, missing_allowed=True)
        if all(part.shard.hidden is None for part in self._parts()):  # as most are
            return torch.ones(ids.shape, dtype=torch.bool)
        return torch.from_numpy(self._is_visible(ids.ravel()).reshape(ids.shape))

    def _section_of(self, document_id: str) -> Section:
        section = self._find(document_id)
        if section is None:
            raise DocumentNotFound(f"no document {document_id[:200]!r} in datastore {self.name!r}", param="document")
        return section

    def _find(self, document_id: str) -> Section | None:
        for section in reversed(self._sections()):
            if document_id in section.documents and not self._is_deleted(document_id, section.revision):
                return section
        return None

    def _is_visible(self, ids: Ids) -> npt.NDArray[np.bool_]:
        visible = np.ones(len(ids), dtype=np.bool_)
        for shard, at, rows in self._by_part(ids):
            if (hidden := shard.hidden) is not None:
                visible[at] = (hidden[rows >> 3] >> (rows & 7)) & 1 == 1
        return visible

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

    def _check_ids(self, entry_ids: Tensor, *, missing_allowed: bool = False) -> Ids:
        ids = entry_ids.detach().to("cpu", torch.int64).numpy()
        first = -1 if missing_allowed else 0
        if ids.size and (ids.min() < first or ids.max() >= self.entries):
            raise InvalidParameter(
                f"`entry_ids` must be in {first} … {self.entries - 1}, got {ids.min()} … {ids.max()}", param="entry_ids"
            )
        return ids

    def _by_part(self, ids: Ids) -> Iterator[tuple[Shard, npt.NDArray[np.intp], Ids]]:
        """Split ids (n,) by part: the shard, where in ``ids`` its entries are, their rows in it; −1 is left out."""
        parts = self._parts()
        for number, at in _split(ids, [part.first_entry for part in parts]):
            yield parts[number].shard, at, ids[at] - parts[number].first_entry

    def _by_section(self, ids: Ids) -> Iterator[tuple[Section, npt.NDArray[np.intp], Ids]]:
        """Split ids (n,) by section, as `_by_part` does."""
        sections = self._sections()
        for number, at in _split(ids, [section.first_entry for section in sections]):
            yield sections[number], at, ids[at] - sections[number].first_entry

    def _values(self, ids: Ids) -> Ids:
        values = np.full(ids.size, -1, dtype=np.int64)
        for shard, at, rows in self._by_part(ids.ravel()):
            values[at] = shard.columns.values[rows]
        if values.min(initial=-1) < -1 or values.max(initial=-1) >= self.manifest.lm.vocab_size:
            raise DatastoreCorrupt(
                f"datastore {self.name!r} version {self.version}: values must be in "
                f"0 … {self.manifest.lm.vocab_size - 1}, some are {values.min()} or {values.max()}"
            )
        return values.reshape(ids.shape)

    def _neighbors(self, found: Found) -> Neighbors:
        values = self._values(found.entry_ids)
        return Neighbors(torch.from_numpy(found.entry_ids), torch.from_numpy(found.distances), torch.from_numpy(values))


def _allowed(part: Part, exclude: Sequence[EntryRange]) -> Bitmap | None:
    return allowed_bitmap(exclude, part.first_entry, part.shard.entries, part.shard.hidden)


def _split(ids: Ids, firsts: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """The ranges that begin at ``firsts``, by number, and which of some ids lie in each; negative ids lie in none."""
    if len(firsts) == 1:
        at = np.flatnonzero(ids >= 0)
        if at.size:
            yield 0, at
        return
    # Ranges may be empty: of those that begin at one entry, the last one has it.
    owners = np.searchsorted(np.array(firsts), ids, side="right") - 1
    owners[ids < 0] = -1
    for number in np.unique(owners[owners >= 0]).tolist():
        yield number, np.flatnonzero(owners == number)
