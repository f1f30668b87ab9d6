"""The HTTP side of `knnlm score --url`: requests to a knnlm server, and its errors as ours."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from knnlm_core.errors import InvalidParameter, KnnlmError, Overloaded, ServiceError

CONNECT_TIMEOUT_S = 10.0
SILENCE_S = 600.0  # a busy server may let a request wait before the first line
ATTEMPTS = 5  # at a server whose queue is full
MAX_RETRY_AFTER_S = 30.0


class Connection:
    """A knnlm server. Close it when done.

    Args:     url: where it is; a trailing ``/v1`` is dropped.
    Raises:   InvalidParameter: the address is no http(s) URL.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        try:
            base = httpx.URL(self.url)
            if base.scheme not in ("http", "https") or not base.host:
                raise ValueError("it must begin with http:// or https:// and name a host")
            timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_TIMEOUT_S)
            self._http = httpx.Client(base_url=base, headers=headers, timeout=timeout)
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidParameter(f"--url {url!r} cannot be connected to: {error}", param="url") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the sockets."""
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """A JSON object. Raises: KnnlmError: what the server answered; ServiceError: it did not."""
        with self._errors("GET", path):
            return self._object(self._http.get(path))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A JSON object for a JSON object. Raises: as `get`."""
        with self._errors("POST", path):
            for attempt in range(1, ATTEMPTS + 1):
                response = self._http.post(path, json=body)
                if not self._waited(response, attempt):
                    break
            return self._object(response)

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON objects of an NDJSON answer, one a line, as they arrive.

        Raises: as `get`; also what a line ``{"error": …}`` says.
        """
        with self._errors("POST", path):
            for attempt in range(1, ATTEMPTS + 1):
                with self._http.stream("POST", path, json=body) as response:
                    if not response.is_success:
                        response.read()
                    if self._waited(response, attempt):
                        continue
                    if not response.is_success:
                        raise self._error(response)
                    for line in _lines(response):
                        yield self._checked(line)
                return

    def _waited(self, response: httpx.Response, attempt: int) -> bool:
        """Whether the server's queue was full and it is time to ask again."""
        if response.status_code != 503 or attempt == ATTEMPTS or not isinstance(self._error(response), Overloaded):
            return False
        wanted = response.headers.get("retry-after", "")
        time.sleep(min(float(wanted) if wanted.isdecimal() else 1.0, MAX_RETRY_AFTER_S))
        return True

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        if not response.is_success:
            raise self._error(response)
        return self._parsed(response.content)

    def _checked(self, line: bytes) -> dict[str, Any]:
        found = self._parsed(line)
        if "error" in found:
            raise _of_body(found, f"the server at {self.url} ended the answer without saying why")
        return found

    def _parsed(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServiceError(f"{self.url} does not answer as a knnlm server: {content[:80]!r}")
        return found

    def _error(self, response: httpx.Response) -> KnnlmError:
        try:
            body = response.json()
        except ValueError:
            body = None
        return _of_body(body, f"{self.url} answered {response.status_code} {response.reason_phrase}")

    @contextmanager
    def _errors(self, method: str, path: str) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            limit = CONNECT_TIMEOUT_S if isinstance(error, httpx.ConnectTimeout) else SILENCE_S
            raise ServiceError(f"{method} {self.url}{path}: no answer within {limit:g} s") from error
        except httpx.RequestError as error:
            raise ServiceError(f"{method} {self.url}{path}: {error or type(error).__name__}") from error


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Lines end in ``\\n`` and nothing else: httpx's own would break a token that holds U+2028."""
    rest = b""
    for part in response.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        yield from filter(None, lines)
    if rest:
        yield rest


def _of_body(body: object, otherwise: str) -> KnnlmError:
    """The error that a body describes, as the class of that code."""
    found = body.get("error") if isinstance(body, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("message"), str):
        return ServiceError(otherwise)
    cls = _classes().get(str(found.get("code")), ServiceError)
    param = found.get("param")
    return cls(found["message"], param=param if isinstance(param, str) else None)


def _classes() -> dict[str, type[KnnlmError]]:
    """Error classes by code, but for those that are not made from a message alone."""
    found, todo = dict[str, type[KnnlmError]](), [KnnlmError]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__init__ is KnnlmError.__init__:
            found[cls.code] = cls
    return found
