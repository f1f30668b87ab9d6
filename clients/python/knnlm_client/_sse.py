"""Server-sent events: from bytes, cut anywhere, to the data of each event."""

from __future__ import annotations


class EventStreamParser:
    """Reads a `text/event-stream` body piece by piece.

    Lines may end in LF, CRLF or CR; comments and fields other than `data` are passed over, since this API uses none.
    Bytes are decoded a line at a time, so a character that is cut between two pieces is whole again.
    """

    def __init__(self) -> None:
        self._unfinished_line: list[bytes] = []  # in the pieces it came in, joined once
        self._data: list[str] = []  # the data lines of the unfinished event
        self._ended_in_cr = False  # an LF at the start of the next piece belongs to that CR

    def feed(self, piece: bytes) -> list[str]:
        """Take the next piece of the body; return the data of every event that it completes."""
        events = []
        for line in self._lines(piece):
            if line:
                self._take_field(line)
            elif self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events

    def _lines(self, piece: bytes) -> list[bytes]:
        if self._ended_in_cr and piece:
            piece = piece.removeprefix(b"\n")
            self._ended_in_cr = False
        self._unfinished_line.append(piece)
        if b"\n" not in piece and b"\r" not in piece:
            return []
        text = b"".join(self._unfinished_line)
        self._unfinished_line.clear()
        self._ended_in_cr = text.endswith(b"\r")
        lines = text.splitlines()  # of bytes: LF, CRLF and CR alone, unlike that of str
        if not text.endswith((b"\n", b"\r")):
            self._unfinished_line.append(lines.pop())
        return lines

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
