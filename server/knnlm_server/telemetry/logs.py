"""Logging set-up: event first, then key=value; never a prompt at INFO."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str) -> None:
    """Send the project's and uvicorn's log lines to stderr in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("knnlm_server", "knnlm_core", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())
