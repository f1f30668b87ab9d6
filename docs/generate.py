"""Write the parts of the documentation that the code knows best, or check that they are up to date.

python docs/generate.py           write docs/errors.md and docs/cli.md
python docs/generate.py --check   exit 1 and say what to run if one of them is stale
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from knnlm_core import errors
from knnlm_server.api.errors import status_of

DOCS = Path(__file__).parent
DATASTORE = ("list", "inspect", "verify", "diff", "export", "compact", "forget", "purge", "prune", "rollback")
COMMANDS = (
    None,
    "build",
    "calibrate",
    "serve",
    "score",
    "datastore",
    *(f"datastore {command}" for command in DATASTORE),
    "model",
    "demo",
)
BUILD_ERRORS = (errors.CorpusError, errors.BuildError)


def errors_page() -> str:
    """One row per error class, from the table that the server answers by."""
    lines = [
        "# Errors",
        "",
        "<!-- Written by docs/generate.py; change knnlm_core/errors.py or knnlm_server/api/errors.py instead. -->",
        "",
        'Every error has one shape: `{"error": {"message", "type", "param", "code"}}`, as the body of the answer or as',
        "a server-sent event in a stream that has begun. `code` never changes; clients tell errors apart by it. The",
        "message names the field, its limit and the value given. 503 carries `Retry-After`; 409 carries",
        "`x-should-retry: false`.",
        "",
        "| code | status | type | meaning |",
        "|---|---|---|---|",
    ]
    for cls in _classes(errors.KnnlmError):
        if not issubclass(cls, BUILD_ERRORS):
            status, kind = status_of(cls.__new__(cls))
            lines.append(f"| `{cls.code}` | {status} | `{kind}` | {_meaning(cls)} |")
    lines += [
        "",
        "Errors of a build are printed by `knnlm build`, which exits with status 1; a server never sends them.",
        "",
        "| code | meaning |",
        "|---|---|",
    ]
    lines += [f"| `{cls.code}` | {_meaning(cls)} |" for root in BUILD_ERRORS for cls in _classes(root)]
    return "\n".join([*lines, ""])


def _meaning(cls: type[errors.KnnlmError]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def cli_page() -> str:
    """`--help` of every command."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    parts = ["# Command line", "", "<!-- Written by docs/generate.py from the commands' own --help. -->", ""]
    for command in COMMANDS:
        words = ["knnlm", *(command.split() if command else []), "--help"]
        shown = subprocess.run(
            [sys.executable, "-m", "knnlm_cli", *words[1:]], env=environment, capture_output=True, text=True, check=True
        ).stdout
        text = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        parts += [f"## `{' '.join(words[:-1])}`", "", "```text", text, "```", ""]
    return "\n".join(parts)


def _classes(root: type[errors.KnnlmError]) -> Iterator[type[errors.KnnlmError]]:
    yield root
    for cls in root.__subclasses__():
        yield from _classes(cls)


def main() -> int:
    """Write or check."""
    stale = []
    for path, text in ((DOCS / "errors.md", errors_page()), (DOCS / "cli.md", cli_page())):
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
