"""Threads for work that can take seconds: asyncio's own stay free for what every request needs for a moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

READING_THREADS = 4
OVERLAP_THREADS = 2
DATASTORE_THREADS = 4


class Threads:
    """Three small sets of threads; work beyond their number waits its turn. Started when first used.

    Attributes:
        reading: tokenises texts of any length, and renders the answers that are as long.
        overlap: searches through whole datastores.
        datastores: loads, drains and changes them.
    """

    def __init__(self) -> None:
        self.reading = ThreadPoolExecutor(READING_THREADS, "reading")
        self.overlap = ThreadPoolExecutor(OVERLAP_THREADS, "overlap")
        self.datastores = ThreadPoolExecutor(DATASTORE_THREADS, "datastores")

    def close(self) -> None:
        """Drop the work that waits and take no more; what runs goes on, and nobody waits for it."""
        for executor in (self.reading, self.overlap, self.datastores):
            executor.shutdown(wait=False, cancel_futures=True)
