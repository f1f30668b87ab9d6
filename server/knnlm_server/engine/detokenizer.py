"""Token ids in, text out, one token at a time, without ever decoding more than a short window.

What a token adds to the text depends on its neighbours: the first token of a sequence may lose its leading space, a
character may be spread over several tokens. So each new token is decoded behind a few earlier ones, and what comes
after the text already given is new:

    window     [… earlier tokens …| new token]
    decoded     text already given | new text | up to three U+FFFD, held back: perhaps a character's first bytes

Compare vLLM's and text-generation-inference's prefix and read offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A character has at most four bytes: an unfinished one at most three tokens, and at most three U+FFFD.
_UNFINISHED = 3
# The window shrinks when it is longer than this, or than twice this while something is held back. One of four
# consecutive starts lies between characters.
_WINDOW = 16
_SHORT_WINDOWS = (6, 7, 8, 9)
_SAFE_WINDOW = 12
# How much of the prompt is read; more only while it shows nothing at all or nothing but U+FFFD.
_PROMPT_WINDOW = 8
_MAX_PROMPT_WINDOW = 256


class IncrementalDetokenizer:
    """The text of one generated sequence, as it grows.

    All pushes and the flush together give decode(prompt + generated) without decode(prompt) in front. Where the prompt
    ends inside a character (other than U+FFFD), they begin with that character, unless generation leaves it unfinished.
    This holds for decoders that work token by token, the first token aside:

    - byte-level BPE: for every sequence of tokens;
    - sentencepiece (Metaspace or ▁ → space, with or without byte fallback): where each unbroken run of byte tokens is
      valid UTF-8, as in all text that a tokenizer encodes. Such a decoder turns a whole run into U+FFFD when its last
      byte is invalid, and takes back characters already given; here they stay, and the invalid bytes follow;
    - WordPiece, and BPE with a word suffix, without a clean-up of spaces over the whole text.

    Only U+FFFD at the end are held back: those of the last three tokens, and of longer runs the last three. So a stream
    of genuine or hopeless ones goes on. Time per token does not depend on the length.

    Args:
        decode: token ids to text; whether special tokens appear is up to it.
        prompt_token_ids: what comes before; only its last few tokens are decoded.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_token_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""  # decode(window)
        # The text of the window's first `_settled` tokens, and perhaps a bit more; what the text has beyond it is held.
        self._given, self._settled = "", 0
        self._prompt_rest = ""
        for token_id in _tail(decode, prompt_token_ids):
            self.push(token_id)
        self._prompt_rest = self._held_back()

    def copy(self) -> IncrementalDetokenizer:
        """A second one in the same state, for another choice of the same prompt."""
        twin = copy.copy(self)
        twin._window = list(self._window)
        return twin

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now, often none."""
        self._window.append(token_id)
        before, text = self._text, self._decode(self._window)
        if text == before and self._is_invisible(token_id):
            self._window.pop()
            return ""
        self._text = text
        held = self._num_uncertain(before)
        if not text.startswith(self._given):
            # Perhaps an unbroken run of byte tokens that is not valid yet, after characters of the same run.
            return "" if held and self._num_pending <= _UNFINISHED else self._start_over()
        new = text[len(self._given) : len(text) - held]
        self._given += new
        if len(self._given) == len(text):
            self._settled = len(self._window)
        if len(self._window) > (2 * _WINDOW if self._num_pending else _WINDOW):
            self._shrink()
        return self._without_prompt(new)

    def flush(self) -> str:
        """End the text: what was held back will not be completed."""
        rest = self._held_back()
        self._given, self._settled = self._text, len(self._window)
        return self._without_prompt(rest)

    @property
    def _num_pending(self) -> int:
        return len(self._window) - self._settled

    def _held_back(self) -> str:
        if self._text.startswith(self._given):
            return self._text[len(self._given) :]
        return self._decode(self._window[self._settled :])

    def _num_uncertain(self, before: str) -> int:
        """How many U+FFFD at the end of the text may still become characters."""
        # Byte fallback shows each byte of an unfinished character. If there are fewer than before, a genuine U+FFFD
        # has just been finished.
        if len(self._text) < len(before):
            return 0
        at_end = len(self._text) - len(self._text.rstrip(REPLACEMENT))
        return at_end if self._num_pending <= _UNFINISHED else min(_UNFINISHED, at_end)

    def _is_invisible(self, token_id: int) -> bool:
        """Whether a token shows nothing first in a sequence (as a "▁" may) nor later (as a skipped special token)."""
        return self._decode([token_id, token_id]) == ""

    def _start_over(self) -> str:
        """The decoder took back text that was given: go on with the tokens since then, on their own."""
        self._window = self._window[self._settled :]
        self._text = self._given = self._decode(self._window)
        self._settled = len(self._window)
        return self._without_prompt(self._given)

    def _shrink(self) -> None:
        """Forget the older part of the window; what is held back stays at the end of its text."""
        held = self._text[len(self._given) :]
        for size in (*_SHORT_WINDOWS, _SAFE_WINDOW):
            text = self._decode(self._window[-size:])
            # Text that begins inside a character begins with U+FFFD that the whole does not have.
            if self._text.endswith(text) and len(text) >= len(held):
                break
        self._settled = max(0, self._settled - (len(self._window) - size))
        self._window = self._window[-size:]
        self._text = text
        self._given = text[: len(text) - len(held)]

    def _without_prompt(self, text: str) -> str:
        """Drop the U+FFFD that the prompt ended with, unless generation made something else of it."""
        while text and self._prompt_rest:
            if text[0] != self._prompt_rest[0]:
                self._prompt_rest = ""
            else:
                text, self._prompt_rest = text[1:], self._prompt_rest[1:]
        return text


def _tail(decode: Callable[[list[int]], str], token_ids: Sequence[int]) -> list[int]:
    """The last few tokens, enough to show some text, and not beginning inside a character."""
    base = _PROMPT_WINDOW
    while base < min(len(token_ids), _MAX_PROMPT_WINDOW):
        for size in range(base, base + _UNFINISHED + 1):
            window = list(token_ids[-size:])
            text = decode(window)
            if text and not text.startswith(REPLACEMENT):
                return window
        base *= 2
    return list(token_ids[-base:])
