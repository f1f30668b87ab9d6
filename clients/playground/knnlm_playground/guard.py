"""What stands between the network and Gradio's application."""

from __future__ import annotations

import asyncio
import logging
import re
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# All that the page asks for. Gradio has many more routes (uploads, files, a proxy, run history, editing by prompt).
_OPEN = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/.+"
        r"|/gradio_api/(info|theme\.css|startup-events|queue/data|heartbeat/[^/]+)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel|reset)/?"),
}
_OPEN["HEAD"] = _OPEN["GET"]

# Gradio's front end needs inline scripts and `new Function`; what matters is that nothing comes from or goes elsewhere.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Lets the page's own requests through, and nothing else.

    Other sites can neither read the page nor act through it: Gradio's answers to their questions (CORS) are dropped,
    and what they send is refused.

    Args:     stopping: set when the server is to stop; the page's endless streams end then.
    """

    def __init__(self, app: ASGIApp, stopping: asyncio.Event) -> None:
        self._app = app
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            refused = _refusal(scope)
            if refused is not None:
                await refused(scope, receive, send)
            else:
                await self._answer(scope, receive, _Answer(send))
        else:
            raise RuntimeError(f"the page has no {scope['type']}")

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            # A scope of its own: the routes that Gradio notes in it are not the server's.
            await self._app(dict(scope), self._until_stopping(receive), answer.send)
        except Exception as error:
            # Such as a stream of a visit to a server that was restarted since.
            logger.warning("page failed path=%r error=%s", scope["path"], type(error).__name__)
            logger.debug("page failed", exc_info=error)
            await answer.fail(scope, receive)
        await answer.end()

    def _until_stopping(self, receive: Receive) -> Receive:
        async def receive_or_stop() -> Message:
            reading = asyncio.ensure_future(receive())
            stopping = asyncio.ensure_future(self._stopping.wait())
            try:
                await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
                return reading.result() if reading.done() else {"type": "http.disconnect"}
            finally:
                reading.cancel()
                stopping.cancel()

        return receive_or_stop


def _refusal(scope: Scope) -> PlainTextResponse | None:
    path = scope["path"][len(scope.get("root_path", "")) :]
    allowed = _OPEN.get(scope["method"])
    if allowed is None or not allowed.fullmatch(path):
        return PlainTextResponse("not found", 404)
    if not _is_called_by_its_name(scope):
        return PlainTextResponse("open this page at localhost: another name for it may be another site's", 403)
    if scope["method"] == "POST" and not _is_own(Headers(scope=scope)):
        return PlainTextResponse("this page takes no requests from other sites", 403)
    return None


def _is_called_by_its_name(scope: Scope) -> bool:
    """Whether a visit to loopback says so: a site may let a name of its own lead here, and be of this origin then."""
    host = Headers(scope=scope).get("host", "")
    return scope["server"][0] not in LOOPBACK or _split(f"//{host}").hostname in LOOPBACK


def _is_own(headers: Headers) -> bool:
    """Whether a request comes from the page itself, or from no browser."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    # Browsers leave the field out for addresses that are neither loopback nor https.
    origin = headers.get("origin")
    return origin is None or _split(origin).netloc == headers.get("host")


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that do not match
        return urlsplit("")


class _Answer:
    """Sends an answer, with the headers that the page is to have."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False
        self._has_ended = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self._has_begun = True
            kept = [pair for pair in message["headers"] if not pair[0].lower().startswith(b"access-control-")]
            message = {**message, "headers": [*kept, *_HEADERS]}
        elif message["type"] == "http.response.body":
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, scope: Scope, receive: Receive) -> None:
        """Say so, unless something has been said already."""
        if not self._has_begun:
            await PlainTextResponse("the page failed", 500)(scope, receive, self.send)

    async def end(self) -> None:
        """End what has begun, as streams that were told to stop do not."""
        if self._has_begun and not self._has_ended:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
