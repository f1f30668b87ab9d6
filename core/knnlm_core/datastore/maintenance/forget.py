"""Deleting documents of a name that no server need have open."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.ledger import check_document_ids
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.reader import Datastore


def forget(root: Path, name: str, document_ids: Sequence[str], *, actor: str | None = None) -> int:
    """Delete documents from every version and from what was learned; returns the revision of the deletion.

    Raises:
        DocumentNotFound: naming the first id that no published version shows; then nothing is deleted.
        DatastoreNotFound, DatastoreCorrupt, DatastoreMismatch: of opening the versions.
        InvalidParameter, DatastoreBusy, DatastoreReadOnly: see `ledger_lock`.
    """
    check_document_ids(document_ids)
    layout.read_current(root, name)
    living = LivingName(root, name)
    with ExitStack() as open_ones:
        for version in layout.published_versions(root, name):
            living.snapshot(open_ones.enter_context(Datastore.open(root, name, version)))
        return living.delete(document_ids, actor=actor).revision
