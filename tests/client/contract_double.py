"""A contract double: a real HTTP server on a real socket that answers the routes of the API with fixed bodies.

It stands for the shapes of the contract alone; what the numbers mean is checked against the real server elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from contract_bodies import (
    CHAT,
    CHAT_CHUNKS,
    CHUNKS,
    COMPACTED,
    COMPLETION,
    DATASTORE,
    DATASTORES,
    DIFF,
    DONE,
    EXPORTED,
    FORGOTTEN,
    LEARNED,
    LOAD_EVENTS,
    MODELS,
    NEIGHBORS,
    PURGED,
    READY,
    SCORE,
    SCORE_EVENTS,
    TOKENIZATION,
    TOKENIZER_INFO,
    VERIFIED,
    VERSIONS,
    ndjson,
    sse,
)
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knnlm_client import AsyncClient


@dataclass(frozen=True)
class SeenRequest:
    """What arrived at the double."""

    method: str
    path: str  # as sent, still quoted
    query: str  # likewise
    authorization: str | None
    user_agent: str | None
    body: Any


@dataclass
class StreamScript:
    """What the next streams send: pieces in order, each only once the test has allowed it."""

    pieces: list[bytes] | None = None  # None: the route's own
    endless: bool = False  # begin anew after the last piece
    breaks_off: bool = False  # close the connection instead of ending the answer
    allowed: threading.Semaphore | None = None  # None: no waiting
    closed: threading.Event = field(default_factory=threading.Event)  # the server has stopped sending

    async def send(self, own: list[bytes]) -> AsyncIterator[bytes]:
        try:
            while True:
                for piece in own if self.pieces is None else self.pieces:
                    while self.allowed is not None and not self.allowed.acquire(blocking=False):
                        await asyncio.sleep(0.002)
                    await asyncio.sleep(0)  # an endless stream must leave the loop time to see that nobody reads
                    yield piece
                if self.breaks_off:
                    raise ConnectionAbortedError("as the test wishes")
                if not self.endless:
                    return
        finally:
            self.closed.set()


@dataclass
class ContractDouble:
    """The double's address, what it has seen, and what it answers next.

    Attributes:
        next_answer: sent once instead of the route's own answer.
        hang: the next answers come only once this is set.
    """

    url: str = ""
    seen: list[SeenRequest] = field(default_factory=list)
    next_answer: Response | None = None
    hang: threading.Event | None = None
    stream: StreamScript = field(default_factory=StreamScript)

    def reset(self) -> None:
        """Forget the last test."""
        if self.hang is not None:
            self.hang.set()
        fresh = ContractDouble()
        self.seen, self.next_answer, self.hang, self.stream = fresh.seen, None, None, fresh.stream

    def error(self, status: int, code: str, message: str = "no", **headers: str) -> None:
        """Answer the next request with an error of the contract's shape."""
        body = {"error": {"message": message, "type": "invalid_request_error", "param": "model", "code": code}}
        self.next_answer = JSONResponse(
            body, status, {name.replace("_", "-"): value for name, value in headers.items()}
        )

    def app(self) -> ASGIApp:
        """The application: it records every request, then answers as the contract says."""
        routes = _routes(self)

        async def record_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await routes(scope, receive, send)
                return
            body = await Request(scope, receive).body()
            headers = dict(scope["headers"])
            self.seen.append(
                SeenRequest(
                    method=scope["method"],
                    path=scope["raw_path"].decode(),
                    query=scope["query_string"].decode(),
                    authorization=headers[b"authorization"].decode() if b"authorization" in headers else None,
                    user_agent=headers[b"user-agent"].decode(),
                    body=json.loads(body) if body else None,
                )
            )
            hang = self.hang
            while hang is not None and not hang.is_set():
                await asyncio.sleep(0.002)
            replay = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive_again() -> Message:
                return replay.pop() if replay else await receive()

            answer, self.next_answer = self.next_answer, None
            await (answer or routes)(scope, receive_again, send)

        return record_and_answer


