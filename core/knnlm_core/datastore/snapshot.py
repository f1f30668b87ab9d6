"""What one request sees of a datastore: a version, what was learned before the request began, nothing that is deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from knnlm_core.datastore.entries import Entries, Part, Section
from knnlm_core.datastore.reader import Datastore


class Snapshot(Entries):
    """A version and the documents learned up to a revision. What is deleted later is gone from it too, at once.

    Entry ids: those of the version, then those of the learned documents in the order in which they were learned.

    Args:
        datastore: the version; whoever holds the snapshot keeps it open.
        learned: parts and sections of the learned documents.
        revision: of the name, when the snapshot was taken.
        killed: gives, at any time, the revision before which all copies of a document are dead, by document id.
    """

    def __init__(
        self,
        datastore: Datastore,
        learned: tuple[Sequence[Part], Sequence[Section]],
        revision: int,
        killed: Callable[[], Mapping[str, int]],
    ) -> None:
        self.manifest = datastore.manifest
        self.calibration = datastore.calibration
        self.revision = revision
        self.datastore = datastore
        self._learned_parts, learned_sections = learned
        self._all_sections = (*datastore._sections(), *learned_sections)
        self._entries = self._learned_parts[-1].stop if self._learned_parts else datastore.entries
        self._killed = killed

    @property
    def entries(self) -> int:
        """N, hidden entries included."""
        return self._entries

    @property
    def learned_entries(self) -> int:
        """How many of them were learned, hidden ones included."""
        return self._entries - self.datastore.entries

    @property
    def num_documents(self) -> int:
        """Documents that are not deleted."""
        dead = sum(
            document_id in section.documents and revision > section.revision
            for document_id, revision in self._killed().items()
            for section in self._all_sections
        )
        return sum(len(section.documents) for section in self._all_sections) - dead

    def _parts(self) -> Sequence[Part]:
        return (*self.datastore._parts(), *self._learned_parts)

    def _sections(self) -> Sequence[Section]:
        return self._all_sections

    def _is_deleted(self, document_id: str, revision: int) -> bool:
        return self._killed().get(document_id, 0) > revision
