"""What one request sees of a datastore: a version, what was learned before it began, and nothing that is deleted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from knnlm_core.datastore.entries import Entries, Part, Section
from knnlm_core.datastore.ledger import LedgerState
from knnlm_core.datastore.reader import Datastore


class Counts(NamedTuple):
    """How many documents a snapshot began with."""

    documents: int  # without deleted ones
    learned: int  # of them, those that the version itself does not hold
    deleted: int  # ids deleted from the name, whichever versions had them


class Snapshot(Entries):
    """A version and the documents learned up to a revision. What is deleted later is gone from it too, at once.

    Entry ids: those of the version, then those of the learned documents in the order in which they were learned.

    Args:
        datastore: the version; whoever holds the snapshot keeps it open.
        learned: parts and sections of the learned documents.
        counts: when the snapshot was taken.
        revision: of the name, when the snapshot was taken.
        ledger: gives the ledger's present state at any time.
    """

    def __init__(
        self,
        datastore: Datastore,
        learned: tuple[Sequence[Part], Sequence[Section]],
        counts: Counts,
        revision: int,
        ledger: Callable[[], LedgerState],
    ) -> None:
        self.manifest = datastore.manifest
        self.calibration = datastore.calibration
        self.gate_trees = datastore.gate_trees
        self.revision = revision
        self.counts = counts
        self.datastore = datastore
        self._learned_parts, learned_sections = learned
        self._all_sections = (*datastore._sections(), *learned_sections)
        self._entries = self._learned_parts[-1].stop if self._learned_parts else datastore.entries
        self._ledger = ledger

    @property
    def entries(self) -> int:
        """N, hidden entries included."""
        return self._entries

    @property
    def learned_entries(self) -> int:
        """How many of them were learned, hidden ones included."""
        return self._entries - self.datastore.entries

    def _parts(self) -> Sequence[Part]:
        return (*self.datastore._parts(), *self._learned_parts)

    def _sections(self) -> Sequence[Section]:
        return self._all_sections

    def _is_deleted(self, document_id: str, revision: int) -> bool:
        return self._ledger().killed_before(document_id) > revision
