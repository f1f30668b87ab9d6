"""Stop strings, found across the borders of text deltas.

An Aho-Corasick automaton reads the text once. The depth of its state is the length of the longest suffix of the text
that begins some stop string, which is exactly what must be held back:

    stops "abc", "bd"      text  x a b        state "ab" (depth 2): emit "x", hold "ab"
                                 x a b d      "bd" is complete:     emit "a", stopped

The stop string that is *complete first* wins; of several that end at the same character, the longest. So the result
depends on the text alone, never on how it was cut into deltas, and no token is generated only to settle a match.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_ROOT = 0


class StopResult(NamedTuple):
    """What a delta of text led to."""

    emit: str  # text that may be shown now
    stopped: bool  # whether a stop string is complete
    matched: str | None  # which one


class _Automaton:
    """The trie of the stop strings with failure links; immutable once built.

    Time and memory are linear in the stop strings' total length.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.failure: list[int] = [_ROOT]
        self.depth: list[int] = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            # A stop string with another one before its last character can never be complete first. Without it, every
            # state can still lead to a match, so nothing is held back in vain; and stop strings end at leaves alone,
            # where the leaf's own is the longest of those that end there.
            if not any(other in stop[:-1] for other in stops):
                self._insert(stop)
        self._link()

    def _insert(self, stop: str) -> None:
        node = _ROOT
        for char in stop:
            child = self.children[node].get(char)
            if child is None:
                child = len(self.children)
                self.children[node][char] = child
                self.children.append({})
                self.failure.append(_ROOT)
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
            node = child
        self.match[node] = stop

    def _link(self) -> None:
        queue = deque(self.children[_ROOT].values())
        while queue:
            node = queue.popleft()
            for char, child in self.children[node].items():
                self.failure[child] = self.step(self.failure[node], char)
                queue.append(child)

    def step(self, node: int, char: str) -> int:
        """The state after one more character."""
        while node != _ROOT and char not in self.children[node]:
            node = self.failure[node]
        return self.children[node].get(char, _ROOT)


class StopMatcher:
    """Cuts a stream of text at the first stop string.

    Args:
        stops: non-empty strings; none at all means that everything passes.
        include_stop: leave the stop string at the end of the text; then nothing ever needs to be held back.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._automaton = _Automaton(stops)
        self._include_stop = include_stop
        self._node = _ROOT
        self._held = ""
        self._matched: str | None = None

    def copy(self) -> StopMatcher:
        """A second matcher in the same state, for a forked sequence; the automaton is shared."""
        twin = StopMatcher.__new__(StopMatcher)
        twin._automaton = self._automaton
        twin._include_stop = self._include_stop
        twin._node, twin._held, twin._matched = self._node, self._held, self._matched
        return twin

    @property
    def held(self) -> str:
        """Text that was pushed and not emitted because it may turn out to be (part of) a stop string."""
        return self._held

    def push(self, text_delta: str) -> StopResult:
        """Take more text; say what of it may be shown and whether the text ends here.

        After a match, text is dropped and the same match is reported.
        """
        if self._matched is not None:
            return StopResult("", True, self._matched)
        for read, char in enumerate(text_delta, start=1):
            self._node = self._automaton.step(self._node, char)
            matched = self._automaton.match[self._node]
            if matched is not None:
                text = self._held + text_delta[:read]
                self._matched, self._held = matched, ""
                return StopResult(text if self._include_stop else text[: -len(matched)], True, matched)
        text = self._held + text_delta
        keep = 0 if self._include_stop else self._automaton.depth[self._node]
        emit = text[: len(text) - keep]
        self._held = text[len(text) - keep :]
        return StopResult(emit, False, None)

    def flush(self) -> str:
        """End the text: what was held back is no stop string after all."""
        held, self._held, self._node = self._held, "", _ROOT
        return held
