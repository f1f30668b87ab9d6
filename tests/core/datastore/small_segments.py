"""Names that learn and forget, for tests: documents to learn, and operations that their revision determines."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from knnlm_core.datastore.documents import Document
from knnlm_core.datastore.ledger import LedgerState, LedgerWriter, ledger_lock
from knnlm_core.datastore.manifest import ContextSection, LMSection
from knnlm_core.datastore.segments import NewDocument, learn, open_segment

NAME = "law"
DIM = 4
LM = LMSection(
    model_fingerprint="f" * 32,
    tokenizer_fingerprint="0" * 32,
    model_name="tiny",
    vocab_size=512,
    key_tap="last_ffn_input",
    key_dim=DIM,
)
CONTEXT = ContextSection(window=16, stride=8)


def new_document(document_id: str, entries: int, seed: int = 0) -> NewDocument:
    """A document of words of two characters, the first of which makes no entry."""
    rng = np.random.default_rng(seed)
    starts = 2 * np.arange(1, entries + 1)
    return NewDocument(
        Document(document_id, "ab" * (entries + 1), f"https://example.org/{seed}", None, "CC0", ("learned",)),
        rng.standard_normal((entries, DIM)).astype(np.float16),
        rng.integers(0, LM.vocab_size, entries),
        np.stack([starts, starts + 2], axis=1),
    )


def teach(writer: LedgerWriter, *documents: NewDocument, actor: str | None = None) -> LedgerState:
    return learn(writer, LM, CONTEXT, documents, actor=actor)


class Planned(NamedTuple):
    """The operation that makes a revision."""

    operation: Literal["add", "delete"]
    ids: tuple[str, ...]


def planned(revision: int) -> Planned:
    """Two adds and a delete in turn, of few ids, so that copies and whole segments die all the time."""
    rng = random.Random(revision)
    ids = rng.sample([f"doc/{number}" for number in range(5)], rng.randint(1, 3))
    return Planned("delete" if revision % 3 == 0 else "add", tuple(ids))


def planned_documents(revision: int) -> list[NewDocument]:
    sizes = random.Random(-revision)
    return [new_document(id_, sizes.randint(0, 5), seed=revision) for id_ in planned(revision).ids]


def perform_next(root: Path) -> int:
    """Do the next planned operation, then drop the segments of which nothing is alive; returns the revision."""
    with ledger_lock(root, NAME) as writer:
        revision = writer.next_revision
        operation, ids = planned(revision)
        if operation == "add":
            teach(writer, *planned_documents(revision), actor="test")
        else:
            writer.delete(ids, actor="test")
        alive = set(writer.state.learned.values())
        dead = [record.revision for record in writer.state.segments if record.revision not in alive]
        if dead:
            writer.commit(writer.state.without_segments(dead))
            writer.remove_leftovers()
    return revision


class Replayed(NamedTuple):
    """What the planned operations up to a revision come to, by the definitions."""

    learned: dict[str, int]
    deleted: dict[str, int]
    added: set[int]  # revisions that made a segment


def replay(revision: int) -> Replayed:
    learned: dict[str, int] = {}
    deleted: dict[str, int] = {}
    for at in range(1, revision + 1):
        operation, ids = planned(at)
        for document_id in ids:
            learned.pop(document_id, None)
            deleted.pop(document_id, None)
            (learned if operation == "add" else deleted)[document_id] = at
    return Replayed(learned, deleted, {at for at in range(1, revision + 1) if planned(at).operation == "add"})


def check_state(state: LedgerState) -> None:
    """The state is that of the planned operations up to its revision, whole."""
    replayed = replay(state.revision)
    assert state.learned == replayed.learned
    assert state.deleted == replayed.deleted
    listed = {record.revision for record in state.segments}
    assert set(replayed.learned.values()) <= listed <= replayed.added


def check_segments(root: Path, state: LedgerState) -> None:
    """Every listed segment holds what its revision taught, bit for bit."""
    for record in state.segments:
        taught = planned_documents(record.revision)
        with open_segment(root, NAME, record, checksums=True) as segment:
            assert [segment.documents.document(new.document.id) for new in taught] == [new.document for new in taught]
            assert np.array_equal(segment.keys, np.concatenate([new.keys for new in taught]))
            assert np.array_equal(segment.columns.values, np.concatenate([new.values for new in taught]))


def tail_folders(root: Path) -> list[str]:
    tail = root / NAME / "tail"
    return sorted(os.listdir(tail)) if tail.is_dir() else []
