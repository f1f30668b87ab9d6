"""Shadow-exact: a share of what is searched is searched again, exactly, to see what the index misses in real traffic.

    engine's thread    search → offer: draw rows, copy them, put them into a short queue, or drop them
    shadow's thread    take → pin the datastore → search_exact → recall into a histogram → release

A sample that waits pins nothing and keeps nothing alive: a swap or an unload waits for one exact search at most, that
which is under way, and what still waits for the old version is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from knnlm_core.datastore.recall import row_recall
from knnlm_core.errors import InvalidParameter
from knnlm_core.retrieval import Searchable
from knnlm_core.types import EntryRange, Neighbors
from knnlm_server.telemetry.metrics import EngineMetrics

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 32  # how long a swap may have to wait: one exact search of so many rows
MAX_WAITING = 32  # samples; of 32 rows, D = 4096 and k = 1024 they are about 40 MB


class ExactlySearchable(Protocol):
    """A datastore, or what a request sees of one."""

    def search_exact(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """The k nearest entries of each query (B, D), all entries considered."""
        ...


class ShadowedDatastore(Searchable, ExactlySearchable, Protocol):
    """What is searched both ways."""


class Pinned(Protocol):
    """The right to use a datastore."""

    def release(self) -> None:
        """Give it back."""
        ...


Pin = Callable[[ExactlySearchable], Pinned | None]


class _Sample(NamedTuple):
    """Some rows of one search: copies, so that nothing of the step lives on."""

    datastore: weakref.ref[ExactlySearchable]
    queries: Tensor  # (R, D), R ≤ ROWS_AT_ONCE
    found: Neighbors  # (R, K)
    exclude: tuple[EntryRange, ...]


class Shadowed:
    """A datastore whose searches are offered to a shadow. Equal where the datastore is the same one."""

    def __init__(self, datastore: ShadowedDatastore, shadow: ShadowSearch) -> None:
        self._datastore = datastore
        self._shadow = shadow

    def search(self, queries: Tensor, k: int, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """As the datastore's."""
        found = self._datastore.search(queries, k, exclude=exclude)
        self._shadow.offer(self._datastore, queries, found, exclude)
        return found

    def lookup(self, queries: Tensor, entry_ids: Tensor, *, exclude: Sequence[EntryRange] = ()) -> Neighbors:
        """As the datastore's."""
        return self._datastore.lookup(queries, entry_ids, exclude=exclude)

    def next_entry(self, entry_ids: Tensor) -> Tensor:
        """As the datastore's."""
        return self._datastore.next_entry(entry_ids)

    def continuations(self, entry_ids: Tensor, length: int) -> Tensor:
        """As the datastore's."""
        return self._datastore.continuations(entry_ids, length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shadowed) and other._datastore is self._datastore

    def __hash__(self) -> int:
        return id(self._datastore)


class ShadowSearch:
    """Measures the recall of a share of all searches, beside the engine.

    A document deleted between the two searches of a row counts as found; the others are compared as ever.

    Args:
        fraction: share of the rows to search again, 0 … 1; drawn row by row.
        pin: a lease of its own on what was searched, for the length of one search; None if that is closed, or should
            be soon. Called on the shadow's thread; the datastore is not touched without.
        metrics: gets `shadow_recall`, once per row, and `shadow_dropped`.
        seed: of the draw.
    Raises: InvalidParameter: ``fraction`` is out of range.
    """

    def __init__(self, fraction: float, pin: Pin, metrics: EngineMetrics, *, seed: int = 0) -> None:
        if not 0 <= fraction <= 1:
            raise InvalidParameter(f"`shadow_exact` must be in 0 … 1, got {fraction:g}", param="shadow_exact")
        self._fraction = fraction
        self._pin = pin
        self._metrics = metrics
        self._draw = torch.Generator().manual_seed(seed)
        self._waiting: queue.Queue[_Sample | None] = queue.Queue(MAX_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)

    def start(self) -> None:
        """Start the shadow's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Drop what waits, end with the search that is under way. Before the datastores are closed."""
        self._closing.set()
        with suppress(queue.Empty):
            while True:
                self._drop(self._waiting.get_nowait(), "stopped")
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()

    def offer(
        self,
        datastore: ExactlySearchable,
        queries: Tensor,
        found: Neighbors,
        exclude: Sequence[EntryRange] = (),
    ) -> None:
        """Take a share of one search's rows; never waits, and never raises for what the search was.

        One thread at a time, the engine's.

        Args:     datastore, queries (B, D), exclude: what `search` was called with.
                  found: what it returned, (B, K) with the K that it was asked for.
        """
        if self._closing.is_set():
            return
        rows = (torch.rand(len(queries), generator=self._draw) < self._fraction).nonzero()[:, 0]
        for some in torch.split(rows, ROWS_AT_ONCE):
            if not len(some):
                continue
            if self._waiting.full():  # nothing is copied for what cannot wait
                self._metrics.shadow_dropped.labels("queue_full").inc(len(some))
                continue
            # Fancy indices copy.
            neighbors = Neighbors(*(column[some.to(column.device)].cpu() for column in found))
            taken = queries.detach()[some.to(queries.device)].cpu()
            sample = _Sample(weakref.ref(datastore), taken, neighbors, tuple(exclude))
            try:
                self._waiting.put_nowait(sample)
            except queue.Full:
                self._drop(sample, "queue_full")

    def _run(self) -> None:
        while (sample := self._waiting.get()) is not None:
            try:
                self._measure(sample)
            except Exception:
                logger.exception("shadow search failed rows=%d", len(sample.queries))
                self._drop(sample, "failed")

    def _measure(self, sample: _Sample) -> None:
        datastore = sample.datastore()
        pinned = None if datastore is None or self._closing.is_set() else self._pin(datastore)
        if datastore is None or pinned is None:
            self._drop(sample, "superseded")
            return
        k = sample.found.entry_ids.shape[1]
        try:
            exact = datastore.search_exact(sample.queries, k, exclude=sample.exclude)
        finally:
            del datastore  # not referred to once it may be closed
            pinned.release()
        there_are_some = exact.entry_ids[:, 0] >= 0
        for recall in row_recall(sample.found, exact, k)[there_are_some].tolist():
            self._metrics.shadow_recall.observe(recall)

    def _drop(self, sample: _Sample | None, reason: str) -> None:
        if sample is not None:  # None ends the thread
            self._metrics.shadow_dropped.labels(reason).inc(len(sample.queries))
