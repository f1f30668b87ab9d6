"""docs/settings.md from the settings' own classes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import typer
from pydantic import BaseModel

from knnlm_builder.settings import BuildSettings, CalibrateSettings
from knnlm_cli.main import make_app
from knnlm_server.settings import ENV_PREFIX, ServerSettings

_INTRODUCTION = """# Settings

<!-- Written by docs/generate.py from the settings' classes; change those instead. -->

What is given on the command line goes before the environment, that before the default. Lists are given by repeating the
option, and in a variable separated by commas. `knnlm serve` refuses a `KNNLM_*` variable that it does not know, so a
misspelt one is noticed. Keys belong into the environment: every user of a machine can read command lines. `knnlm build`
and `knnlm calibrate` read no variables.
"""
# Variable, who reads it, what it does.
_OTHERS = (
    ("`KNNLM_API_KEY`", "`knnlm score`, `knnlm playground`", "the key that they send"),
    ("`OMP_NUM_THREADS`", "torch, FAISS, llama.cpp", "threads"),
    (
        "`OMP_WAIT_POLICY`",
        "the same",
        "how threads wait for each other: `PASSIVE` where cores are shared with other work",
    ),
    (
        "`XDG_CACHE_HOME`",
        "everything",
        "where `knnlm/` remembers what was verified and what is known of GGUF files; `~/.cache` if absent",
    ),
    ("`HF_HUB_OFFLINE=1`", "transformers", "never look anything up on the hub"),
    ("`OTEL_RESOURCE_ATTRIBUTES`, …", "OpenTelemetry", "what its SDK reads; see [Observability](observability.md)"),
    ("`NO_COLOR`, `COLUMNS`", "all commands", "no colours; the width of tables"),
)
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_UNITS = {"_s": "seconds", "_ms": "milliseconds", "_bytes": "bytes", "_tokens": "tokens"}


def settings_page() -> str:
    """Every setting of `knnlm serve`, `build` and `calibrate`."""
    lines = [_INTRODUCTION]
    for command, kind in (("serve", ServerSettings), ("build", BuildSettings), ("calibrate", CalibrateSettings)):
        variable = "variable | " if kind is ServerSettings else ""
        head = f"| option | {variable}type | default | what |"
        lines += [f"## knnlm {command}", ""]
        for panel, rows in groupby(_rows(command, kind), lambda row: row[0]):
            lines += [f"### {panel} ({command})", "", head, "|---" * (head.count("|") - 1) + "|"]
            lines += [*(cells for _, cells in rows), ""]
    lines += ["## Other variables", "", "| variable | read by | what |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _OTHERS), ""])


def _rows(command: str, kind: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Panel of the help, and the row, in the order of the help."""
    properties = kind.model_json_schema()["properties"]
    root: Any = typer.main.get_command(make_app())
    params = [param for param in root.commands[command].params if param.name in properties]
    panels = list(dict.fromkeys(_panel(param) for param in params))
    for param in sorted(params, key=lambda param: panels.index(_panel(param))):
        schema = properties[param.name]
        names = " ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts) if name.startswith("-"))
        variable = [f"`{ENV_PREFIX}{param.name.upper()}`"] if kind is ServerSettings else []
        what = " ".join(schema["description"].split())
        cells = [names or f"`{param.name}`", *variable, _type(param.name, schema), _default(param.name, kind), what]
        yield _panel(param), f"| {' | '.join(cells)} |"


def _panel(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or "Arguments"


def _type(name: str, schema: dict[str, Any]) -> str:
    parts = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    return " or ".join(_one(name, part) for part in parts)


def _one(name: str, schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema["type"]:
        case "array":
            return f"list of {_one('', schema['items'])}"
        case "boolean":
            return "on or off"
        case "string":
            return "secret" if schema.get("writeOnly") else schema.get("format", "text")
    units = [f", {unit}" for suffix, unit in _UNITS.items() if name.endswith(suffix)]
    bounds = [f"{sign} {_number(schema[bound])}" for bound, sign in _BOUNDS if bound in schema]
    return "".join([schema["type"], *units]) + (f" ({', '.join(bounds)})" if bounds else "")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _default(name: str, kind: type[BaseModel]) -> str:
    info = kind.model_fields[name]
    if info.is_required():
        return "required"
    if info.default in (None, ()):
        return ""
    if isinstance(info.default, bool):
        return "on" if info.default else "off"
    if name.endswith("_bytes") and info.default:
        power = max(power for power in (0, 10, 20, 30) if info.default >> power)
        return f"{info.default} ({info.default >> power} {('bytes', 'KiB', 'MiB', 'GiB')[power // 10]})"
    return f"`{info.default:g}`" if isinstance(info.default, float) else f"`{info.default}`"
