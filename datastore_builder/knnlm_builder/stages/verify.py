"""Verify a finished store as a reader would see it: every stored key must find itself."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from knnlm_builder.stages.plan import Plan
from knnlm_core.datastore.canaries import self_test
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.recall import SELF_QUERIES, check_self_recall
from knnlm_core.errors import DatastoreCorrupt, VerifyFailed


class SelfCheck(NamedTuple):
    """What the check measured."""

    queries: int
    self_recall: float


def verify(datastore: Datastore, plan: Plan, *, nprobe: int, seed: int) -> SelfCheck:
    """Counts agree with the plan, and stored keys find an entry at their own place.

    Raises: VerifyFailed: naming the check, what was found and what is needed.
    """
    if datastore.entries != plan.num_entries:
        raise VerifyFailed(f"the store holds {datastore.entries} entries, the plan has {plan.num_entries}")
    if datastore.manifest.documents.count != len(plan.documents):
        raise VerifyFailed(
            f"the store holds {datastore.manifest.documents.count} documents, the plan has {len(plan.documents)}"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(datastore.entries, generator=generator)[:SELF_QUERIES]
    share = check_self_recall(datastore, ids, nprobe=nprobe or None)
    for document in plan.documents[:: max(1, len(plan.documents) // 8)]:
        if not document.num_entries:
            continue
        entries = datastore.document_entries(document.id)
        have = datastore.values(torch.arange(*entries))
        need = torch.from_numpy(plan.tokens(document)[1:].astype("int64"))
        if not torch.equal(have, need):
            raise VerifyFailed(f"document {document.id!r}: its entries' values are not its tokens")
    return SelfCheck(len(ids), share)


def verify_as_reader(folder: Path) -> None:
    """Open a finished build once more, with its last manifest, and pass its own self-test.

    Raises: VerifyFailed: with what a reader would be told.
    """
    try:
        with Datastore.open_folder(folder) as datastore:
            self_test(datastore)
    except DatastoreCorrupt as error:
        raise VerifyFailed(f"the finished store is refused: {error.message}") from error
