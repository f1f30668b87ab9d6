"""The server that the page shows, and how a visitor reaches it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import httpx

from knnlm_client import AsyncClient

TIMEOUT_S = 120.0

Typed: TypeAlias = str | None  # what a field of the page holds


@dataclass(frozen=True, slots=True)
class Keys:
    """What a visitor typed, if anything; they stand in no log and no URL, and are kept by the visitor's own browser."""

    api: Typed = field(default=None, repr=False)
    admin: Typed = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Server:
    """A knnlm server.

    Attributes:
        api_key: sent for visitors who typed none; for a page that its owner alone can reach.
        is_local: whether it is this very process, which no proxy stands before.
        allows_changes: whether visitors may change datastores, as far as the server lets them.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    is_local: bool = False
    allows_changes: bool = True

    def connect_to_change(self, keys: Keys) -> AsyncClient:
        """As `connect`, to change datastores.

        Raises: ValueError: that is off here, or a key holds what no header can.
        """
        if not self.allows_changes:
            raise ValueError("changing datastores is off on this page; it must be started with --changes")
        return self.connect(keys)

    def connect(self, keys: Keys) -> AsyncClient:
        """A client with a visitor's keys; close it.

        Raises: ValueError: a key holds what no header can.
        """
        return AsyncClient(
            self.url,
            api_key=(keys.api or "").strip() or self.api_key,
            admin_key=(keys.admin or "").strip() or None,
            timeout=TIMEOUT_S,
            transport=httpx.AsyncHTTPTransport() if self.is_local else None,
        )
