"""Lines that would come again and again, once a minute."""

from __future__ import annotations

import logging
import time

_EVERY_S = 60.0


class Seldom(logging.Filter):
    """Lets one line through, whatever it says, and no other for a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is logged."""
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + _EVERY_S
        return True
