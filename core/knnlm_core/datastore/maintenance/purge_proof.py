"""The proof that purged documents are gone: every file of the name is searched for them.

Equal contexts have equal keys, so a key of a purged document may rightly be that of another one too. Whoever rewrites a
version says where the documents that stay have such keys; any other place is a leftover.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from knnlm_core.datastore import layout
from knnlm_core.datastore.arrays import KeyArray
from knnlm_core.datastore.batch_search import IvfLists, Lists, WholeIndex
from knnlm_core.datastore.calibration import PRACTICE_IDS, read_calibration
from knnlm_core.datastore.canaries import canaries_of
from knnlm_core.datastore.documents import read_documents
from knnlm_core.datastore.index import map_index
from knnlm_core.datastore.ledger_file import read_ledger
from knnlm_core.datastore.maintenance.carried import HELD_OUT_IDS
from knnlm_core.datastore.maintenance.copies import Keep, Source
from knnlm_core.datastore.maintenance.raw_search import RawSearch
from knnlm_core.datastore.maintenance.stages import StageProgress, counted
from knnlm_core.datastore.maintenance.traces import Positions, Rows, Traces, as_bytes, find_keys, find_runs
from knnlm_core.datastore.manifest import ShardSection
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import open_segment

# Ids stay in the ledger, so that no rebuild brings a document back, and in the audit log. Texts and keys do not.
_MAY_NAME = frozenset({layout.LEDGER, layout.AUDIT})


class Search(NamedTuple):
    """What a file was searched for."""

    path: str  # from the name's folder
    sought: str
    found: int
    shared: int  # of them, what documents that stay have too

    @property
    def left(self) -> int:
        """What should not be there."""
        return self.found - self.shared


class Proof(NamedTuple):
    """Every search, and the documents that stay although their whole text is that of a purged one."""

    searches: tuple[Search, ...]
    same_text: tuple[str, ...]


class Own(NamedTuple):
    """Where documents that stay have the same keys and runs of tokens, by position among what stays."""

    keys: Positions
    runs: Positions


def own_traces(source: Source, keep: Keep, traces: Traces) -> Own:
    """What the documents to be kept have in common with those that go."""
    dim = source.arrays[0].keys.shape[1]
    return Own(find_keys(source, keep, traces.keys.get(dim)), find_runs(source, keep, traces.runs))


def prove(
    root: Path,
    name: str,
    traces: Traces,
    own: Mapping[Path, Own],
    gone: Collection[Path],
    progress: StageProgress,
) -> Proof:
    """Search every file of a name.

    Args:     own: by folder of a rewritten version or segment; what any other one holds is its own.
              gone: folders that are about to be removed.
    """
    return _Prover(root, name, traces, own, gone).run(progress)


class _Prover:
    def __init__(self, root: Path, name: str, traces: Traces, own: Mapping[Path, Own], gone: Collection[Path]) -> None:
        self._root, self._name, self._traces, self._own = root, name, traces, own
        self._home = layout.name_folder(root, name)
        self._gone = frozenset(gone)
        self._left = {path for path in _files(self._home) if not any(folder in path.parents for folder in gone)}
        self._shared = defaultdict[int, set[bytes]](set)  # keys of documents that stay, by width
        self._centroids = {dim: _as_floats(rows, dim) for dim, rows in traces.keys.items()}
        self._searches: list[Search] = []
        self._same_text: set[str] = set()
        self._advance: Callable[[int], None] = lambda files: None

    def run(self, progress: StageProgress) -> Proof:
        self._advance = counted(progress, "prove", len(self._left))
        versions = [self._home / version for version in layout.published_versions(self._root, self._name)]
        lists: list[tuple[Path, int]] = []
        for folder in versions:
            if folder / layout.MANIFEST in self._left:
                lists += self._version(folder)
        for record in read_ledger(self._root, self._name).segments:
            if layout.segment_folder(self._root, self._name, record.revision) in self._gone:
                continue
            with open_segment(self._root, self._name, record) as segment:
                self._arrays(segment.folder, Source.of_segment(segment), [(segment.folder, 0, segment.entries)])
                self._documents(segment.folder / layout.DOCUMENTS, self._traces.ids.__contains__)
        # What documents that stay have too is known only now.
        for path, dim in lists:
            self._lists(path, dim)
        self._others()
        return Proof(tuple(sorted(self._searches)), tuple(sorted(self._same_text)))

    def _version(self, folder: Path) -> list[tuple[Path, int]]:
        """Search a version but for its lists; returns the files that hold such, and D."""
        lists: list[Path] = []
        with Datastore.open_folder(folder) as store:
            sections = store.manifest.shards
            shards = [(folder / section.name, section.first_entry, section.entries) for section in sections]
            own = self._arrays(folder, Source.of_version(store), shards)
            for section in sections:
                self._index(folder / section.name / layout.INDEX, store, section, own)
                lists.append(folder / section.name / layout.INDEX)
            self._documents(folder / layout.DOCUMENTS, self._traces.ids.__contains__)
            if layout.HELD_OUT in store.manifest.files:
                self._documents(folder / layout.HELD_OUT, self._traces.are_of)
            self._canaries(store)
            if not store.manifest.index.is_trained:
                return []
            return [(path, store.dim) for path in (*lists, folder / layout.TRAINED)]

    def _arrays(self, folder: Path, source: Source, parts: Iterable[tuple[Path, int, int]]) -> Own:
        found = own_traces(source, lambda *_: True, self._traces)
        own = self._own.get(folder, found)
        for arrays in source.arrays:
            rows = own.keys[(own.keys >= arrays.first_entry) & (own.keys < arrays.first_entry + len(arrays.keys))]
            chosen = as_bytes(arrays.keys[rows - arrays.first_entry])
            self._shared[chosen.shape[1]].update(row.tobytes() for row in chosen)
        for part, first, entries in parts:
            for file, sought, places, rightly in (
                (layout.KEYS, "keys", found.keys, own.keys),
                (layout.VALUES, "runs of tokens", found.runs, own.runs),
            ):
                if entries:
                    here = places[(places >= first) & (places < first + entries)]
                    self._note(part / file, sought, len(here), int(np.isin(here, rightly).sum()))
        return own

    def _index(self, path: Path, store: Datastore, section: ShardSection, own: Own) -> None:
        spec = store.manifest.index
        index = map_index(path, spec, dim=store.dim, entries=section.entries)
        lists: Lists = IvfLists(index, 1, str(path)) if spec.is_trained else WholeIndex(index)
        sought = self._traces.keys.get(store.dim)
        places: list[int] = []
        for number in range(len(lists.sizes) if sought is not None else 0):
            stored = lists.read(number)
            places += stored.ids[_rows(stored.keys, sought)].tolist()
        here = np.array(places, dtype=np.int64) + section.first_entry
        self._note(path, "keys", len(here), int(np.isin(here, own.keys).sum()))

    def _lists(self, path: Path, dim: int) -> None:
        """Centroids are means of keys, and the mean of one key is that key."""
        index: Any = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
        centroids = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)
        found = centroids[self._centroids[dim].find(as_bytes(centroids))] if dim in self._centroids else centroids[:0]
        shared = sum(row.astype(np.float16).tobytes() in self._shared[2 * dim] for row in found)
        self._note(path, "centroids", len(found), shared)

    def _documents(self, path: Path, is_sought: Callable[[str], bool]) -> None:
        found = shared = 0
        for document in read_documents(path):
            if is_sought(document.id):
                found += 1
            elif document.text in self._traces.texts and document.text:
                found, shared = found + 1, shared + 1
                self._same_text.add(document.id)
        self._note(path, "documents and texts", found, shared)

    def _canaries(self, store: Datastore) -> None:
        canaries = canaries_of(store)
        if canaries is None:
            return
        named = sum(map(self._traces.are_of, canaries.documents))
        sought = self._traces.queries.get(store.dim)
        equal = len(sought.find(as_bytes(canaries.queries.numpy()))) if sought is not None else 0
        # A query of a document that stays may be the same: an equal context has an equal key.
        self._note(store.folder / layout.CANARIES, "queries", max(named, equal), max(named, equal) - named)

    def _others(self) -> None:
        shared = {width: frozenset(rows) for width, rows in self._shared.items()}
        naming, silent = (RawSearch(self._traces, with_ids=with_ids) for with_ids in (True, False))
        for calibration in layout.calibration_ids(self._root, self._name):
            if layout.calibration_folder(self._root, self._name, calibration) / layout.CALIBRATION in self._left:
                self._calibration(calibration)
        for path in sorted(self._left):
            known = path.name in {layout.MANIFEST, layout.SEGMENT, layout.CALIBRATION} or (
                path.parent == self._home and path.name.removesuffix(".part") in _MAY_NAME
            )
            with suppress(FileNotFoundError):  # somebody has replaced or removed it meanwhile
                found, in_common = (silent if known else naming).count(path, shared)
                self._searches.append(Search(self._relative(path), "bytes", found, in_common))
            self._advance(1)

    def _calibration(self, calibration: str) -> None:
        path = layout.calibration_folder(self._root, self._name, calibration) / layout.CALIBRATION
        content = read_calibration(self._root, self._name, calibration)
        named = [
            part.get(field) for part in (content.protocol, content.report) for field in (HELD_OUT_IDS, PRACTICE_IDS)
        ]
        ids = [held_out for listed in named if isinstance(listed, list) for held_out in listed]
        self._searches.append(
            Search(self._relative(path), "documents fitted on", sum(self._traces.are_of(str(id_)) for id_ in ids), 0)
        )

    def _note(self, path: Path, sought: str, found: int, shared: int) -> None:
        if path in self._left:
            self._left.remove(path)
            self._advance(1)
        self._searches.append(Search(self._relative(path), sought, found, shared))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._home).as_posix()


def _rows(keys: KeyArray, sought: Rows | None) -> list[int]:
    return [] if sought is None else sought.find(as_bytes(keys))


def _as_floats(rows: Rows, dim: int) -> Rows:
    """Keys as the lists hold them: the same numbers as float32."""
    keys = np.frombuffer(b"".join(rows), np.float16).reshape(-1, dim)
    return Rows(as_bytes(keys.astype(np.float32)))


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder):
        yield from (Path(parent, file) for file in files)
