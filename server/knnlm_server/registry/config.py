"""How a registry behaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.drift import Drift


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Settings of a registry.

    Attributes:
        verified: folder that remembers which versions were read in full on this machine; None compares sizes only.
        state: file that remembers what is served; None forgets.
        keep_versions: how many versions of a name stay on the disk, those in use aside; None for all.
        max_bytes: of all open generations and what was learned; None for no limit.
        numerics: of the running LM; a version whose calibration was measured with others is refused. None asks nothing.
        drift: measures how far the running LM's keys are from a version's; None measures nothing.
    """

    verified: Path | None = None
    state: Path | None = None
    max_bytes: int | None = None
    keep_versions: int | None = None
    numerics: str | None = None
    drift: Callable[[Snapshot], Drift | None] | None = None
