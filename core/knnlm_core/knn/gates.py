"""When to search: gates decide per token, before any search, from what is free."""

from __future__ import annotations

from enum import StrEnum

from knnlm_core.errors import InvalidKnnParams, UnsupportedFeature


class Gate(StrEnum):
    """The gates that this build can honour; the value is also the decision that a trace shows."""

    ALWAYS = "always"
    NEVER = "never"


_PLANNED = ("every_n", "confidence", "bucketed", "learned", "automaton")


def parse_gate(name: str) -> Gate:
    """Raises: UnsupportedFeature: a gate of a later release. InvalidKnnParams: no such gate at all."""
    try:
        return Gate(name)
    except ValueError:
        known = ", ".join(Gate)
        if name in _PLANNED:
            raise UnsupportedFeature(
                f"`knn.gate` {name!r} is not offered by this build; it knows {known}", param="knn.gate"
            ) from None
        raise InvalidKnnParams(f"`knn.gate` must be one of {known}, got {name!r}", param="knn.gate") from None
