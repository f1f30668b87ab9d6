"""Removing old versions from the disk once nobody uses them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from knnlm_core.datastore.maintenance.prune import prune
from knnlm_core.errors import DatastoreBusy, DatastoreError

logger = logging.getLogger(__name__)


class Retention:
    """Keeps the last versions of a name, and those in use.

    Args:     keep: how many were current last; None removes nothing, ever.
    """

    def __init__(self, root: Path, keep: int | None) -> None:
        self._root = root
        self._keep = keep

    def apply(self, name: str, used: Collection[str]) -> None:
        """Remove what need not be kept; what cannot be removed now is tried again at the next swap.

        Args:     used: versions that serve, drain, or are gone back to.
        """
        if self._keep is None:
            return
        try:
            removed = prune(self._root, name, self._keep, protect=used)
        except DatastoreBusy:  # a build is under way: its swap comes later
            return
        except (DatastoreError, OSError) as error:
            logger.warning("old versions not removed name=%s error=%s", name, error)
            return
        if removed:
            logger.info("old versions removed name=%s removed=%s", name, ",".join(removed))
