"""The real app under a real uvicorn on a real socket, in a thread of the test process."""

from __future__ import annotations

import dataclasses
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn

from knnlm_core.lm.huggingface import HuggingFaceLM
from knnlm_core.lm.protocol import Rows, Span
from knnlm_server.api.state import Backend, Service
from knnlm_server.app import create_app
from knnlm_server.settings import STATE, ServerSettings

PATIENCE_S = 30.0


def wait_until(holds: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Fails unless the condition holds soon enough."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"still not true after {within_s:g} s"
        time.sleep(0.005)


class LiveServer:
    """Starts on entering, with the engine's integrity check on; stops on leaving.

    Servers share folders of datastores here, so each has a state of its own, unless its settings name one.
    """

    def __init__(self, settings: ServerSettings, *, wait: bool = True) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="knnlm-state-")
        if settings.state is None:
            settings = settings.model_copy(update={"state": Path(self._own.name) / STATE})
        self.failures: list[str] = []
        self.app = create_app(settings, on_failure=lambda: self.failures.append("failed"))
        self._wait = wait
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, ws="none", lifespan="on", timeout_graceful_shutdown=5
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S, trust_env=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def service(self) -> Service:
        return self.app.state.service

    @property
    def backend(self) -> Backend:
        return self.service.require()

    @property
    def lm(self) -> HuggingFaceLM:
        return self.backend.lm

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self._server.started)
        if self._wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        wait_until(lambda: self.service.backend is not None or self.service.failure is not None)
        engine = self.backend.engine
        engine.config = dataclasses.replace(engine.config, check_integrity=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server did not stop"
        self._own.cleanup()

    # -- requests ------------------------------------------------------------------------------------------------------

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.http.post(path, json=body)

    def begin(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request whose answer nobody has read yet."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + content)
        return connection

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """A completion; greedy unless told otherwise."""
        response = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, prompt: Any, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed completion."""
        request = {"prompt": prompt, "temperature": 0, "stream": True, **body}
        response = self.post("/v1/completions", request)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse_events(response.text)

    def score(self, texts: Any, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/score", {"input": texts, **body})
        assert response.status_code == 200, response.text
        return response.json()

    # -- what is in use ------------------------------------------------------------------------------------------------

    def leases(self) -> int:
        return sum(status.leases for status in self.backend.registry.statuses())

    def is_idle(self) -> bool:
        """No request, slot or lease is left."""
        lm = self.lm
        return not any(self.backend.engine.load()) and lm.num_free_sequences == lm.num_sequences and not self.leases()


def parse_events(text: str) -> list[dict[str, Any]]:
    """JSON events of a complete stream; its last one must be the end mark."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events[-2:]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


class Brake:
    """Makes an LM's forward passes wait for permission; the LM itself is the real one."""

    def __init__(self, lm: HuggingFaceLM, allowed: float = 0) -> None:
        self._lm = lm
        self._forward = lm.forward
        self._allowed = allowed
        self._begun = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        self._lm.forward = self._wait_and_forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        del self._lm.forward

    def _wait_and_forward(self, batch: list[Span]) -> Rows:
        with self._changed:
            self._begun += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._begun <= self._allowed, PATIENCE_S), (
                "the brake was not released"
            )
        return self._forward(batch)

    def allow(self, passes: float) -> None:
        """Let this many passes through in all."""
        with self._changed:
            self._allowed = passes
            self._changed.notify_all()

    def release(self) -> None:
        """Let everything through."""
        self.allow(float("inf"))

    def wait_held(self) -> None:
        """Until a pass waits for permission."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._begun > self._allowed, PATIENCE_S), "nothing ran into the brake"


@contextmanager
def before_each_pass(lm: HuggingFaceLM, act: Callable[[], object], *, path: str = "encode") -> Iterator[None]:
    """Every pass of the real LM comes after something that a test wants.

    Args:   path: ``encode``, as scoring goes, or ``forward``, as generation does.
    """
    run = getattr(lm, path)

    def act_and_run(*args: Any) -> Any:
        act()
        return run(*args)

    setattr(lm, path, act_and_run)
    try:
        yield
    finally:
        delattr(lm, path)


def slowed(lm: HuggingFaceLM, seconds: float) -> AbstractContextManager[None]:
    """Every pass of generation takes this much longer."""
    return before_each_pass(lm, lambda: time.sleep(seconds), path="forward")
