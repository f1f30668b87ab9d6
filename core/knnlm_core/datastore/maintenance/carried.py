"""What a rewritten version takes over from the one that it was made from: held-out text, canaries, calibration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from pydantic import JsonValue

from knnlm_core.datastore import layout
from knnlm_core.datastore.calibration import (
    PRACTICE_IDS,
    Calibration,
    LambdaRules,
    calibration_id,
    read_calibration,
    read_gate_trees,
    write_calibration,
)
from knnlm_core.datastore.canaries import Canaries, canaries_of
from knnlm_core.datastore.documents import DocumentsWriter
from knnlm_core.datastore.maintenance.copies import Keep
from knnlm_core.datastore.reader import Datastore

TAIL_SUFFIX = "#tail"  # of the id of a document's end, where that was held out and the rest was not
COPIED_FROM = "copied_from"
HELD_OUT_IDS, _HELD_OUT_DIGESTS = "held_out_documents", "held_out_digests"  # in `protocol` and `report`
_PRACTICE_DIGESTS = "practice_digests"


def whole_document(document_id: str) -> str:
    """The document that a held-out document is, or is the end of."""
    return document_id.removesuffix(TAIL_SUFFIX)


def keeps_held_out(keep: Keep, document_id: str, revision: int) -> bool:
    """Whether held-out text stays: it goes with the document that it is the end of."""
    return keep(document_id, revision) and keep(whole_document(document_id), revision)


def copy_held_out(folder: Path, store: Datastore, keep: Keep) -> None:
    """Write the held-out documents to be kept; no file where there are none."""
    revision = store.manifest.revision
    kept = (d for d in store.held_out_documents() if keeps_held_out(keep, d.id, revision))
    if (first := next(kept, None)) is None:
        return
    with DocumentsWriter(folder / layout.HELD_OUT) as writer:
        writer.add(first, 0)
        for document in kept:
            writer.add(document, 0)


def canaries_to_keep(store: Datastore, keep: Keep) -> Canaries | None:
    """The canaries of a version but those from held-out documents that go; None where none is left."""
    canaries = canaries_of(store)
    if canaries is None:
        return None
    revision = store.manifest.revision
    rows = [row for row, document in enumerate(canaries.documents) if keeps_held_out(keep, document, revision)]
    return canaries.take(torch.tensor(rows, dtype=torch.int64)) if rows else None


def copy_calibration(root: Path, name: str, calibration: str, version: str, *, without: Collection[str] = ()) -> str:
    """Give a rewritten version the calibration of the one that it was made from; returns the copy's id.

    Rules for λ and the gate go with the documents that they were fitted on: they are many numbers. Then the single λ
    holds, and every token is searched, until `knnlm calibrate` fits them anew.

    Args:     without: documents that it must not name any more.
    """
    old = read_calibration(root, name, calibration)
    protocol = {**_not_naming(old.protocol, without), COPIED_FROM: calibration}
    changes: dict[str, object] = {
        "id": calibration_id(version, protocol),
        "datastore_version": version,
        "protocol": protocol,
        "report": _not_naming(old.report, without),
    }
    trees = read_gate_trees(root, name, old)
    fitted_on = {whole_document(id_) for field in (HELD_OUT_IDS, PRACTICE_IDS) for id_ in _listed(old.protocol, field)}
    if not fitted_on.isdisjoint(without):
        trees = None
        changes |= {
            "lambda_mode": "fixed",
            "lambda_rules": LambdaRules(),
            "follow_rule": None,
            "gate": "always",
            "gate_threshold": None,
            "gate_trees": None,
            "learned_threshold": None,
        }
    new = Calibration.model_validate({**dict(old), **changes})
    write_calibration(root, name, new, trees)
    return new.id


def _listed(content: Mapping[str, JsonValue], field: str) -> list[str]:
    ids = content.get(field)
    return [id_ for id_ in ids if isinstance(id_, str)] if isinstance(ids, list) else []


def _not_naming(content: Mapping[str, JsonValue], without: Collection[str]) -> dict[str, JsonValue]:
    """The same without the ids of some documents, and without the digests that stand beside them."""
    changed = dict(content)
    for field, digests in ((HELD_OUT_IDS, _HELD_OUT_DIGESTS), (PRACTICE_IDS, _PRACTICE_DIGESTS)):
        ids = content.get(field)
        if not without or not isinstance(ids, list):
            continue
        stays = [not (isinstance(id_, str) and whole_document(id_) in without) for id_ in ids]
        for listed in (field, digests):
            values = content.get(listed)
            if isinstance(values, list) and len(values) == len(stays):
                changed[listed] = [value for value, kept in zip(values, stays, strict=True) if kept]
    return changed
