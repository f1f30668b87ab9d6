"""The exact bytes of single tokens; their text hides them where a character is spread over several tokens.

A fast tokenizer's decoder says what the strings of its vocabulary stand for:

    byte-level BPE    every character of the string is one byte
    sentencepiece     ▁ is a space, and with byte fallback <0xE2> is one byte
    word suffix       </w> is a space
    WordPiece         ## in front is dropped; any other piece has a space before it

Put together, the bytes of a text's tokens are its UTF-8: exactly so for byte-level BPE. Elsewhere the first token may
bring a space that the text does not have (decoders drop it there), and what the normaliser changed stays changed. Where
a vocabulary lacks a byte, encoding loses it, and no token can have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character → byte: printable bytes are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """Token id → bytes, for one tokenizer.

    Args:   tokenizer: a Hugging Face fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._alphabet: dict[str, int] | None = None
        self._has_byte_tokens = False
        self._spaces: list[tuple[str, str]] = []
        self._word_piece_prefix: str | None = None
        decoder = tokenizer.backend_tokenizer.decoder
        for step in _steps(json.loads(decoder.__getstate__()) if decoder is not None else {}):
            self._read(step)

    def _read(self, step: dict[str, Any]) -> None:
        """Take in one step of the decoder; those that only touch the ends of the whole text do not matter here."""
        kind = step.get("type")
        if kind == "ByteLevel":
            self._alphabet = byte_alphabet()
        elif kind == "ByteFallback":
            self._has_byte_tokens = True
        elif kind == "Metaspace":
            self._spaces.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in step["pattern"]:
            self._spaces.append((step["pattern"]["String"], step["content"]))
        elif kind == "BPEDecoder":
            self._spaces.append((step["suffix"], " "))
        elif kind == "WordPiece":
            self._word_piece_prefix = step["prefix"]

    def __call__(self, token_id: int) -> bytes:
        """Bytes of one token; none where the vocabulary has no such id, as in a padded embedding."""
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._alphabet is not None:
            # An added token is text; so is a string with characters that stand for no byte.
            if token_id in self._added or not self._alphabet.keys() >= set(piece):
                return piece.encode()
            return bytes(self._alphabet[character] for character in piece)
        byte = _BYTE.fullmatch(piece) if self._has_byte_tokens else None
        return bytes([int(byte[1], 16)]) if byte else self._text(piece).encode()

    def _text(self, piece: str) -> str:
        if self._word_piece_prefix is not None:
            is_inside = piece.startswith(self._word_piece_prefix)
            return piece.removeprefix(self._word_piece_prefix) if is_inside else f" {piece}"
        for written, meant in self._spaces:
            piece = piece.replace(written, meant)
        return piece


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder
