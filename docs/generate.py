"""Write the parts of the documentation that the code knows best, or check that they are up to date.

python docs/generate.py           write docs/errors.md, cli.md, settings.md, api.md and the tables of observability.md
python docs/generate.py --check   exit 1 and say what to run if one of them is stale
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from generate_api import api_page
from generate_settings import settings_page

from knnlm_core import errors
from knnlm_server.api.errors import status_of
from knnlm_server.api.metrics import all_families

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
    "playground",
    "model",
    "demo",
    "doctor",
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


def observability_page() -> str:
    """The page as it is, with its tables made anew: of metrics from the code, of alerts from their rules."""
    page = (DOCS / "observability.md").read_text(encoding="utf-8")
    for name, lines in (("metrics", _metrics()), ("alerts", _alerts())):
        begin, end = f"<!-- {name}: written by docs/generate.py -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        page = before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return page


def _metrics() -> Iterator[str]:
    yield from ("| metric | kind | labels | what |", "|---|---|---|---|")
    for family in all_families():
        name = family.name + ("_total" if family.kind == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| `{name}` | {family.kind} | {labels} | {family.text} |"


def _alerts() -> Iterator[str]:
    yield from ("| alert | severity | when | what to do |", "|---|---|---|---|")
    rules = yaml.safe_load((DOCS.parent / "docker" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        expression = " ".join(rule["expr"].split()).replace("|", "\\|")
        lasting = f", for {rule['for']}" if "for" in rule else ""
        description = rule["annotations"]["description"]
        yield f"| {rule['alert']} | {rule['labels']['severity']} | `{expression}`{lasting} | {description} |"


def _classes(root: type[errors.KnnlmError]) -> Iterator[type[errors.KnnlmError]]:
    yield root
    for cls in root.__subclasses__():
        yield from _classes(cls)


def main() -> int:
    """Write or check."""
    stale = []
    for path, text in (
        (DOCS / "errors.md", errors_page()),
        (DOCS / "cli.md", cli_page()),
        (DOCS / "observability.md", observability_page()),
        (DOCS / "settings.md", settings_page()),
        (DOCS / "api.md", api_page()),
    ):
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"stale: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
