"""Bodies of streaming answers: from bytes to typed events, an error or the knowledge that the end is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import httpx

from knnlm_client._answers import ModelT, error_from_body, unexpected, validate
from knnlm_client._lines import LineSplitter
from knnlm_client._sse import EventStreamParser
from knnlm_client.errors import StreamInterrupted
from knnlm_client.responses import ExportedDocument, LoadEvent, LoadEventBody, ScoreEvent, ScoreLine, ScoreTotalEvent

T_co = TypeVar("T_co", covariant=True)

_END_MARK = "[DONE]"


class Decoder(Protocol[T_co]):
    """Reads the body of one streaming answer, whoever receives it."""

    def feed(self, piece: bytes) -> Iterator[T_co]:
        """Yield the events that the next piece of the body completes.

        Raises:   APIError: an event carries an error; the events before it have been yielded.
        """

    def finish(self) -> None:
        """Check, after the last piece, that the stream was complete.

        Raises:   StreamInterrupted: it was not.
        """


class EventDecoder(Generic[ModelT]):
    """Reads server-sent events up to their end mark.

    Raises:   UnexpectedResponse: at once, if the answer is no event stream.
    """

    def __init__(self, response: httpx.Response, event_type: type[ModelT]) -> None:
        _check_media_type(response, "text/event-stream")
        self._response = response
        self._event_type = event_type
        self._parser = EventStreamParser()
        self._ended = False

    def feed(self, piece: bytes) -> Iterator[ModelT]:
        """As `Decoder.feed`."""
        for data in self._parser.feed(piece):
            # What follows the end mark is read, so that the connection can be used again, but means nothing.
            self._ended = self._ended or data == _END_MARK
            if not self._ended:
                yield _read(data, self._event_type, self._response)

    def finish(self) -> None:
        """As `Decoder.finish`."""
        if not self._ended:
            raise _interrupted(self._response, _END_MARK)


class LoadDecoder:
    """Reads the events of a streamed load up to their end mark.

    Raises:   UnexpectedResponse: at once, if the answer is no event stream.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._events = EventDecoder(response, LoadEventBody)

    def feed(self, piece: bytes) -> Iterator[LoadEvent]:
        """As `Decoder.feed`."""
        for event in self._events.feed(piece):
            yield event.root

    def finish(self) -> None:
        """As `Decoder.finish`."""
        self._events.finish()


class ScoreDecoder:
    """Reads the lines of a streamed score up to its total.

    Raises:   UnexpectedResponse: at once, if the answer is no NDJSON.
    """

    def __init__(self, response: httpx.Response) -> None:
        _check_media_type(response, "application/x-ndjson")
        self._response = response
        self._lines = LineSplitter()
        self._ended = False

    def feed(self, piece: bytes) -> Iterator[ScoreEvent]:
        """As `Decoder.feed`."""
        for line in self._lines.feed(piece):
            if line and not self._ended:
                event = _read(line.decode("utf-8", errors="replace"), ScoreLine, self._response).root
                self._ended = isinstance(event, ScoreTotalEvent)
                yield event

    def finish(self) -> None:
        """As `Decoder.finish`."""
        if not self._ended:
            raise _interrupted(self._response, "score.total")


class DocumentDecoder:
    """Reads the lines of an export, whose end is that of the answer itself.

    Raises:   UnexpectedResponse: at once, if the answer is no NDJSON.
    """

    def __init__(self, response: httpx.Response) -> None:
        _check_media_type(response, "application/x-ndjson")
        self._response = response
        self._lines = LineSplitter()

    def feed(self, piece: bytes) -> Iterator[ExportedDocument]:
        """As `Decoder.feed`."""
        for line in self._lines.feed(piece):
            if line:
                yield _read(line.decode("utf-8", errors="replace"), ExportedDocument, self._response)

    def finish(self) -> None:
        """As `Decoder.finish`."""
        if self._lines.unfinished:
            raise _interrupted(self._response, "the end of its last line")


def _check_media_type(response: httpx.Response, expected: str) -> None:
    given = response.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != expected:
        raise unexpected(response, f"expected {expected}, got {given or 'no content type'}")


def _read(text: str, event_type: type[ModelT], response: httpx.Response) -> ModelT:
    if '"error"' in text:  # cheap first: nearly no event is decoded twice
        body = _json_or_none(text)
        if isinstance(body, dict) and body.get("error"):
            raise error_from_body(body, response, excerpt=text)
    return validate(text, event_type, response)


def _interrupted(response: httpx.Response, end: str) -> StreamInterrupted:
    path = response.request.url.path
    return StreamInterrupted(f"the stream of {path} ended without {end}; what arrived is incomplete")


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None
