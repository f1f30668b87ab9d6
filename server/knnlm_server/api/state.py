"""What the routes share: one service object that exists from the first request, ready or not."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from knnlm_core.datastore.snapshot import Snapshot
from knnlm_core.errors import NotReady, ShuttingDown
from knnlm_core.lm.protocol import TextLM
from knnlm_core.lm.tokenizer import Tokenizer
from knnlm_core.query_cache import Cached, QueryCache
from knnlm_core.retrieval import Searchable
from knnlm_server.api.threads import Threads
from knnlm_server.engine.engine import Engine
from knnlm_server.engine.shadow import Shadowed, ShadowSearch
from knnlm_server.registry.registry import Registry
from knnlm_server.registry.watch import Watcher
from knnlm_server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Backend:
    """What exists once the model is loaded."""

    lm: TextLM
    tokenizer: Tokenizer
    engine: Engine
    registry: Registry
    model_name: str
    watcher: Watcher | None = None
    shadow: ShadowSearch | None = None
    query_cache: QueryCache | None = None
    threads: Threads = field(default_factory=Threads)
    created: int = field(default_factory=lambda: int(time.time()))  # when it became ready, seconds since 1970

    def searchable(self, datastore: Snapshot, *, cached: bool) -> Searchable:
        """What a request searches: the datastore, through the shadow and the cache of queries if there are any.

        Args:   cached: whether contexts that come again need not be searched again.
        """
        searched = datastore if self.shadow is None else Shadowed(datastore, self.shadow)
        return Cached(searched, datastore, self.query_cache) if cached and self.query_cache is not None else searched


@dataclass(slots=True)
class Service:
    """The server's state: starting, ready, failed or shutting down."""

    settings: ServerSettings
    backend: Backend | None = None
    waiting_for: str = "the model to load"
    failure: str | None = None
    closing: bool = field(default=False)

    def require_open(self) -> None:
        """Raises ShuttingDown: the server was told to stop; whoever is starting it need not go on."""
        if self.closing:
            raise ShuttingDown("the server is shutting down")

    def wait_for(self, what: str) -> None:
        """A start has come to this. Raises ShuttingDown: it need not go on."""
        self.require_open()
        self.waiting_for = what

    def wait_for_datastore(self, name: str) -> None:
        """A start has come to this datastore. Raises ShuttingDown: it need not go on."""
        self.wait_for(f"datastore {name!r} to load")

    def require(self) -> Backend:
        """The backend. Raises NotReady or ShuttingDown with the reason."""
        self.require_open()
        if self.failure is not None:
            raise NotReady(f"the server failed to start: {self.failure}")
        if self.backend is None:
            raise NotReady(f"the server is starting: waiting for {self.waiting_for}")
        return self.backend


def service(request: Request) -> Service:
    """The service of the app that handles this request."""
    return request.app.state.service  # type: ignore[no-any-return]


def backend(request: Request) -> Backend:
    """The backend, for routes that need the model."""
    return service(request).require()
