"""Lines: from bytes, cut anywhere, to whole lines of bytes."""

from __future__ import annotations


class LineSplitter:
    """Gives out the lines of a body that arrives piece by piece; they may end in LF, CRLF or CR.

    Lines stay bytes, so a character that is cut between two pieces is whole again when its line is decoded.
    """

    def __init__(self) -> None:
        self._unfinished: list[bytes] = []  # in the pieces it came in, joined once
        self._ended_in_cr = False  # an LF at the start of the next piece belongs to that CR

    @property
    def unfinished(self) -> bool:
        """Whether the pieces so far end inside a line."""
        return any(self._unfinished)

    def feed(self, piece: bytes) -> list[bytes]:
        """Take the next piece of the body; return the lines that it completes, without their ends."""
        if self._ended_in_cr and piece:
            piece = piece.removeprefix(b"\n")
            self._ended_in_cr = False
        self._unfinished.append(piece)
        if b"\n" not in piece and b"\r" not in piece:
            return []
        text = b"".join(self._unfinished)
        self._unfinished.clear()
        self._ended_in_cr = text.endswith(b"\r")
        lines = text.splitlines()  # of bytes: LF, CRLF and CR alone, unlike that of str
        if not text.endswith((b"\n", b"\r")):
            self._unfinished.append(lines.pop())
        return lines
