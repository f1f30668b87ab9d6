"""Address, keys and limits of a connection, and the one place where httpx's errors become ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypedDict

import httpx

from knnlm_client._prepared import PreparedRequest
from knnlm_client._version import __version__
from knnlm_client.errors import ConnectionFailed, TimedOut

_CONNECT_TIMEOUT_S = 10.0


class HttpOptions(TypedDict):
    """Keywords that `httpx.Client` and `httpx.AsyncClient` share."""

    base_url: httpx.URL
    timeout: httpx.Timeout
    headers: dict[str, str]


class RequestArguments(TypedDict):
    """Keywords that `request` and `stream` of both kinds of httpx client share."""

    method: str
    url: str
    params: Mapping[str, str] | None
    json: dict[str, Any] | None
    headers: dict[str, str]


class Connection:
    """Where the server is and which keys open it; both clients hold one.

    Args:     timeout: seconds of silence after which a request fails; None waits for ever.
    Raises:   ValueError: the address is no http(s) URL, a key could not stand in a header, or timeout ≤ 0.
    """

    def __init__(self, base_url: str, *, api_key: str | None, admin_key: str | None, timeout: float | None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` must be greater than 0 s, got {timeout}")
        self._url = _parse_base_url(base_url)
        self._timeout_s = timeout
        self._api_key = _checked_key("api_key", api_key)
        self._admin_key = _checked_key("admin_key", admin_key)

    @property
    def http_options(self) -> HttpOptions:
        """What the httpx client of either kind is made with."""
        connect_s = _CONNECT_TIMEOUT_S if self._timeout_s is None else min(self._timeout_s, _CONNECT_TIMEOUT_S)
        return HttpOptions(
            base_url=self._url,
            timeout=httpx.Timeout(self._timeout_s, connect=connect_s),
            headers={"User-Agent": f"knnlm-client/{__version__}"},
        )

    def arguments(self, request: PreparedRequest) -> RequestArguments:
        """Return what httpx is to send, with the key that this request needs."""
        key = self._admin_key if request.admin and self._admin_key is not None else self._api_key
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return RequestArguments(
            method=request.method, url=request.path, params=request.query, json=request.body, headers=headers
        )

    @contextmanager
    def mapped_errors(self, request: PreparedRequest) -> Iterator[None]:
        """Turn what httpx raises while sending and receiving into the client's own errors."""
        where = f"{request.method} {request.path} at {self._url.host}"
        where += "" if self._url.port is None else f":{self._url.port}"
        try:
            yield
        except httpx.TimeoutException as error:
            limit = "connection" if isinstance(error, httpx.ConnectTimeout) else "answer"
            raise TimedOut(f"{where}: no {limit} in time (`timeout` is {self._timeout_s} s)") from error
        except httpx.RequestError as error:
            raise ConnectionFailed(f"{where}: {error or type(error).__name__}") from error


def _parse_base_url(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"`base_url` must be a URL, got {base_url!r}: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"`base_url` must begin with http:// or https:// and name a host, got {base_url!r}")
    # Clients of OpenAI's API are configured with the /v1 at the end, so people will give it here too.
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/v1") + "/")


def _checked_key(field: str, key: str | None) -> str | None:
    # A key read from a file often keeps its line end, which h11 would refuse in a message that shows the key.
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise ValueError(f"`{field}` must be printable ASCII without spaces or line ends")
    return key
