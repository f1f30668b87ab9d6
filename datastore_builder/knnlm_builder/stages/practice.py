"""Practice: the store's own documents, searched without themselves, for what needs more text than was held out.

Rules for λ and the learned gate have many parameters, and held-out text is scarce. To a document whose own entries are
excluded, the store looks as it does to a new one. Nothing is reported on these documents.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from knnlm_builder.progress import Reporter
from knnlm_builder.stages.fit import Evidence
from knnlm_builder.stages.held_out import SEARCH_ROWS, Queries, encode_held_out
from knnlm_builder.stages.plan import TAIL_SUFFIX, Plan, PlannedDocument, plan_documents
from knnlm_core.datastore.reader import Datastore
from knnlm_core.lm.protocol import CausalLM
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.types import EntryRange, Neighbors

MAX_TOKENS = 50_000
MAX_SHARE = 0.15  # of the store's entries: practice must not take long where building did not
_DEEPER = 256  # neighbours
MAX_DOCUMENT_SHARE = 0.2  # a store without one of its larger documents is another store


class Practice(NamedTuple):
    """What the LM and a search know of some of the store's own tokens."""

    documents: Sequence[PlannedDocument]
    queries: Queries
    evidence: Evidence


def gather_practice(
    lm: CausalLM,
    tokenizer: Tokenizer,
    datastore: Datastore,
    dead: Collection[str] = (),
    *,
    k: int,
    nprobe: int,
    seed: int,
    batch_tokens: int,
    reporter: Reporter,
) -> Practice | None:
    """Draw documents by a hash of their ids, encode them, and search for each without its own entries.

    Args:
        dead: ids of documents that must not be looked at.
        nprobe: lists to visit; 0 for an index without lists.
    Returns: None where no document is small enough beside the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(datastore, tokenizer, Path(folder), dead, seed)
        documents = [document for document in plan.held_out if document.num_entries]
        if not documents:
            return None
        queries = encode_held_out(
            lm, plan, documents, batch_tokens=batch_tokens, reporter=reporter, title="Encode text to practise on"
        )
    own = [datastore.document_entries(document.id) for document in documents]
    parts = []
    with reporter.stage("Search it", len(queries.keys), "tokens") as advance:
        for rows in torch.split(torch.arange(len(queries.keys)), SEARCH_ROWS):
            parts.append(_search(datastore, queries.take(rows), own, k, nprobe))
            advance(len(rows))
    neighbors = Neighbors(*(torch.cat(column) for column in zip(*parts, strict=True)))
    evidence = Evidence(queries.base, neighbors, queries.targets, queries.blocks, queries.signals)
    return Practice(documents, queries, evidence)


def _search(datastore: Datastore, queries: Queries, own: Sequence[EntryRange], k: int, nprobe: int) -> Neighbors:
    """Search for tokens of several documents without the entries of each one's own.

    One search for all of them, somewhat deeper, is much faster than one for each document; few documents fill so much
    of it that they need one to themselves.
    """
    first, stop = torch.tensor([own[i] for i in queries.documents.tolist()]).T[:, :, None]
    deeper = datastore.search(queries.keys, k + _DEEPER, nprobe=nprobe or None)
    ids = deeper.entry_ids
    others = (ids >= 0) & ~((ids >= first) & (ids < stop))
    order = torch.argsort(~others, dim=1, stable=True)[:, :k]  # the others first, as near as they were
    kept = others.gather(1, order)
    found = Neighbors(
        ids.gather(1, order).masked_fill(~kept, -1),
        deeper.distances.gather(1, order).masked_fill(~kept, torch.inf),
        deeper.values.gather(1, order).masked_fill(~kept, -1),
    )
    short = ~kept.all(dim=1) & (ids[:, -1] >= 0)
    for number in torch.unique(queries.documents[short]).tolist():
        rows = (short & (queries.documents == number)).nonzero()[:, 0]
        alone = datastore.search(queries.keys[rows], k, exclude=[own[number]], nprobe=nprobe or None)
        for into, column in zip(found, alone, strict=True):
            into[rows] = column
    return found


def _plan(datastore: Datastore, tokenizer: Tokenizer, folder: Path, dead: Collection[str], seed: int) -> Plan:
    budget = min(MAX_TOKENS, int(MAX_SHARE * datastore.entries))
    largest = min(budget, int(MAX_DOCUMENT_SHARE * datastore.entries))
    drawn, tokens = [], 0
    # A document whose end was held out may be reported on.
    held_out = {document.id.removesuffix(TAIL_SUFFIX) for document in datastore.held_out_documents()}
    offered = set(datastore.document_ids()) - set(dead) - held_out
    for document_id in sorted(offered, key=lambda id_: _draw(id_, seed)):
        first, stop = datastore.document_entries(document_id)
        if tokens + (stop - first) <= budget and stop - first <= largest:
            drawn.append(document_id)
            tokens += stop - first
    return plan_documents(map(datastore.document, drawn), datastore, tokenizer, folder)


def _draw(document_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{document_id}".encode()).digest()
