"""Server-sent events: from bytes, cut anywhere, to the data of each event."""

from __future__ import annotations

from knnlm_client._lines import LineSplitter


class EventStreamParser:
    """Reads a `text/event-stream` body piece by piece.

    Comments and fields other than `data` are passed over, since this API uses none.
    """

    def __init__(self) -> None:
        self._lines = LineSplitter()
        self._data: list[str] = []  # the data lines of the unfinished event

    def feed(self, piece: bytes) -> list[str]:
        """Take the next piece of the body; return the data of every event that it completes."""
        events = []
        for line in self._lines.feed(piece):
            if line:
                self._take_field(line)
            elif self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
