"""How a registry behaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """Settings of a registry.

    Attributes:
        verified: folder that remembers which versions were read in full on this machine; None compares sizes only.
        state: file that remembers what is served; None forgets.
        keep_versions: how many versions of a name stay on the disk, those in use aside; None for all.
        max_bytes: of all open generations and what was learned; None for no limit.
    """

    verified: Path | None = None
    state: Path | None = None
    max_bytes: int | None = None
    keep_versions: int | None = None
