"""Making a version from another one without its dead documents, and with what was learned beside it.

    version  │ doc doc dead doc │   tail  │ doc │ dead │ doc │        →        new version  │ doc doc doc doc doc │

Keys are copied, never computed anew: no language model is needed. Nothing that is published changes; the new version
appears by one rename, as that of a build does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from knnlm_core.datastore import layout
from knnlm_core.datastore.canaries import RECORDED_RECALL, Canaries, self_test, write_canaries
from knnlm_core.datastore.checksums import hash_file, record_files
from knnlm_core.datastore.ledger_file import SegmentRecord
from knnlm_core.datastore.maintenance.carried import canaries_to_keep, copy_held_out, keeps_held_out
from knnlm_core.datastore.maintenance.copies import Keep, Source, entries_in
from knnlm_core.datastore.maintenance.removal import remove_doomed
from knnlm_core.datastore.maintenance.rewrite_content import copy_documents, copy_entries
from knnlm_core.datastore.maintenance.rewrite_index import (
    TRAINED_ENTRIES,
    ChosenIndex,
    build_index,
    choose,
    pass_gate,
    some_entries,
)
from knnlm_core.datastore.maintenance.stages import StageProgress, counted, silent
from knnlm_core.datastore.manifest import DocumentsSection, FileRecord, Manifest, version_of
from knnlm_core.datastore.publish import place
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import SELF_QUERIES, check_self_recall
from knnlm_core.datastore.segments import open_segment
from knnlm_core.durable import write_text
from knnlm_core.errors import DatastoreConflict

UNDER_WAY = "REWRITE"  # names the version that is being written, so that the next run removes what a crash left of it
_GATE_QUERIES = 512
_CARRIED_QUALITY = ("helps", "forced")  # said of the calibration, which is carried over too


@dataclass(frozen=True)
class Rewriting:
    """What is to be made of a version.

    Attributes:
        source: the version.
        revision: of the ledger, that the new version will have folded in.
        keep: which copies of documents stay, by id and revision.
        segments: of the tail, to be appended; ascending.
        forget: what is left out must leave no trace: nothing computed from it is reused.
    """

    source: str
    revision: int
    keep: Keep
    segments: tuple[SegmentRecord, ...] = ()
    forget: bool = False


def rewrite(root: Path, name: str, rewriting: Rewriting, *, progress: StageProgress = silent) -> str:
    """Publish a version made from another one, without making it current; returns its number.

    For a holder of `lock_versions` who has called `discard_leftover`. What was done before is not done again.

    Raises:
        DatastoreConflict: nothing would be left.
        DatastoreCorrupt, DatastoreMismatch: a file is damaged, or a document was learned with another language model.
        VerifyFailed: the new version does not find its own keys.
    """
    with _opened(root, name, rewriting, progress) as (store, sources):
        chosen = _chosen(store, sources, rewriting)
        build = _inputs(store, sources, rewriting, chosen)
        version = version_of(build)
        if version in layout.published_versions(root, name):
            return version
        folder = layout.building_folder(root, name, version)
        write_text(_note(root, name), version + "\n")
        folder.mkdir()
        try:
            manifest = _write(folder, store, sources, rewriting, chosen, progress)
            manifest = manifest.model_copy(update={"version": version, "build": build})
            _finish(folder, manifest, canaries_to_keep(store, rewriting.keep), progress)
            place(root, name, version)
        except Exception:
            discard_leftover(root, name)
            raise
    _note(root, name).unlink()
    return version


def discard_leftover(root: Path, name: str) -> None:
    """Remove what a rewriting or a removal that was killed has left. For a holder of `lock_versions`."""
    remove_doomed(root, name)
    note = _note(root, name)
    if note.is_file():
        shutil.rmtree(layout.building_folder(root, name, note.read_text(encoding="utf-8").strip()), ignore_errors=True)
        note.unlink()


def _note(root: Path, name: str) -> Path:
    return layout.name_folder(root, name) / UNDER_WAY


@contextmanager
def _opened(
    root: Path, name: str, rewriting: Rewriting, progress: StageProgress
) -> Iterator[tuple[Datastore, list[Source]]]:
    """The version and the segments, their checksums compared: damage must not get checksums of its own."""
    manifest = Manifest.read(layout.version_folder(root, name, rewriting.source) / layout.MANIFEST)
    advance = counted(progress, "verify", manifest.num_bytes)
    with ExitStack() as open_ones:
        store = open_ones.enter_context(Datastore.open(root, name, rewriting.source, checksums=True, progress=advance))
        sources = [Source.of_version(store)]
        for record in rewriting.segments:
            segment = open_ones.enter_context(open_segment(root, name, record, checksums=True))
            segment.require_fits(manifest.lm.identity())
            sources.append(Source.of_segment(segment))
        yield store, sources


def _chosen(store: Datastore, sources: Sequence[Source], rewriting: Rewriting) -> ChosenIndex:
    entries = sum(entries_in(source.ranges(rewriting.keep)) for source in sources)
    if not entries:
        raise DatastoreConflict(
            f"no entry of version {rewriting.source} of {store.name!r} would be left, and a version has at least one; "
            "remove the datastore instead"
        )
    k = store.calibration.k if store.calibration is not None else None
    return choose(store.manifest, entries, k=k, fresh=rewriting.forget)


def _inputs(
    store: Datastore, sources: Sequence[Source], rewriting: Rewriting, chosen: ChosenIndex
) -> dict[str, JsonValue]:
    """What the new version is a hash of: what went in, and what was left out."""
    manifest = store.manifest
    keep, revision = rewriting.keep, manifest.revision
    left_out: list[JsonValue] = [[s.revision, document_id] for s in sources for document_id in s.left_out(keep)]
    held_out: list[JsonValue] = [d.id for d in store.held_out_documents() if not keeps_held_out(keep, d.id, revision)]
    return {
        "format_version": 1,
        "compacted_from": rewriting.source,
        "revision": rewriting.revision,
        "segments": [[record.revision, record.sha256] for record in rewriting.segments],
        "left_out": version_of({"copies": left_out, "held_out": held_out}),
        "forget": rewriting.forget,
        "shard_entries": _shard_entries(manifest),
        TRAINED_ENTRIES: chosen.trained_entries,
    }


def _shard_entries(manifest: Manifest) -> int:
    """As large as its shards were meant to be; else as the largest is."""
    given = manifest.build.get("shard_entries")
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return given
    return max(shard.entries for shard in manifest.shards)


def _write(
    folder: Path,
    store: Datastore,
    sources: Sequence[Source],
    rewriting: Rewriting,
    chosen: ChosenIndex,
    progress: StageProgress,
) -> Manifest:
    """Write everything but canaries and manifest; the manifest returned is still that of the old version in parts."""
    old, keep = store.manifest, rewriting.keep
    shards = copy_entries(folder, sources, keep, _shard_entries(old), progress)
    documents = copy_documents(folder, sources, keep, progress)
    copy_held_out(folder, store, keep)
    build_index(folder, store.folder, chosen, shards, old.key.dim, progress)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return old.model_copy(
        update={
            "parent_version": old.version,
            "revision": rewriting.revision,
            "entries": sum(shard.entries for shard in shards),
            "shards": shards,
            "index": chosen.spec,
            "documents": DocumentsSection(count=documents),
            "quality": {name: old.quality[name] for name in _CARRIED_QUALITY if name in old.quality},
            "files": record_files(folder, counted(progress, "checksums", size)),
        }
    )


def _finish(folder: Path, manifest: Manifest, canaries: Canaries | None, progress: StageProgress) -> None:
    """Pass the recall gate, add canaries and figures, and look at the result as a reader does."""
    manifest.write(folder / layout.MANIFEST)
    with Datastore.open_folder(folder) as store:
        own = some_entries(store.entries, _GATE_QUERIES, manifest.index.seed)
        queries = store.keys(own) if canaries is None else canaries.queries
        gate = pass_gate(store, queries, progress)
        tested = some_entries(store.entries, SELF_QUERIES, manifest.index.seed + 1)
        measured = {
            "recall_queries": len(queries),
            "recall_queries_from": "stored keys" if canaries is None else "canaries",
            RECORDED_RECALL: gate.recall_at_32,
            "self_recall": check_self_recall(store, tested, nprobe=gate.nprobe or None),
            "self_queries": len(tested),
        }
    files = manifest.files
    if canaries is not None:
        path = folder / layout.CANARIES
        write_canaries(path, queries, gate.exact, canaries.documents)
        files = {**files, layout.CANARIES: FileRecord(bytes=path.stat().st_size, sha256=hash_file(path))}
    spec = manifest.index.model_copy(update={"nprobe": gate.nprobe})
    update = {"index": spec, "quality": {**manifest.quality, **measured}, "files": files}
    # Validated again: `model_copy` is not.
    Manifest.model_validate(manifest.model_copy(update=update).model_dump()).write(folder / layout.MANIFEST)
    with Datastore.open_folder(folder) as store:
        self_test(store)
