"""The page under /playground leaves the API as it is, and lets through only what it needs itself."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from live_server import LiveServer
from playground_stores import Stores
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from knnlm_playground.guard import Guard
from knnlm_playground.mount import LazySite
from knnlm_playground.server import Keys, Server
from knnlm_server.app import create_app
from knnlm_server.settings import ServerSettings


def app_of(stores: Stores, **more: Any) -> Any:
    return create_app(ServerSettings(model=str(stores.model), datastores=stores.root, **more))


def client_of(app: ASGIApp, base_url: str = "http://127.0.0.1:8000") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base_url)


def test_the_api_describes_itself_as_without_the_page(stores: Stores) -> None:
    assert app_of(stores).openapi() == app_of(stores, playground=False).openapi()


def test_the_api_answers_errors_in_its_own_words(live_server: LiveServer) -> None:
    unknown = live_server.http.get("/nowhere")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "route_not_found")
    method = live_server.http.put("/v1/models")
    assert (method.status_code, method.json()["error"]["code"]) == (405, "method_not_allowed")
    # What is no route of the page is answered under its path, and is counted as no route of the API.
    inside = live_server.http.get("/playground/nowhere")
    assert (inside.status_code, inside.text) == (404, "not found")
    assert inside.headers["x-request-id"]
    assert "nowhere" not in live_server.http.get("/metrics").text


def test_the_page_has_a_path_with_a_slash_at_its_end(live_server: LiveServer) -> None:
    answer = live_server.http.get("/playground", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "playground/")


def test_a_server_can_do_without_the_page(stores: Stores) -> None:
    async def ask() -> httpx.Response:
        async with client_of(app_of(stores, playground=False)) as client:
            return await client.get("/playground/")

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found")


def test_a_package_that_does_not_load_takes_nothing_with_it(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        name = "broken"

        def load(self) -> object:
            raise ImportError("no such thing")

    monkeypatch.setattr("knnlm_server.api.pages.entry_points", lambda group: [Broken()])
    assert app_of(stores).openapi()["paths"]
    assert "page not available name=broken" in caplog.text


def test_without_gradio_there_is_no_page(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("knnlm_playground.mount.find_spec", lambda name: None if name == "gradio" else object())

    async def ask() -> httpx.Response:
        async with client_of(app_of(stores)) as client:
            return await client.get("/playground/")

    assert asyncio.run(ask()).json()["error"]["code"] == "route_not_found"
    assert "not installed: gradio" in caplog.text


# -- the guard, before an application that would answer anything -------------------------------------------------------


async def _anything(request: Request) -> PlainTextResponse:
    return PlainTextResponse("reached", headers={"access-control-allow-origin": "*"})


def guarded(stopping: asyncio.Event | None = None) -> Guard:
    inner = Starlette(routes=[Route("/{path:path}", _anything, methods=["GET", "POST", "PUT", "DELETE"])])
    return Guard(inner, stopping or asyncio.Event())


async def answer_of(method: str, path: str, **headers: str) -> httpx.Response:
    async with client_of(guarded()) as client:
        return await client.request(method, path, headers={name.replace("_", "-"): v for name, v in headers.items()})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/theme.css"),
        ("GET", "/assets/index-x.js"),
        ("GET", "/gradio_api/heartbeat/abc"),
        ("GET", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/cancel"),
    ],
)
def test_what_the_page_asks_for_is_let_through(method: str, path: str) -> None:
    answer = asyncio.run(answer_of(method, path))
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/proxy=https://example.org"),
        ("GET", "/gradio_api/runs"),
        ("POST", "/gradio_api/call/x"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/heartbeat/a/b"),
        ("GET", "/monitoring"),
        ("GET", "/login"),
        ("POST", "/"),
        ("PUT", "/gradio_api/queue/join"),
        ("DELETE", "/"),
    ],
)
def test_whatever_else_gradio_offers_is_not_there(method: str, path: str) -> None:
    answer = asyncio.run(answer_of(method, path))
    assert (answer.status_code, answer.text) == (404, "not found")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec_fetch_site": "same-origin", "origin": "https://behind.a.proxy"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://example.org"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "[::1]:8000", "sec_fetch_site": "same-origin"}, 200),
        # A name of another site's that leads here.
        ({"host": "example.org:8000", "origin": "http://example.org:8000"}, 403),
        ({"host": "example.org:8000", "sec_fetch_site": "same-origin"}, 403),
    ],
)
def test_other_sites_cannot_act_through_the_page(headers: dict[str, str], status: int) -> None:
    answer = asyncio.run(answer_of("POST", "/gradio_api/queue/join", **headers))
    assert answer.status_code == status


def test_pages_that_are_reached_by_another_name_are_not_shown() -> None:
    assert asyncio.run(answer_of("GET", "/", host="example.org:8000")).status_code == 403


def test_other_sites_cannot_read_the_page() -> None:
    async def ask() -> httpx.Response:
        inner = CORSMiddleware(Starlette(routes=[Route("/", _anything)]), allow_origins=["*"], allow_credentials=True)
        async with client_of(Guard(inner, asyncio.Event())) as client:
            return await client.get("/", headers={"origin": "https://example.org"})

    assert not [name for name in asyncio.run(ask()).headers if name.startswith("access-control")]


def test_endless_streams_end_when_the_server_is_to_stop() -> None:
    async def endless() -> AsyncIterator[str]:
        while True:
            yield "still there\n"
            await asyncio.sleep(0.01)

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(endless())

    async def stop_while_streaming() -> str:
        stopping = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, stopping.set)
        async with client_of(Guard(Starlette(routes=[Route("/", stream)]), stopping)) as client:
            return (await client.get("/")).text  # ends, or the test runs out of time

    assert asyncio.run(stop_while_streaming()).startswith("still there\n")


def test_a_stream_that_fails_ends_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def failing() -> AsyncIterator[str]:
        yield "begun"
        raise RuntimeError("the secret inside")

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(failing())

    async def fail(request: Request) -> PlainTextResponse:
        raise RuntimeError("the secret inside")

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        guard = Guard(Starlette(routes=[Route("/", stream), Route("/config", fail)]), asyncio.Event())
        async with client_of(guard) as client:
            return await client.get("/"), await client.get("/config")

    begun, failed = asyncio.run(ask())
    assert begun.text == "begun"
    assert failed.status_code == 500
    assert "secret" not in failed.text
    assert len(re.findall("page failed path='/' error=", caplog.text)) == 1


# -- the first visit ---------------------------------------------------------------------------------------------------


def test_the_page_is_built_once_by_the_first_visit_and_closed_in_the_end() -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        events.append("opened")
        yield
        events.append("closed")

    def build(url: str) -> Starlette:
        events.append(url)
        return Starlette(routes=[Route("/", _anything)], lifespan=lifespan)

    async def visit_twice() -> None:
        site = LazySite(build)
        async with site.opened(), client_of(site, "http://[::1]:8123") as client:
            assert events == []
            answers = await asyncio.gather(client.get("/"), client.get("/"))
            assert [answer.text for answer in answers] == ["reached", "reached"]

    asyncio.run(visit_twice())
    assert events == ["http://[::1]:8123", "opened", "closed"]


def test_a_page_that_does_not_load_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries = iter((True, False))

    def build(url: str) -> Starlette:
        if next(tries):
            raise ImportError("half installed")
        return Starlette(routes=[Route("/", _anything)])

    async def visit_twice() -> list[int]:
        site = LazySite(build)
        async with site.opened(), client_of(site) as client:
            return [(await client.get("/")).status_code for _ in range(2)]

    assert asyncio.run(visit_twice()) == [500, 200]
    assert "half installed" in caplog.text


def test_a_page_without_changes_makes_none_whatever_key_is_sent() -> None:
    with pytest.raises(ValueError, match="changing datastores is off on this page"):
        Server("http://127.0.0.1:8000", allows_changes=False).connect_to_change(Keys(admin="a-key"))


def test_no_key_is_in_what_the_page_prints_of_itself() -> None:
    shown = repr((Server("http://x", api_key="the-secret"), Keys("the-secret", "the-secret")))
    assert "the-secret" not in shown
