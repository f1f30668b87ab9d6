"""Following what other processes publish, learn and delete: a look at each loaded name every few seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from knnlm_core.datastore.layout import Current, read_current
from knnlm_core.errors import DatastoreBusy, KnnlmError, ShuttingDown
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.table import DatastoreStatus

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 300.0  # before a version that could not be loaded is tried again


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What could not be loaded, and when to try again: its files may still be arriving."""

    what: object
    pause_s: float
    not_before_s: float


class Watcher:
    """A thread that loads what CURRENT names, for names that follow it, and shows what the ledger says, for all.

    A version that cannot be loaded is logged once and counted every time; the old one goes on serving, and it is tried
    again after ever longer pauses.

    Args:
        interval_s: between two looks.
        clock: seconds, monotone.
    """

    def __init__(self, registry: Registry, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._interval_s = interval_s
        self._clock = clock
        self._refusals: dict[tuple[str, str], _Refusal] = {}  # by name, and what was done
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-datastores", daemon=True)

    def start(self) -> None:
        """Look for the first time after one interval."""
        self._thread.start()

    def stop(self) -> None:
        """End after the look that is under way; a load that it began ends with the registry."""
        self._stopped.set()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def look(self) -> None:
        """Look at every loaded name once."""
        for status in self._registry.statuses():
            if self._stopped.is_set():
                return
            self._try(status.name, "ledger", None, partial(self._registry.refresh, status.name))
            if status.served.follows_current:
                self._follow(status)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            try:
                self.look()
            except Exception:  # one look that fails for a reason nobody foresaw must not be the last
                logger.exception("watch failed")

    def _follow(self, status: DatastoreStatus) -> None:
        def read() -> Current:
            assert self._registry.root is not None
            return read_current(self._registry.root, status.name)

        current = self._try(status.name, "CURRENT", None, read)
        if isinstance(current, Current) and current != _served(status):
            self._try(status.name, "load", current, partial(self._registry.load, status.name))

    def _try(self, name: str, step: str, what: object, act: Callable[[], object]) -> object:
        """Act, unless the same failed too recently; None for a failure."""
        key, before = (name, step), self._refusals.get((name, step))
        if before is not None and before.what == what and self._clock() < before.not_before_s:
            return None
        try:
            done = act()
        except (DatastoreBusy, ShuttingDown):  # somebody else is at it; the next look will see
            return None
        except (KnnlmError, OSError) as error:
            is_known = before is not None and before.what == what
            pause_s = min(2 * before.pause_s, MAX_PAUSE_S) if is_known and before is not None else self._interval_s
            self._refusals[key] = _Refusal(what, pause_s, self._clock() + pause_s)
            level = logging.DEBUG if is_known else logging.ERROR
            logger.log(level, "watch refused name=%s step=%s what=%s error=%s", name, step, what, error)
            return None
        self._refusals.pop(key, None)
        return done


def _served(status: DatastoreStatus) -> Current:
    calibration = status.datastore.calibration
    return Current(status.datastore.version, calibration.id if calibration is not None else None)
