"""Deleting documents of a name that no server need have open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from knnlm_core.datastore import layout
from knnlm_core.datastore.ledger import check_document_ids
from knnlm_core.datastore.living import LivingName


def forget(root: Path, name: str, document_ids: Sequence[str], *, actor: str | None = None) -> int:
    """Delete documents from every version and from what was learned; returns the revision of the deletion.

    Raises:
        DocumentNotFound: naming the first id that no published version has; then nothing is deleted.
        DatastoreNotFound: nothing of the name is published.
        InvalidParameter, DatastoreBusy, DatastoreReadOnly: see `ledger_lock`.
    """
    check_document_ids(document_ids)
    layout.read_current(root, name)
    return LivingName(root, name).delete(document_ids, actor=actor).revision
