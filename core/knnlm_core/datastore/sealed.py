"""JSON files that carry their own checksum, so that a changed digit in a figure is noticed and not believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from knnlm_core.errors import DatastoreCorrupt

SEAL = "sha256"


def canonical(content: Mapping[str, JsonValue]) -> bytes:
    """The one way to write a JSON object: keys sorted, no spaces, non-ASCII characters unescaped, UTF-8."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sealed_text(content: Mapping[str, JsonValue]) -> str:
    """The object as an indented JSON file, with the sha256 of its canonical form as its last field."""
    seal = hashlib.sha256(canonical(content)).hexdigest()
    return json.dumps({**content, SEAL: seal}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_seal(content: Mapping[str, JsonValue], path: Path) -> dict[str, JsonValue]:
    """The object without its checksum, which may be absent: files written before there was one have none.

    Raises: DatastoreCorrupt: the checksum is not that of the rest.
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    if SEAL not in content:
        return rest
    try:
        need = hashlib.sha256(canonical(rest)).hexdigest()
    except ValueError as error:  # 1e999 is JSON, and no number
        raise DatastoreCorrupt(f"{path}: {error}") from error
    if content[SEAL] != need:
        raise DatastoreCorrupt(f"{path}: {SEAL} is {str(content[SEAL])[:100]!r}, the other fields need {need!r}")
    return rest
