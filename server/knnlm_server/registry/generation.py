"""A loaded version of a name, and the right to use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from knnlm_core.datastore.canaries import SelfTest
from knnlm_core.datastore.living import LivingName
from knnlm_core.datastore.reader import Datastore
from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import Drift


@dataclass(slots=True, eq=False)
class Generation:
    """One load of a name; what the table changes in it, it changes under its lock.

    Attributes:
        living: what the name has learned and deleted; shared by its generations.
        snapshot: what a request that begins now sees; replaced whenever something is learned or deleted.
        drift: of the running LM's keys from the version's; None where nothing could be said.
        retired: the name means another generation, or none.
    """

    datastore: Datastore
    living: LivingName
    snapshot: Snapshot
    number: int
    self_test: SelfTest
    drift: Drift | None = None
    leases: int = 0
    retired: bool = False

    @property
    def name(self) -> str:
        """The datastore's name."""
        return self.datastore.name


class Lease:
    """The right to use one snapshot of one generation until `release`.

    Attributes:
        datastore: what the request sees, from its admission to its end.
        generation: its number.
    """

    def __init__(self, generation: Generation, snapshot: Snapshot, give_back: Callable[[Generation], None]) -> None:
        self._held = [generation]
        self._give_back = give_back
        self.datastore = snapshot
        self.generation = generation.number

    @property
    def label(self) -> str:
        """``name:version:generation.revision``, as answers carry it."""
        snapshot = self.datastore
        return f"{snapshot.name}:{snapshot.version}:{self.generation}.{snapshot.revision}"

    def release(self) -> None:
        """Give the lease back; further calls do nothing, from whichever thread."""
        try:
            generation = self._held.pop()  # of two threads one gets it
        except IndexError:
            return
        self._give_back(generation)
