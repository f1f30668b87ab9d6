"""Streams of events: one decoder, and a thin iterator of each kind around it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx

from knnlm_client._answers import ModelT, error_from_body, unexpected, validate
from knnlm_client._sse import EventStreamParser
from knnlm_client.errors import StreamInterrupted

T = TypeVar("T")

_END_MARK = "[DONE]"


class EventDecoder(Generic[ModelT]):
    """Reads the body of a streaming answer, whoever receives it.

    Raises:   UnexpectedResponse: at once, if the answer is no event stream.
    """

    def __init__(self, response: httpx.Response, event_type: type[ModelT]) -> None:
        content_type = response.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "text/event-stream":
            raise unexpected(response, f"expected text/event-stream, got {content_type or 'no content type'}")
        self._response = response
        self._event_type = event_type
        self._parser = EventStreamParser()
        self._ended = False

    def feed(self, piece: bytes) -> Iterator[ModelT]:
        """Yield the events that the next piece of the body completes.

        Raises:   APIError: an event carries an error; the events before it have been yielded.
        """
        for data in self._parser.feed(piece):
            # What follows the end mark is read, so that the connection can be used again, but means nothing.
            self._ended = self._ended or data == _END_MARK
            if not self._ended:
                yield self._decode(data)

    def finish(self) -> None:
        """Check, after the last piece, that the stream was complete."""
        if not self._ended:
            path = self._response.request.url.path
            raise StreamInterrupted(f"the stream of {path} ended without {_END_MARK}; what arrived is incomplete")

    def _decode(self, data: str) -> ModelT:
        if '"error"' in data:  # cheap first: nearly no event is decoded twice
            body = _json_or_none(data)
            if isinstance(body, dict) and body.get("error"):
                raise error_from_body(body, self._response, excerpt=data)
        return validate(data, self._event_type, self._response)


class Stream(Generic[T]):
    """The events of one answer, in order. The request goes out when the first is asked for.

    Use it in a `with` block, so that leaving early closes the connection and the server stops working on it.
    """

    def __init__(self, events: Generator[T, None, None]) -> None:
        self._events = events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; harmless when the stream has ended."""
        self._events.close()


class AsyncStream(Generic[T]):
    """As `Stream`, for `async for` and `async with`."""

    def __init__(self, events: AsyncGenerator[T, None]) -> None:
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection; harmless when the stream has ended."""
        await self._events.aclose()


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