def _routes(double: ContractDouble) -> FastAPI:
    app = FastAPI()

    async def answer(request: Request, whole: dict[str, Any], pieces: list[bytes], media_type: str) -> Response:
        if (await request.json()).get("stream"):
            return StreamingResponse(double.stream.send(pieces), media_type=media_type)
        return JSONResponse(whole)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, COMPLETION, [*sse(*CHUNKS), DONE], "text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, CHAT, [*sse(*CHAT_CHUNKS), DONE], "text/event-stream")

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        return await answer(request, SCORE, ndjson(*SCORE_EVENTS), "application/x-ndjson")

    @app.post("/v1/neighbors")
    async def neighbors() -> Response:
        return JSONResponse(NEIGHBORS)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        shown = (await request.json()).get("return_token_strs")
        return JSONResponse(TOKENIZATION if shown else TOKENIZATION | {"token_strs": None})

    @app.post("/detokenize")
    async def detokenize() -> Response:
        return JSONResponse({"prompt": "The shall"})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return JSONResponse(TOKENIZER_INFO)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(MODELS)

    @app.get("/v1/datastores")
    async def datastores() -> Response:
        return JSONResponse(DATASTORES)

    @app.post("/v1/datastores/{name}/documents")
    async def learn(name: str) -> Response:
        return JSONResponse(LEARNED | {"name": name}, 201)

    @app.delete("/v1/datastores/{name}/documents/{document_id:path}")
    async def forget(name: str, document_id: str) -> Response:
        return JSONResponse(FORGOTTEN | {"name": name, "document_id": document_id})

    @app.post("/v1/datastores/{name}/compact")
    async def compact(name: str) -> Response:
        return JSONResponse(COMPACTED | {"name": name})

    @app.post("/v1/datastores/{name}/purge")
    async def purge(name: str, request: Request) -> Response:
        return JSONResponse(PURGED | {"documents": (await request.json())["documents"]})

    @app.get("/v1/datastores/{name}/versions")
    async def versions(name: str) -> Response:
        return JSONResponse(VERSIONS)

    @app.post("/v1/datastores/{name}/verify")
    async def verify(name: str, request: Request) -> Response:
        asked = (await request.json()).get("version")
        checked = [version for version in VERIFIED["versions"] if asked in {None, version["version"]}]
        return JSONResponse(VERIFIED | {"name": name, "versions": checked})

    @app.get("/v1/datastores/{name}/diff")
    async def diff(name: str, a: str, b: str) -> Response:
        return JSONResponse(DIFF | {"name": name, "a": a, "b": b})

    @app.get("/v1/datastores/{name}/export")
    async def export(name: str) -> Response:
        return StreamingResponse(double.stream.send(ndjson(*EXPORTED)), media_type="application/x-ndjson")

    @app.get("/v1/datastores/{name}")
    async def get_datastore(name: str) -> Response:
        return JSONResponse(DATASTORE | {"name": name})

    @app.put("/v1/datastores/{name}")
    async def load_datastore(name: str, request: Request) -> Response:
        body = await request.json()
        loaded = DATASTORE | {"name": name, "version": body["version"]}
        return await answer(request, loaded, [*sse(*LOAD_EVENTS), DONE], "text/event-stream")

    @app.post("/v1/datastores/{name}/rollback")
    async def roll_back_datastore(name: str) -> Response:
        return JSONResponse(DATASTORE | {"name": name, "version": DATASTORE["previous"]})

    @app.delete("/v1/datastores/{name}")
    async def unload_datastore(name: str) -> Response:
        return Response(status_code=204)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse(READY)

    return app


class RunningDouble:
    """The double behind uvicorn, in a thread, on a port that the system chose."""

    def __init__(self) -> None:
        self.double = ContractDouble()
        # log_level: a stream that a test breaks off is no news; ws: the library would warn, and nothing uses it
        config = uvicorn.Config(self.double.app(), port=0, log_level="critical", ws="none", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="contract-double")

    def __enter__(self) -> ContractDouble:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the double did not start"
            self._thread.join(0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.double.url = f"http://127.0.0.1:{port}"
        return self.double

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def run_async(double: ContractDouble, call: Callable[[AsyncClient], Awaitable[Any]], **options: Any) -> Any:
    """What an `AsyncClient` of the double returns, in an event loop of its own."""

    async def run() -> Any:
        async with AsyncClient(double.url, **options) as client:
            return await call(client)

    return asyncio.run(run())
