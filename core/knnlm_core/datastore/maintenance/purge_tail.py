"""Taking documents out of the tail for good."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from knnlm_core.datastore.ledger import LedgerWriter
from knnlm_core.datastore.maintenance.copies import Keep, Source
from knnlm_core.datastore.segments import NewDocument, open_segment, write_segment

Noted = Callable[[int, Source, Keep], None]


def rewrite_tail(writer: LedgerWriter, ids: Collection[str], noted: Noted) -> dict[int, int | None]:
    """Write every segment anew that holds one of some documents; revision of the old one → of the new one.

    A segment is never changed, so the other documents that are alive in it are learned anew, as they are: all their
    older copies are dead from then on. None where there is no such document. The old segments stay listed, for whoever
    has to know what they held, until `LedgerState.without_segments`. A document that was learned again meanwhile is
    deleted again.

    Args:     noted: gets the revision of each new segment with the one that it is made from, and what was kept of it.
    """
    if again := sorted(document_id for document_id in ids if document_id in writer.state.learned):
        writer.delete(again)
    replaced: dict[int, int | None] = {}
    for record in writer.state.segments:
        with open_segment(writer.root, writer.name, record, checksums=True) as segment:
            if not any(document_id in segment.documents for document_id in ids):
                continue
            source = Source.of_segment(segment)
            keep = _keep(writer, ids)
            documents = _documents(source, keep)
            replaced[record.revision] = None
            if documents:
                lm, context, revision = segment.manifest.lm, segment.manifest.context, writer.next_revision
                new = write_segment(writer.root, writer.name, revision, lm, context, documents)
                noted(revision, source, keep)
                writer.commit(writer.state.after_add(new, [one.document.id for one in documents]))
                replaced[record.revision] = revision
    return replaced


def _keep(writer: LedgerWriter, ids: Collection[str]) -> Keep:
    state = writer.state
    return lambda document_id, revision: document_id not in ids and state.killed_before(document_id) <= revision


def _documents(source: Source, keep: Keep) -> list[NewDocument]:
    (arrays,) = source.arrays  # of a segment
    columns = arrays.columns
    spans = np.column_stack([columns.char_starts, columns.char_ends])
    return [
        NewDocument(document, arrays.keys[first:stop], columns.values[first:stop], spans[first:stop])
        for document, (first, stop) in source.documents(keep)
    ]
