"""A small real name with everything that maintenance meets: held-out text, canaries, a calibration, a tail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from small_store import WORD, Plan, build, random_keys

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import Calibration, calibration_id, write_calibration
from knnlm_core.datastore.canaries import RECORDED_RECALL, write_canaries
from knnlm_core.datastore.checksums import record_files
from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.entries import Entries
from knnlm_core.datastore.ledger import ledger_lock
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.manifest import IndexSpec, Manifest
from knnlm_core.datastore.publish import publish
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.segments import NewDocument, learn
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.types import EntryRange

NAME = "law"
DIM = 8
SIZES = (30, 0, 25, 40, 20, 35)  # entries of the documents doc/0 … doc/5
CUTS = (60, 120)
HELD_OUT = (Document("held/1", "Held out whole."), Document("doc/2#tail", "The end of doc/2."))


def store_keys(seed: int = 0) -> npt.NDArray[np.float16]:
    """Keys of the documents; some equal ones within and across documents, as repeated text makes them."""
    return random_keys(sum(SIZES), DIM, seed, duplicates=12)


def queries(count: int = 24, seed: int = 5) -> torch.Tensor:
    keys = random_keys(count, DIM, seed)
    return torch.from_numpy(keys.astype(np.float32))


def publish_store(
    root: Path,
    *,
    keys: npt.NDArray[np.float16] | None = None,
    sizes: tuple[int, ...] = SIZES,
    spec: IndexSpec | None = None,
    salt: int = 0,
    held_out: tuple[Document, ...] = HELD_OUT,
    cuts: tuple[int, ...] = CUTS,
    shard_entries: int | None = None,
) -> str:
    """Build, add canaries and a calibration as the builder does, publish, and return the version."""
    keys = store_keys(salt) if keys is None else keys
    plan = Plan(keys, cuts=cuts, document_sizes=sizes, spec=spec, held_out=held_out, salt=salt)
    version = build(root, plan)
    folder = layout.building_folder(root, NAME, version)
    if held_out:
        asked = queries(12, seed=9) if keys.shape[1] == DIM else torch.from_numpy(keys[:12].astype(np.float32))
        with Datastore.open_folder(folder) as store:
            exact = store.search_exact(asked, min(32, store.entries))
        names = [held_out[row % len(held_out)].id for row in range(len(asked))]
        write_canaries(folder / layout.CANARIES, asked, exact, names)
    manifest = Manifest.read(folder / layout.MANIFEST)
    update = {
        "quality": {RECORDED_RECALL: 0.95, "recall_at_k": 1.0, "helps": True, "forced": False},
        "build": manifest.build | ({"shard_entries": shard_entries} if shard_entries else {}),
        "files": record_files(folder),
    }
    manifest.model_copy(update=update).write(folder / layout.MANIFEST)
    protocol = {
        "held_out_unit": "documents",
        "held_out_documents": [d.id for d in held_out],
        "held_out_digests": [f"digest of {d.id}" for d in held_out],
        "seed": 0,
    }
    calibration = Calibration(
        id=calibration_id(version, protocol),
        datastore_version=version,
        k=8,
        knn_temperature=2.5,
        lmbda=0.25,
        protocol=protocol,
        report={"tokens": 100, "held_out_documents": [d.id for d in held_out]},
        helps=True,
    )
    write_calibration(root, NAME, calibration)
    publish(root, NAME, version, calibration.id)
    return version


def new_document(document_id: str, entries: int, seed: int) -> NewDocument:
    text = "".join(f"{seed:02}{i:05} " for i in range(entries + 1))  # of words of the same length, and nobody else's
    starts = (np.arange(entries) + 1) * len(WORD)
    return NewDocument(
        Document(document_id, text, f"https://example.org/{document_id}", "Learned", "CC0", ("new",)),
        random_keys(entries, DIM, seed),
        (np.arange(entries) * 7 + seed) % 500,
        np.stack([starts, starts + len(WORD)], axis=1),
    )


def teach(root: Path, *documents: NewDocument) -> int:
    """Learn documents in one segment; returns the revision."""
    with Datastore.open(root, NAME) as store, ledger_lock(root, NAME) as writer:
        return learn(writer, store.manifest.lm, store.manifest.context, documents).revision


def forget(root: Path, *ids: str) -> int:
    with ledger_lock(root, NAME) as writer:
        return writer.delete(ids).revision


def change_a_lot(root: Path) -> None:
    """Learn, replace and delete, so that every kind of dead and living copy is there."""
    teach(root, new_document("new/a", 15, 21), new_document("new/empty", 0, 22))  # 1
    teach(root, new_document("doc/3", 18, 23))  # 2: replaces a document of the version
    forget(root, "doc/0")  # 3
    teach(root, new_document("new/b", 12, 24), new_document("new/c", 9, 25))  # 4
    forget(root, "new/b")  # 5
    teach(root, new_document("new/a", 14, 26))  # 6: replaces a learned one; segment 1 keeps new/empty alone
    teach(root, new_document("new/gone", 5, 27))  # 7
    forget(root, "new/gone")  # 8: segment 7 is dead


ALIVE = ["doc/1", "doc/2", "doc/4", "doc/5", "new/empty", "doc/3", "new/c", "new/a"]


def living(root: Path, version: str | None = None) -> Snapshot:
    """What a request would see now; the version stays open with the snapshot."""
    return LivingName(root, NAME).snapshot(Datastore.open(root, NAME, version))


Place = tuple[str, int]


def places(store: Entries, entry_ids: torch.Tensor) -> list[Place | None]:
    """Entry ids as (document, number of the entry in it): what stays the same when entries are renumbered."""
    found: list[Place | None] = []
    for entry_id in entry_ids.reshape(-1).tolist():
        if entry_id < 0:
            found.append(None)
            continue
        (location,) = store.locate([entry_id])
        assert location is not None
        first, stop = store.document_entries(location.document_id)
        assert first <= entry_id < stop
        found.append((location.document_id, entry_id - first))
    return found


def all_entries(store: Entries) -> dict[Place, tuple[bytes, int, int, int]]:
    """Every visible entry: its key, value and span, by place."""
    content = {}
    for document_id in store.document_ids():
        first, stop = store.document_entries(document_id)
        ids = torch.arange(*EntryRange(first, stop))
        for number, (key, value, place) in enumerate(
            zip(store.keys(ids), store.values(ids).tolist(), store.locate(ids.tolist()), strict=True)
        ):
            assert place is not None
            content[document_id, number] = key.numpy().tobytes(), value, place.char_start, place.char_end
    return content
