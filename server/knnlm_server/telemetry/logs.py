"""Log lines: event first, then key=value; as text, or as one JSON object per line. Never a prompt at INFO.

    logger.info("datastore loaded name=%s entries=%d", "law", 512)

    text  2030-01-31 12:00:00,250 INFO knnlm_server.registry datastore loaded name=law entries=512 request_id=9f2c…
    json  {"time": "2030-01-31T12:00:00.250+00:00", "level": "INFO", "logger": "knnlm_server.registry",
           "event": "datastore loaded", "name": "law", "entries": 512, "request_id": "9f2c…"}

What a line was logged for is known from its context, which tasks inherit, and threads that are started with it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_ids: ContextVar[Mapping[str, str]] = ContextVar("knnlm_log_ids", default={})  # noqa: B039 (never changed, only replaced)
_SPEC = re.compile(r"(?:\b(?P<name>[a-z_][a-z0-9_]*)=)?(?<!%)(?P<spec>%[-#0+ ]*\d*(?:\.\d+)?[diouxXeEfFgGcrsa])")
_NUMBERS = "eEfFgG"


@contextmanager
def logged_for(**ids: str) -> Iterator[None]:
    """Lines logged inside carry these members, such as ``request_id``."""
    token = _ids.set({**_ids.get(), **ids})
    try:
        yield
    finally:
        _ids.reset(token)


def configure_logging(level: str, form: LogFormat = "text") -> None:
    """Send the project's and uvicorn's log lines, and Python's warnings, to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("knnlm_server", "knnlm_core", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """One line per message, for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        line = super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")
        return line + "".join(f" {name}={value}" for name, value in _ids.get().items())


class JsonFormatter(logging.Formatter):
    """One JSON object per line, for machines; a traceback is a member."""

    def format(self, record: logging.LogRecord) -> str:
        """``time``, ``level``, ``logger``, ``event``, what the line says as key=value, and what it was logged for."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        for name, value in {**fields_of(record), **_ids.get()}.items():
            line[name if name not in ("time", "level", "logger") else f"{name}_"] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The members that a message is made of: its event, its key=value pairs, and ``detail``, which is whatever is left.

    They are read off the format string, not off the finished line: a value may hold spaces and equals signs.
    """
    form, args = str(record.msg), record.args
    specs = list(_SPEC.finditer(form))
    if not specs or not isinstance(args, tuple) or len(args) != len(specs):
        return {"event": record.getMessage()}
    fields: dict[str, Any] = {}
    text, end = "", 0
    for match, value in zip(specs, args, strict=True):
        text += form[end : match.start()].replace("%%", "%")
        end = match.end()
        if match["name"] is not None:
            fields[match["name"]] = _member(match["spec"], value)
        else:
            text += match["spec"] % (value,)
    text += form[end:].replace("%%", "%")
    head = form[: specs[0].start()]
    if specs[0]["name"] is None:  # part of a word, such as a bracket, belongs to what it encloses
        head = head[: head.rfind(" ") + 1]
    head = head.replace("%%", "%")
    detail = " ".join(text[len(head) :].split()).strip(" :,")
    return {"event": head.strip(" :,"), **({"detail": detail} if detail else {}), **fields}


def _member(spec: str, value: Any) -> Any:
    """A number as the line shows it, the rest as text."""
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float) and spec[-1] in _NUMBERS and math.isfinite(value):
        return float(spec % value)
    return str(value)
