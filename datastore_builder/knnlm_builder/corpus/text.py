"""Bytes to text: the rules that hold for every format."""

from __future__ import annotations

import codecs

_BOM = codecs.BOM_UTF8


class NotText(ValueError):
    """Bytes or a string that cannot be a document's text; the message says what and where.

    Never leaves this package: readers turn it into `UnreadableInput` with the file's name.
    """


def decode_text(data: bytes, *, offset: int = 0) -> str:
    """Decode UTF-8, strictly; a byte order mark at the file's start is dropped.

    Args:   offset: of ``data`` in its file, so that messages give the file's byte offset.
    Raises: NotText: a NUL or an invalid byte, whichever comes first, with its offset.
    """
    nul = data.find(0)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if nul == -1 or error.start < nul:
            raise NotText(f"invalid UTF-8 (0x{data[error.start]:02x}) at byte {offset + error.start}") from None
    if nul != -1:
        raise NotText(f"a NUL byte, as binary files have, at byte {offset + nul}")
    return text[1:] if offset == 0 and data.startswith(_BOM) else text


def check_characters(text: str) -> str:
    """Return ``text`` if it can be stored as UTF-8 without NUL.

    Raises: NotText: a NUL or a lone surrogate, with its position in characters.
    """
    if (nul := text.find("\0")) != -1:
        raise NotText(f"a NUL character at position {nul}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"U+{ord(text[error.start]):04X}"
            raise NotText(f"a lone surrogate ({surrogate}) at position {error.start}") from None
    return text
