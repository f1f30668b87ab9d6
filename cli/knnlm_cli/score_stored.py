"""Which documents a server's datastore holds, where it can only be asked whether it holds all of some."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stored_among(ids: Sequence[str], holds_all: Callable[[Sequence[str]], bool], most: int) -> set[str]:
    """Those of some ids that a datastore holds, in few questions where neighbours in the list are alike.

    Halves what was answered with no until the first missing id is found, and doubles its steps from there on: one
    question for ``most`` ids that are all stored, one for each that is missing, about 2·log₂(run) for a run of stored
    ids between missing ones. Where stored and missing ids take turns, which is the worst, three for every two ids.

    Args:
        holds_all: whether the datastore holds every one of these, at most ``most`` at once.
    """
    stored: set[str] = set()
    at, step = 0, most
    suspects = 0  # so many ids from ``at`` on are known to have a missing one among them
    while at < len(ids):
        if suspects == 1:
            at, step, suspects = at + 1, 1, 0
            continue
        part = ids[at : at + (suspects // 2 or min(step, most))]
        if holds_all(part):
            stored.update(part)
            at, step, suspects = at + len(part), 2 * len(part), max(0, suspects - len(part))
        else:
            suspects = len(part)
    return stored
