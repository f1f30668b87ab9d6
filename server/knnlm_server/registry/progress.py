"""What a load does, step by step; how far it has come is told as work on the disk tells it."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """What a load does, in this order; `VERIFY` only at a version's first load on a machine."""

    OPEN = "open"
    VERIFY = "verify"  # in bytes
    WARM = "warm"  # in bytes
    TEST = "test"
    SWAP = "swap"
